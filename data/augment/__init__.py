"""One description of the augmentation, its random draw, and the operations."""
