"""The seeds' embedding files -> a token store."""
