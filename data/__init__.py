"""Data loading: image files in, batches of two augmented views out."""
