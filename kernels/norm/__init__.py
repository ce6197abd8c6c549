"""Grouped batch norm with residual add and ReLU: tensors in, tensors out."""

from synco_fast.kernels.norm.ops import NormBackend, batch_norm, unserved_by_triton

__all__ = ["NormBackend", "batch_norm", "unserved_by_triton"]
