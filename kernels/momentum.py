"""The momentum update of the key encoder: k <- m k + (1 - m) q over all parameters (MoCo, equation 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["momentum_update"]


@torch.no_grad()
def momentum_update(params_k: Iterable[Tensor], params_q: Iterable[Tensor], m: float) -> None:
    """Move each tensor of the key encoder a little towards its counterpart, in place.

    A few launches whatever the number of tensors, by `torch._foreach_lerp_`, which takes the difference first: where k
    equals q it stays as it is, bit for bit. Nothing is recorded for autograd. Whole-number tensors, such as the batch
    counters of normalisation layers, are copied.

    Args:
        params_k: What is updated: parameters, and buffers where the method wants them averaged too.
        params_q: Their counterparts, in the same order, with the same shapes, dtypes and devices.
        m: The momentum, in [0, 1]: 1 leaves params_k, 0 copies params_q.

    Raises:
        ValueError: m is out of range, or the lists differ in length, or a pair in shape.
        TypeError: A pair differs in dtype or device.
    """
    keys, queries = list(params_k), list(params_q)
    if not (isinstance(m, (int, float)) and math.isfinite(m) and 0 <= m <= 1):
        raise ValueError(f"m: found {m!r}, expected a number from 0 to 1")
    if len(keys) != len(queries):
        raise ValueError(f"params_q: found {len(queries)} tensors, expected {len(keys)}, as many as params_k")
    averaged: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for number, (k, q) in enumerate(zip(keys, queries, strict=True)):
        if k.shape != q.shape:
            raise ValueError(
                f"params_q[{number}]: found shape {tuple(q.shape)}, expected {tuple(k.shape)}, as in params_k"
            )
        if k.dtype != q.dtype or k.device != q.device:
            raise TypeError(f"params_q[{number}]: found {q.dtype} on {q.device}, expected {k.dtype} on {k.device}")
        if k.is_floating_point():
            group = averaged[k.device, k.dtype]
            group[0].append(k.detach())
            group[1].append(q.detach())
        else:
            k.copy_(q)
    for targets, sources in averaged.values():
        torch._foreach_lerp_(targets, sources, 1 - m)
