"""Training: pretraining as a task; its rooms are ``run`` (of any task), ``step`` and ``tuning`` (what a step costs)."""
