"""The contrastive loss: tensors in, tensors out; knows nothing of training."""

from synco_fast.kernels.momentum import momentum_update
from synco_fast.kernels.negatives import FAMILIES, Family, Negatives
from synco_fast.kernels.ops import Backend, synthetic_contrast
from synco_fast.kernels.reference import Contrast, Statistics
from synco_fast.kernels.rng import Draw, draw

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
