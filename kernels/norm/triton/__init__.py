"""Batch norm kernels for CUDA devices: statistics, apply and backward. Importing this needs Triton."""

from synco_fast.kernels.norm.triton.launch import apply, backward, statistics, unserved

__all__ = ["apply", "backward", "statistics", "unserved"]
