"""Grouped batch norm with add and ReLU by PyTorch's own kernels: the default until another backend is proved faster.

On a CPU, one group of a large x goes through all steps in place while it is in the cache. The groups are written
directly into the output, so they need no concatenation. The result equals that of PyTorch's modules in sequence, bit
for bit. On other devices the functions of these modules are called in sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from synco_fast.kernels.norm.arguments import Arguments

__all__ = ["batch_norm"]

#: Below this size x, in bytes, stays in the CPU's caches anyway, and fewer calls for all groups together are faster.
CACHED = 4 << 20
#: From this size of x, in bytes, add and ReLU are faster while a group is in the cache; below it, fewer calls are.
APART = 16 << 20


def batch_norm(given: Arguments) -> Tensor:
    """Compute y, (B, C, H, W)."""
    x, weight, bias, momentum, tracked = given.x, given.weight, given.bias, given.momentum, given.num_batches_tracked
    groups, eps = given.groups, given.eps
    if given.training and tracked is not None:
        tracked.add_(1)
    if momentum is None:
        # Only a cumulative mean reads the counter on the host. PyTorch's own module waits for it there, too.
        momentum = 1.0 / float(tracked) if given.training and tracked is not None else 0.0
    running = given.running_mean, given.running_var
    if not given.training:
        y = functional.batch_norm(x, *running, weight, bias, False, momentum, eps)
        return _in_place(y, given.residual, given.relu)
    momenta = _momenta(momentum, groups)
    if _group_by_group(x, weight, bias):
        return _GroupByGroup.apply(x, weight, bias, given.residual, running, given.relu, momenta, eps)  # type: ignore[no-any-return]
    parts = [
        functional.batch_norm(part, *running, weight, bias, True, share, eps)
        for part, share in zip(x.chunk(groups), momenta, strict=True)
    ]
    return _in_place(parts[0] if groups == 1 else torch.cat(parts), given.residual, given.relu)


def _momenta(momentum: float, groups: int) -> list[float]:
    """The momentum of each group: groups in sequence then update the running statistics as their mean does.

    With momentum m / (G - (G - g) m) for group g = 1..G, every group has the weight m / G in the end.
    """
    return [momentum / (groups - (groups - number) * momentum) for number in range(1, groups + 1)]


def _group_by_group(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether one group at a time is faster, and PyTorch's `out=` kernels support these arguments."""
    wide = (torch.float32, torch.float64)
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and x.nbytes > CACHED and all(value is not None and value.dtype in wide for value in (weight, bias))


def _in_place(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


class _GroupByGroup(torch.autograd.Function):
    """Norm, add and ReLU, one group at a time. Groups are contiguous in memory, in any layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        relu: bool,
        momenta: list[float],
        eps: float,
    ) -> Tensor:
        """Normalise x, (G b, C, H, W), and update ``running`` (mean and variance) in place, with G ``momenta``."""
        groups, apart = len(momenta), x.nbytes > APART
        y = torch.empty_like(x)
        saved = torch.empty(2, groups, x.shape[1], dtype=weight.dtype)
        added = None if residual is None else residual.chunk(groups)
        for group, (part, target) in enumerate(zip(x.chunk(groups), y.chunk(groups), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                part,
                weight,
                bias,
                *running,
                True,
                momenta[group],
                eps,
                out=target,
                save_mean=saved[0, group],
                save_invstd=saved[1, group],
            )
            if apart:
                _in_place(target, None if added is None else added[group], relu)
        if not apart:
            _in_place(y, residual, relu)
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
        apart = y is not None and x.nbytes > APART
        # The gradient where y is positive, which is also that of the residual. The next group reuses the buffer.
        masked = gradient
        if y is not None:
            keep = ctx.needs_input_grad[3] or not apart
            masked = torch.empty_like(gradient if keep else gradient.chunk(groups)[0])
            if not apart:
                torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=masked)
        targets = masked.chunk(groups) if len(masked) == len(gradient) else (masked,) * groups
        outputs = y.chunk(groups) if apart else None
        parts = zip(gradient.chunk(groups), targets, x.chunk(groups), of_x.chunk(groups), strict=True)
        for group, (incoming, part, values, target) in enumerate(parts):
            if outputs is not None:
                torch.ops.aten.threshold_backward.grad_input(incoming, outputs[group], 0, grad_input=part)
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
        of_residual = masked if ctx.needs_input_grad[3] else None
        return of_x, of_weight, of_bias, of_residual, None, None, None, None
