"""What a run takes, worked out before it starts: layout, memory, arithmetic, time."""
