"""Augmentation: its settings, its random draw, and the operations on tensors."""
