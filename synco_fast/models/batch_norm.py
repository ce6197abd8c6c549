"""Split batch norm: per-group statistics, so that BN cannot leak positives (MoCo 3.3); also fused with add and ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from synco_fast.kernels.norm import NormBackend, batch_norm
from synco_fast.runtime.errors import ConfigError

__all__ = ["FusedBatchNorm2d", "SplitBatchNorm2d", "split_batch_norm"]


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of the batch, as if each group were on a device of its own.

    With a shuffled key batch, a query and its key are normalised in different groups, as in MoCo's ShuffleBN across
    devices (arXiv 1911.05722 section 3.3). Running statistics are the mean over
    the groups; evaluation is that of `torch.nn.BatchNorm2d`, with the same names of parameters and buffers.

    Args:
        features: C, channels of the input (B, C, H, W).
        groups: Number of groups; B must be a multiple of it in training.
        backend: Backend of `synco_fast.kernels.norm.batch_norm`.
        settings: Arguments of `torch.nn.BatchNorm2d`.
    """

    def __init__(self, features: int, groups: int, *, backend: NormBackend = "auto", **settings: Any) -> None:
        super().__init__(features, **settings)
        self.groups = groups
        self.backend: NormBackend = backend

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, groups: int, **settings: Any) -> SplitBatchNorm2d:
        """Convert ``norm``, sharing its parameters and buffers."""
        made = cls(
            norm.num_features,
            groups,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=False,
            track_running_stats=False,
            **settings,
        )
        made.affine, made.track_running_stats = norm.affine, norm.track_running_stats
        made._parameters.update(norm._parameters)
        made._buffers.update(norm._buffers)
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (B, C, H, W).

        Raises:
            ValueError: B is not a multiple of the number of groups, or a group has one value per channel.
        """
        if not self.training or self.groups == 1:
            return super().forward(x)
        return self._normalise(x, None, relu=False)

    def _normalise(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        tracked = self.num_batches_tracked if self.training else None
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            groups=self.groups,
            residual=residual,
            relu=relu,
            # Without running statistics, evaluation uses those of the batch, as PyTorch's module does.
            training=self.training or self.running_mean is None,
            momentum=self.momentum if self.running_mean is not None else 0.0,
            eps=self.eps,
            num_batches_tracked=tracked,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Settings in `repr`."""
        return f"{super().extra_repr()}, groups={self.groups}"


class FusedBatchNorm2d(SplitBatchNorm2d):
    """`SplitBatchNorm2d` fused with the residual add and the ReLU that follow it.

    Args:
        features, groups, backend, settings: As in `SplitBatchNorm2d`.
        relu: Whether a ReLU follows.
    """

    def __init__(self, features: int, groups: int, *, relu: bool = False, **settings: Any) -> None:
        super().__init__(features, groups, **settings)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise x, (B, C, H, W), add ``residual`` of the same shape, and apply the ReLU.

        Raises:
            ValueError: As `SplitBatchNorm2d.forward`, or the residual has another shape.
        """
        return self._normalise(x, residual, relu=self.relu)

    def extra_repr(self) -> str:
        """Settings in `repr`."""
        return f"{super().extra_repr()}, relu={self.relu}, backend={self.backend}"


def split_batch_norm(module: nn.Module, groups: int, backend: NormBackend = "auto") -> nn.Module:
    """Replace every `torch.nn.BatchNorm2d` in ``module`` by a `SplitBatchNorm2d`; weights are kept.

    Raises:
        ConfigError: The module has another kind of batch norm, which would still leak.
    """
    if groups == 1:
        return module
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, SplitBatchNorm2d.of(child, groups, backend=backend))
        elif isinstance(child, SplitBatchNorm2d):
            continue
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.BatchNorm1d):
            raise ConfigError(
                f"model.batch_norm_groups: found {groups}, expected 1 for this backbone, whose {name} is a "
                f"{type(child).__name__}"
            )
        else:
            split_batch_norm(child, groups, backend)
    return module
