"""Weights in and out: backbones for everyone else's tools, and checkpoints from elsewhere."""
