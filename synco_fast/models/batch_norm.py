"""Batch norm whose statistics do not tell which key belongs to which query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm

from synco_fast.runtime.errors import ConfigError

__all__ = ["SplitBatchNorm2d", "split_batch_norm"]


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of the batch, as if each group were on a device of its own.

    With the key batch shuffled before its forward pass, a query and its key are normalised in different company, which
    is what MoCo's ShuffleBN does across devices (arXiv 1911.05722 section 3.3). Running statistics are the mean over
    the groups; evaluation is that of `torch.nn.BatchNorm2d`, whose parameters and buffers this class shares by name.

    Args:
        features: C, channels of the input (B, C, H, W).
        groups: Number of groups; B must be a multiple of it in training.
        eps, momentum, affine: As in `torch.nn.BatchNorm2d`.
    """

    def __init__(
        self, features: int, groups: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__(features, eps, momentum, affine)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (B, C, H, W).

        Raises:
            ValueError: B is not a multiple of the number of groups.
        """
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"x: found a batch of {len(x)}, expected a multiple of {self.groups} groups")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 0.0 if self.momentum is None else self.momentum
        if torch.compiler.is_compiling():
            return self._as_one_formula(x, momentum)
        means, variances = self.running_mean.repeat(self.groups, 1), self.running_var.repeat(self.groups, 1)
        if x.device.type == "cpu" and self.weight is not None and self.weight.dtype in (torch.float32, torch.float64):
            out: Tensor = _InPlaces.apply(x, self.weight, self.bias, means, variances, momentum, self.eps)
        else:
            parts = zip(x.chunk(self.groups), means, variances, strict=True)
            out = torch.cat(
                [
                    batch_norm(part, mean, variance, self.weight, self.bias, True, momentum, self.eps)
                    for part, mean, variance in parts
                ]
            )
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        return out

    def _as_one_formula(self, x: Tensor, momentum: float) -> Tensor:
        """The same without a loop, for a compiler that makes two kernels of it."""
        assert self.running_mean is not None
        assert self.running_var is not None
        grouped = x.float().unflatten(0, (self.groups, -1))
        variance, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0, keepdim=True)
        out = (grouped - mean) * (variance + self.eps).rsqrt()
        if self.weight is not None:
            out = out * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        with torch.no_grad():
            each = grouped[0].numel() // grouped.shape[2]
            self.running_mean.lerp_(mean.flatten(1).view(self.groups, -1).mean(dim=0), momentum)
            unbiased = variance.view(self.groups, -1).mean(dim=0) * (each / max(1, each - 1))
            self.running_var.lerp_(unbiased, momentum)
        normalised: Tensor = out.flatten(0, 1).to(x.dtype)
        return normalised

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{super().extra_repr()}, groups={self.groups}"


class _InPlaces(torch.autograd.Function):
    """Batch norm of each group by PyTorch's own kernel, written to its place in the whole: no copy puts them together.

    The groups lie one after another in memory, in any layout. A formula over all of them at once is several times
    slower in eager mode, and PyTorch has no kernel for it that keeps the channels-last layout.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float
    ) -> Tensor:
        """Normalise x, (G b, C, H, W); ``means`` and ``variances``, (G, C), are the running ones and are moved."""
        groups, out = len(means), torch.empty_like(x)
        saved = torch.empty(2, groups, x.shape[1], dtype=weight.dtype)
        for group, (part, target) in enumerate(zip(x.chunk(groups), out.chunk(groups), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                part,
                weight,
                bias,
                means[group],
                variances[group],
                True,
                momentum,
                eps,
                out=target,
                save_mean=saved[0, group],
                save_invstd=saved[1, group],
            )
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, and those of weight and bias summed over the groups."""
        x, weight, saved = ctx.saved_tensors
        groups, of_x, of_both = saved.shape[1], torch.empty_like(x), torch.empty_like(saved)
        parts = zip(gradient.chunk(groups), x.chunk(groups), of_x.chunk(groups), strict=True)
        for group, (part, values, target) in enumerate(parts):
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
        return of_x, of_weight, of_bias, None, None, None, None


def split_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Replace every `torch.nn.BatchNorm2d` in ``module`` by one over ``groups`` groups; weights are kept.

    Raises:
        ConfigError: The module holds another kind of batch norm, which would go on leaking.
    """
    if groups == 1:
        return module
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            split = SplitBatchNorm2d(
                child.num_features, groups, eps=child.eps, momentum=child.momentum, affine=child.affine
            )
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.BatchNorm1d):
            raise ConfigError(
                f"model.batch_norm_groups: found {groups}, expected 1 for this backbone, whose {name} is a "
                f"{type(child).__name__}"
            )
        else:
            split_batch_norm(child, groups)
    return module
