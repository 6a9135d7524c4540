"""Held-out scores of a translator, beside baselines, with the same images and noise for all."""
