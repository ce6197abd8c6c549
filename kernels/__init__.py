"""Contrastive loss kernels: tensors in, tensors out; independent of training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synco_fast.kernels.backends import BACKENDS, Backend
    from synco_fast.kernels.momentum import momentum_update
    from synco_fast.kernels.negatives import FAMILIES, Family, Negatives
    from synco_fast.kernels.ops import synthetic_contrast
    from synco_fast.kernels.reference import Contrast, Statistics
    from synco_fast.kernels.rng import STREAM, Draw, draw

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "STREAM",
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

_HOMES = {
    "BACKENDS": "backends",
    "Backend": "backends",
    "momentum_update": "momentum",
    "FAMILIES": "negatives",
    "Family": "negatives",
    "Negatives": "negatives",
    "synthetic_contrast": "ops",
    "Contrast": "reference",
    "Statistics": "reference",
    "STREAM": "rng",
    "Draw": "rng",
    "draw": "rng",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that reading a configuration does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'synco_fast.kernels' has no attribute {name!r}")
    return getattr(import_module(f"synco_fast.kernels.{_HOMES[name]}"), name)
