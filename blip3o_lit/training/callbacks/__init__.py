"""What happens around the training loop: checkpoints, console, metrics, signals."""
