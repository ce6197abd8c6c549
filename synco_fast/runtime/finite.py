"""Finding NaN and infinity in tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["not_finite"]


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]], *, infinite: bool = False) -> str | None:
    """The name of the first tensor that holds NaN or infinity; waits for the device once.

    Args:
        named: Name and tensor; only floating dtypes are checked.
        infinite: Whether infinity is allowed.
    """
    floating = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    bad = [tensor.isnan().any() if infinite else ~tensor.isfinite().all() for _, tensor in floating]
    for (name, _), wrong in zip(floating, torch.stack(bad).tolist() if bad else (), strict=True):
        if wrong:
            return name
    return None
