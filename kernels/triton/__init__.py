"""The loss on a CUDA device: sample, scan, select, mix, reduce. Importing this needs Triton."""

from synco_fast.kernels.triton.launch import contrast_and_gradient, unserved

__all__ = ["contrast_and_gradient", "unserved"]
