"""Training: the trainer, the engine of a step, optimizers, metrics, run folders."""
