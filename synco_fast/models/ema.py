"""EMA: the key encoder as an exponential moving average of the query encoder."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from synco_fast.kernels import momentum_update
from synco_fast.kernels.momentum import MomentumBackend

__all__ = ["ema_update", "make_ema_copy"]


def make_ema_copy(encoder: nn.Module) -> nn.Module:
    """A copy of the query encoder without gradients."""
    return copy.deepcopy(encoder).requires_grad_(False)


def ema_update(
    key: nn.Module, query: nn.Module, momentum: float | Tensor, *, backend: MomentumBackend = "auto"
) -> None:
    """Parameters of ``key`` become momentum * key + (1 - momentum) * query (MoCo, arXiv 1911.05722 eq. 2).

    Buffers are not updated: batch-norm statistics of the key encoder come from its own forward passes, as in MoCo.

    Args:
        key, query: Networks of the same architecture.
        momentum: In [0, 1]. A scalar tensor lets a captured graph follow a schedule, at the cost of another copy of the
            parameters.
        backend: Of `synco_fast.kernels.momentum_update`.
    """
    momentum_update(key.parameters(), query.parameters(), momentum, backend=backend)
