"""What this package is measured against: the plain training loop, the plain data loader, and other forms of the loss."""
