"""The contrastive head: tensors in, tensors out; knows nothing of training."""

from synco_fast.kernels.contrast import Contrast, Statistics
from synco_fast.kernels.draws import Draw, draw
from synco_fast.kernels.momentum import momentum_update
from synco_fast.kernels.negatives import FAMILIES, Family, Negatives
from synco_fast.kernels.ops import Backend, synthetic_contrast

__all__ = [
    "FAMILIES",
    "Backend",
    "Contrast",
    "Draw",
    "Family",
    "Negatives",
    "Statistics",
    "draw",
    "momentum_update",
    "synthetic_contrast",
]
