"""Measurements of the training step, on random weights of the real or a small size."""
