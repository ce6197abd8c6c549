"""Reference grouped batch norm with add and ReLU in plain PyTorch: any dtype, any device, derivatives of any order.

x is split along the batch into G groups, with n values for each channel of a group:

    y = relu((x - mean_g) / sqrt(var_g + eps) * w + b + r)

mean_g and var_g, the biased variance, are over the images and pixels of a group (arXiv 1502.03167, algorithm 1).
Statistics and sums are float32 for 16-bit data, and y is rounded once, after add and ReLU.

`gradients` is the backward pass in closed form. z is the gradient of y where y > 0 and 0 elsewhere, h is
(x - mean_g) * rstd_g, and means are over a group:

    dr = z,   db = sum z,   dw = sum z h,   dx = w rstd_g (z - mean z - h mean(z h))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from synco_fast.kernels.norm.arguments import Arguments

__all__ = ["Gradients", "batch_norm", "gradients", "normalise", "statistics", "update_running", "wide"]

_PLACES = (1, 3, 4)


class Gradients(NamedTuple):
    """Gradients of x and r, (B, C, H, W) in their dtype, and of weight and bias, (C,) in float32 or wider."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64 data, else float32."""
    return torch.promote_types(dtype, torch.float32)


def _grouped(x: Tensor, groups: int) -> Tensor:
    grouped: Tensor = x.to(wide(x.dtype)).unflatten(0, (groups, -1))
    return grouped


def _each_group(value: Tensor) -> Tensor:
    """Reshape (G, C), or (C,) for all groups, to broadcast with (G, b, C, H, W)."""
    return value[..., None, :, None, None]


def statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group and channel, (G, C) each.

    Args:
        x: (B, C, H, W).
        groups: G, a divisor of B.
    """
    variance, mean = torch.var_mean(_grouped(x, groups), dim=_PLACES, correction=0)
    return mean, variance


def normalise(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    relu: bool,
    eps: float,
) -> Tensor:
    """Compute y from statistics, (G, C). Other arguments are as in `synco_fast.kernels.norm.batch_norm`."""
    dtype = wide(x.dtype)
    groups = len(mean)
    scale = (variance.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    y = (_grouped(x, groups) - _each_group(mean.to(dtype))) * _each_group(scale)
    if bias is not None:
        y = y + _each_group(bias.to(dtype))
    if residual is not None:
        y = y + _grouped(residual, groups)
    if relu:
        y = y.relu()
    return y.flatten(0, 1).to(x.dtype)


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Update the running statistics in place with the mean over groups; the variance is the unbiased one.

    Args:
        running_mean, running_var: (C,), or None.
        num_batches_tracked: 0-dimensional int64, increased by one; or None.
        mean, variance: (G, C), the variance biased.
        count: n, the number of values of a channel in a group.
        momentum: Weight of the new statistics; None for the mean over all batches, 1 / ``num_batches_tracked``.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    for running, found in ((running_mean, mean), (running_var, variance * (count / max(1, count - 1)))):
        if running is not None:
            target = found.mean(dim=0).to(running.dtype)
            if momentum is not None:
                running.lerp_(target, momentum)
            else:
                assert num_batches_tracked is not None
                running.lerp_(target, num_batches_tracked.to(running.dtype).reciprocal())


def batch_norm(given: Arguments) -> Tensor:
    """Compute y, (B, C, H, W), differentiable by autograd."""
    x = given.x
    if given.training:
        mean, variance = statistics(x, given.groups)
        count = x.numel() // (given.groups * x.shape[1])
        running = given.running_mean, given.running_var, given.num_batches_tracked
        update_running(*running, mean, variance, count, given.momentum)
    else:
        assert given.running_mean is not None
        assert given.running_var is not None
        mean, variance = given.running_mean[None], given.running_var[None]
    return normalise(x, mean, variance, given.weight, given.bias, given.residual, relu=given.relu, eps=given.eps)


def gradients(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    positive: Tensor | None,
    *,
    training: bool,
    eps: float,
) -> Gradients:
    """The backward pass in closed form.

    Args:
        gradient: Gradient of y, (B, C, H, W).
        x: The input, (B, C, H, W).
        mean, variance: (G, C); in evaluation the running ones, (1, C).
        weight: (C,), or None.
        positive: True where y > 0 or y is NaN, (B, C, H, W) bool; None without a ReLU.
        training: Whether mean and variance are computed from x, so that the gradient passes through them.
        eps: As in the forward pass.
    """
    dtype = wide(x.dtype)
    groups = len(mean)
    masked = gradient if positive is None else torch.where(positive, gradient, 0)
    z = _grouped(masked, groups)
    rstd = (variance.to(dtype) + eps).rsqrt()
    h = (_grouped(x, groups) - _each_group(mean.to(dtype))) * _each_group(rstd)
    of_bias, of_weight = z.sum(dim=_PLACES), (z * h).sum(dim=_PLACES)
    inner = z
    if training:
        count = x.numel() // (groups * x.shape[1])
        inner = z - _each_group(of_bias / count) - h * _each_group(of_weight / count)
    scale = rstd if weight is None else rstd * weight.to(dtype)
    of_x = (inner * _each_group(scale)).flatten(0, 1).to(x.dtype)
    return Gradients(of_x, masked, of_weight.sum(dim=0), of_bias.sum(dim=0))
