"""What happens around the training loop: EMA, checkpoints, console, metrics, signals."""
