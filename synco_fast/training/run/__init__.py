"""A run of any task: the trainer, its contract with a task, the run folder, metrics and stops."""
