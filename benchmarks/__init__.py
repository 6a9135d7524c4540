"""Benchmarks: `python -m benchmarks [ONLY=name]` runs every module here that has a `run`."""
