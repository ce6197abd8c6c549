"""What a training step computes, one file a method."""
