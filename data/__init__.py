"""Image files in, two augmented batches out."""
