"""Baselines: a plain training loop, a plain data loader, other implementations of the loss."""
