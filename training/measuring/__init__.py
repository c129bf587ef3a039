"""Accuracy of a model, and what it costs on this machine."""
