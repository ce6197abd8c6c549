"""Baseline of the loss with the cost of the released code.

Written from the published description to have the same costs: similarities and logits as whole B x K tensors, one
tensor of gathered vectors per type, types 5 and 6 in a Python loop over negatives, and the gradient by autograd. In
that loop it costs less: 7 or 8 operations for each negative, with one autograd call, where the released code has 12
or 13 for a finite difference. It uses PyTorch's random numbers, so its loss agrees approximately, not digit by digit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from synco_fast.kernels import Negatives

__all__ = ["baseline_loss"]


def baseline_loss(q: Tensor, k: Tensor, queue: Tensor, negatives: Negatives, *, temperature: float) -> Tensor:
    """Loss of each row, (B,), differentiable by autograd.

    Args:
        q, k: (B, D).
        queue: (K, D).
        negatives: The synthetic negatives; N must be at least 1.
        temperature: T.
    """
    rows, hard = len(q), negatives.hard
    positive = (q * k).sum(dim=1, keepdim=True)
    similarity = q @ queue.clone().detach().T
    chosen = similarity.detach().topk(hard, dim=1).indices
    fixed = q.detach()
    logits = [positive, similarity]

    def pick(count: int) -> Tensor:
        place = torch.randint(hard, (rows, count), device=q.device)
        return queue[chosen.gather(1, place)]

    def coefficient(count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, count, 1, device=q.device, dtype=q.dtype)

    def append(vectors: Tensor) -> None:
        logits.append(torch.einsum("bd,bnd->bn", q, normalize(vectors, dim=-1).detach()))

    if count := negatives.interpolated:
        t = coefficient(count, *negatives.interpolated_range)
        append(t * fixed[:, None] + (1 - t) * pick(count))
    if count := negatives.extrapolated:
        t = coefficient(count, *negatives.extrapolated_range)
        append(fixed[:, None] + t * (pick(count) - fixed[:, None]))
    if count := negatives.mixed:
        t = coefficient(count, *negatives.mixed_range)
        append(t * pick(count) + (1 - t) * pick(count))
    if count := negatives.noisy:
        vectors = pick(count)
        append(vectors + negatives.sigma * torch.randn_like(vectors))
    if count := negatives.perturbed:
        append(_along_gradients(fixed, pick(count), negatives.delta, sign=False))
    if count := negatives.adversarial:
        append(_along_gradients(fixed, pick(count), negatives.eta, sign=True))
    everything = torch.cat(logits, dim=1) / temperature
    target = torch.zeros(rows, dtype=torch.int64, device=q.device)
    return cross_entropy(everything, target, reduction="none")


def _along_gradients(q: Tensor, picked: Tensor, strength: float, *, sign: bool) -> Tensor:
    """Move each negative along the gradient of its similarity, with one autograd call for each negative."""
    moved = []
    for slot in range(picked.shape[1]):
        negative = picked[:, slot].clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((q * negative).sum(), negative)
        moved.append((negative + strength * (gradient.sign() if sign else gradient)).detach())
    return torch.stack(moved, dim=1)
