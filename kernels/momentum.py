"""EMA (momentum) update of the key encoder: k <- m k + (1 - m) q for all parameters (MoCo, equation 2)."""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from synco_fast.kernels.triton.momentum import Plan

__all__ = ["MomentumBackend", "momentum_update"]

MomentumBackend = Literal["auto", "foreach", "triton"]
Pairs = tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def momentum_update(
    params_k: Iterable[Tensor],
    params_q: Iterable[Tensor],
    m: float | Tensor,
    *,
    backend: MomentumBackend = "auto",
) -> None:
    """Move the tensors of the key encoder towards those of the query encoder, in place.

    It computes k + (1 - m) (q - k), so k stays exactly the same where it equals q. Autograd records nothing. Integer
    tensors, such as the batch counters of normalisation layers, are copied.

    Args:
        params_k: Tensors to update: parameters, and buffers if the method averages them too.
        params_q: Their counterparts, in the same order, with the same shapes, dtypes and devices.
        m: The momentum, in [0, 1]: 1 keeps params_k. 0 copies params_q exactly only if it is a number and foreach
            computes; otherwise the subtraction and the sum are rounded. A 0-dimensional tensor on their device lets a
            captured CUDA graph follow a schedule; its value is not checked.
        backend: ``"foreach"`` uses PyTorch's foreach functions: one pass over the parameters if m is a number, three
            passes and a copy if it is a tensor. ``"triton"`` takes one pass in one or two launches. It runs on CUDA and
            has not been timed on a GPU yet. It keeps tables of addresses, which must exist before a CUDA graph is
            captured: run it once before. Tensors that it cannot take go to foreach, with one warning. ``"auto"`` is
            foreach; a training run validates the kernel on its own device and then uses it.

    Raises:
        ValueError: m is out of range, the lists differ in length, a pair differs in shape, or the backend is unknown.
        TypeError: A pair differs in dtype or device.
    """
    keys, queries = list(params_k), list(params_q)
    if isinstance(m, Tensor):
        if m.dim() or not m.is_floating_point():
            raise ValueError(f"m: found {m.dtype} of shape {tuple(m.shape)}, expected a 0-dimensional float")
    elif isinstance(m, bool) or not (isinstance(m, (int, float)) and math.isfinite(m) and 0 <= m <= 1):
        raise ValueError(f"m: found {m!r}, expected a number from 0 to 1")
    if backend not in get_args(MomentumBackend):
        raise ValueError(f"backend: found {backend!r}, expected {', '.join(get_args(MomentumBackend))}")
    if len(keys) != len(queries):
        raise ValueError(f"params_q: found {len(queries)} tensors, expected {len(keys)}, as many as params_k")
    averaged: dict[tuple[torch.device, torch.dtype], Pairs] = defaultdict(lambda: ([], []))
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
    for pairs in averaged.values():
        if backend == "triton":
            pairs = _by_triton(pairs, 1 - m)
        if not pairs[0]:
            continue
        if isinstance(m, Tensor):
            difference = torch._foreach_sub(pairs[1], pairs[0])
            torch._foreach_mul_(difference, 1 - m)
            torch._foreach_add_(pairs[0], difference)
        else:
            torch._foreach_lerp_(*pairs, 1 - m)


def _by_triton(pairs: Pairs, weight: float | Tensor) -> Pairs:
    """Update the pairs that the kernel can take, and return the others."""
    try:
        from synco_fast.kernels.triton import momentum
    except ImportError as error:
        _note(f"Triton cannot be imported ({error})")
        return pairs
    served: Pairs = ([], [])
    left: Pairs = ([], [])
    for pair in zip(*pairs, strict=True):
        reason = momentum.unserved(*pair)
        if reason:
            _note(reason)
        for side, tensor in zip(left if reason else served, pair, strict=True):
            side.append(tensor)
    if served[0]:
        momentum.update(_plan(*served), weight)
    return left


#: The newest last. Encoders keep their addresses, so a run needs one plan for each dtype.
_plans: dict[tuple[int, ...], Plan] = {}


def _plan(targets: list[Tensor], sources: list[Tensor]) -> Plan:
    """The plan for these tensors, cached by their addresses."""
    from synco_fast.kernels.triton.momentum import Plan, addresses

    # The allocator may reuse freed addresses for a tensor of another dtype or device; the key holds neither.
    key = addresses(targets, sources)
    plan = _plans.pop(key, None)
    if plan is None or (plan.dtype, plan.device) != (targets[0].dtype, targets[0].device):
        plan = Plan(targets, sources)
    _plans[key] = plan
    while len(_plans) > 8:
        del _plans[next(iter(_plans))]
    return plan


@functools.cache
def _note(reason: str) -> None:
    """Warn once why the kernel is not used."""
    warnings.warn(f"the momentum update uses foreach: {reason}", stacklevel=4)
