"""What a model is worth, and what it costs on this machine."""
