"""Batch norm on a CUDA device: statistics, apply, and both backward. Importing this needs Triton."""

from synco_fast.kernels.norm.triton.launch import apply, backward, statistics, unserved

__all__ = ["apply", "backward", "statistics", "unserved"]
