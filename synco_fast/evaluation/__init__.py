"""Evaluations of a frozen or fine-tuned backbone."""
