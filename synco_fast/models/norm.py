"""Batch norm whose statistics do not tell which key belongs to which query."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from synco_fast.errors import ConfigError

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
            raise ValueError(f"x: found a batch of {len(x)}, allowed a multiple of {self.groups} groups")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        means, variances = self.running_mean.repeat(self.groups, 1), self.running_var.repeat(self.groups, 1)
        momentum = 0.0 if self.momentum is None else self.momentum
        parts = [
            batch_norm(part, mean, variance, self.weight, self.bias, True, momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.groups), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        return torch.cat(parts)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{super().extra_repr()}, groups={self.groups}"


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
                f"model.batch_norm_groups: found {groups}, allowed 1 for this backbone, whose {name} is a "
                f"{type(child).__name__}"
            )
        else:
            split_batch_norm(child, groups)
    return module
