"""What training, evaluation and export share; independent of methods."""
