"""Model cards, pushes to the Hub, Spaces."""
