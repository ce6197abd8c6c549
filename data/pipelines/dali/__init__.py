"""DALI pipeline, on a GPU or a CPU."""
