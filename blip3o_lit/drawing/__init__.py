"""Pictures of tokens: a linear read-out, pretrained decoders, and what the demo's pictures show."""
