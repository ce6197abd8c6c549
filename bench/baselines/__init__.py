"""Baselines: a plain training loop, a plain data loader, and other implementations of the loss."""
