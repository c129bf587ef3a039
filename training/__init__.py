"""The Accelerate trainer of EViT, imported as `evit_training`; see `cli.py` for the commands."""
