"""Sweeps: jobs in processes of their own, the Optuna search, the page of all runs."""
