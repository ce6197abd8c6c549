"""Training: pretraining as a task; its packages are ``run`` (of any task), ``step`` and ``tuning`` (its cost)."""
