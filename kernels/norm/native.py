"""Grouped batch norm with add and ReLU by PyTorch's own kernels: the default until another form is proved faster.

On a CPU a group goes through all of its steps while it lies in the cache, each step in place, and the groups are
written one after another into the whole: no copy puts them together. Rounding is that of PyTorch's modules one after
another, bit for bit. Elsewhere the modules' calls are made one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Compute y, (B, C, H, W); arguments are those of `synco_fast.kernels.norm.batch_norm`, checked."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        # Only a cumulative mean reads the counter, and PyTorch's own module waits for it there as well.
        momentum = 1.0 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if not training:
        y = functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        return _in_place(y, residual, relu)
    each = None if running is None or groups == 1 else [value.repeat(groups, 1) for value in running]
    if each is None and running is not None:
        each = [value[None] for value in running]
    if _in_cache(x, weight, bias):
        y = _GroupByGroup.apply(x, weight, bias, residual, each, groups, relu, momentum, eps)
    else:
        parts = [
            functional.batch_norm(
                part,
                None if each is None else each[0][group],
                None if each is None else each[1][group],
                weight,
                bias,
                True,
                momentum,
                eps,
            )
            for group, part in enumerate(x.chunk(groups))
        ]
        y = _in_place(parts[0] if groups == 1 else torch.cat(parts), residual, relu)
    if each is not None and running is not None and groups > 1:
        for value, moved in zip(running, each, strict=True):
            value.copy_(moved.mean(dim=0))
    return y


def _in_cache(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's kernels that write into given memory serve these arguments."""
    wide = (torch.float32, torch.float64)
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and all(value is not None and value.dtype in wide for value in (weight, bias))


def _in_place(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


class _GroupByGroup(torch.autograd.Function):
    """Normalise, add and rectify a group, then the next. Groups lie one after another in memory, in any layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running: list[Tensor] | None,
        groups: int,
        relu: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalise x, (G b, C, H, W); ``running``, mean and variance of (G, C), are moved in place."""
        y = torch.empty_like(x)
        saved = torch.empty(2, groups, x.shape[1], dtype=weight.dtype)
        added = None if residual is None else residual.chunk(groups)
        for group, (part, target) in enumerate(zip(x.chunk(groups), y.chunk(groups), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                part,
                weight,
                bias,
                None if running is None else running[0][group],
                None if running is None else running[1][group],
                True,
                momentum,
                eps,
                out=target,
                save_mean=saved[0, group],
                save_invstd=saved[1, group],
            )
            _in_place(target, None if added is None else added[group], relu)
        ctx.save_for_backward(x, weight, saved, y if relu else None)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of weight and bias summed over the groups, and of the residual."""
        x, weight, saved, y = ctx.saved_tensors
        groups = saved.shape[1]
        of_x, of_both = torch.empty_like(x), torch.empty_like(saved)
        of_residual = None
        if ctx.needs_input_grad[3]:
            of_residual = gradient if y is None else torch.empty_like(gradient)
        outputs = None if y is None else y.chunk(groups)
        targets = None if of_residual is None or y is None else of_residual.chunk(groups)
        parts = zip(gradient.chunk(groups), x.chunk(groups), of_x.chunk(groups), strict=True)
        for group, (part, values, target) in enumerate(parts):
            if outputs is not None:
                masked = torch.empty_like(part) if targets is None else targets[group]
                torch.ops.aten.threshold_backward.grad_input(part, outputs[group], 0, grad_input=masked)
                part = masked
            torch.ops.aten.native_batch_norm_backward.out(
                part,
                values,
                weight,
                None,
                None,
                saved[0, group],
                saved[1, group],
                True,
                ctx.eps,
                [True, True, True],
                out0=target,
                out1=of_both[0, group],
                out2=of_both[1, group],
            )
        of_weight, of_bias = of_both.sum(dim=1)
        return of_x, of_weight, of_bias, of_residual, None, None, None, None, None
