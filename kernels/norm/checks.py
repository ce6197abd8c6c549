"""Arguments of the batch norm, checked: one line that names the argument, what was found and what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_arguments"]


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise for what the batch norm does not take; reads shapes and types only, never values on a device.

    Raises:
        TypeError: A tensor is not floating point, or lies on another device than x.
        ValueError: A shape or a number is outside what is expected.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: found {x.dtype}, expected a floating-point tensor")
    if x.dim() != 4:
        raise ValueError(f"x: found {x.dim()} dimensions, expected 4, (B, C, H, W)")
    batch, channels = x.shape[:2]
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({channels},), the channels of x")
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise TypeError(f"{name}: found {tensor.dtype} on {tensor.device}, expected floating point on {x.device}")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing}: found None, expected a tensor where its counterpart is given")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: found shape {tuple(residual.shape)}, expected {tuple(x.shape)}, that of x")
        if not residual.is_floating_point() or residual.device != x.device:
            raise TypeError(
                f"residual: found {residual.dtype} on {residual.device}, expected floating point on {x.device}"
            )
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: found {eps!r}, expected a finite number, 0 or more")
    if not training:
        if running_mean is None:
            raise ValueError("running_mean: found None, expected a tensor outside training")
        return
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: found {groups!r}, expected a whole number of at least 1")
    if batch % groups:
        raise ValueError(f"x: found a batch of {batch}, expected a multiple of {groups} groups")
    if batch * x.shape[2] * x.shape[3] == groups:
        raise ValueError(
            f"x: found shape {tuple(x.shape)} in {groups} groups, one value a channel in each, "
            "expected more than one in training"
        )
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("num_batches_tracked: found None, expected a tensor where momentum is None")
    if num_batches_tracked is not None and (num_batches_tracked.dtype != torch.int64 or num_batches_tracked.dim()):
        found = f"{num_batches_tracked.dtype} of shape {tuple(num_batches_tracked.shape)}"
        raise ValueError(f"num_batches_tracked: found {found}, expected int64 of no dimensions")
