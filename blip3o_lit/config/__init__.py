"""Typed, torch-free configuration: one dataclass a Hydra group."""
