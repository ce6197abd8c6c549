"""What this package is measured against: a plain training loop, a plain data loader, other forms of the loss."""
