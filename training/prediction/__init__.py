"""Predicting: pictures and data sets in, rows of labels, scores and features out."""
