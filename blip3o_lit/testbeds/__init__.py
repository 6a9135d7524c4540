"""Data whose exact answers are known, and the stores that build themselves."""
