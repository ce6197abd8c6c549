"""The head on a CUDA device: sample, scan, select, mix, finish. Importing this needs Triton."""

from synco_fast.kernels.triton.head import contrast_and_gradient, unserved

__all__ = ["contrast_and_gradient", "unserved"]
