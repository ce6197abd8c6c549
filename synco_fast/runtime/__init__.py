"""The floor that training, evaluation and export share; it knows no method."""
