"""The loop and what it rests on: optimiser, schedule, precision, checkpoints, logs."""
