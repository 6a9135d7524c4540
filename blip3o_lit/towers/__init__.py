"""Frozen image encoders that turn images into tokens, and the demo's scenes."""
