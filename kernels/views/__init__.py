"""Fused augmentation on the device: ragged uint8 pixels and drawn parameters in, augmented views out."""

from synco_fast.kernels.views.launch import make_views, unserved_by_triton

__all__ = ["make_views", "unserved_by_triton"]
