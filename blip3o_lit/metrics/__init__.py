"""Metrics with sum states, float64 and safe under several processes."""
