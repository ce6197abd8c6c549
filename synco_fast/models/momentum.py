"""The key encoder: an exponential moving average of the query encoder."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["key_encoder_of", "momentum_update"]


def key_encoder_of(encoder: nn.Module) -> nn.Module:
    """A copy of the query encoder that learns nothing by gradient."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """Parameters of ``key`` become momentum * key + (1 - momentum) * query (MoCo, arXiv 1911.05722 eq. 2).

    Buffers are left alone: batch-norm statistics of the key encoder come from its own forward passes, as in MoCo.
    """
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)
