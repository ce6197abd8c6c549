"""Other implementations of parts of the loss: matrix product with top-k, and fused linear cross-entropy.

None of them computes the whole loss. A product with top-k and cross-entropy has the queue's negatives and the N hardest
of them, but no synthetic ones, and its order among ties is undefined. Fused linear cross-entropy has neither hard nor
synthetic negatives. Its weight is the keys of the batch followed by the queue, so the other keys of the batch are
negatives, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from synco_fast.runtime.errors import UserError

__all__ = ["linear_cross_entropy", "product_loss", "top_k"]

#: Top-N of each row: values and indices, (B, N) each.
TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
#: Package and function of each subject.
_PACKAGES = {"flashinfer": ("flashinfer-python", "flashinfer"), "liger": ("liger-kernel", "liger_kernel.transformers")}


def top_k(name: str) -> TopK:
    """A top-N function, unsorted if the package allows it.

    Args:
        name: ``torch`` or ``flashinfer``.

    Raises:
        UserError: Its package is not installed.
    """
    if name == "torch":
        return _torch_top_k
    found: TopK = _from_package("flashinfer", "top_k")
    return found


def _torch_top_k(similarity: Tensor, hard: int) -> tuple[Tensor, Tensor]:
    values, indices = similarity.topk(hard, dim=1, sorted=False)
    return values, indices


def product_loss(choose: TopK, *, hard: int, temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """MoCo's loss of each row from whole tensors, plus the selection of the N hardest keys.

    Args:
        choose: From `top_k`.
        hard: N.
        temperature: T.

    Returns:
        A function of q, k (B, D) and queue (K, D) that returns the loss, (B,).
    """

    def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        similarity = q @ queue.T
        choose(similarity.detach(), hard)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), similarity], dim=1) / temperature
        target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        return functional.cross_entropy(logits, target, reduction="none")

    return loss


def linear_cross_entropy(name: str, *, temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Fused linear cross-entropy over the keys of the batch and the queue, without a logits tensor.

    Args:
        name: ``torch`` or ``liger``.
        temperature: T.

    Returns:
        A function of q, k (B, D) and queue (K, D) that returns the mean loss.

    Raises:
        UserError: The package is not installed, or this version of PyTorch has no such function.
    """
    if name == "liger":
        module = _from_package("liger", "LigerFusedLinearCrossEntropyLoss")()

        def fused(q: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            found: Tensor = module(weight, q, target)
            return found
    else:
        own = getattr(functional, "linear_cross_entropy", None)
        if own is None:
            raise UserError(f"backends: found torch {torch.__version__} without linear_cross_entropy, expected 2.14")

        def fused(q: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            found: Tensor = own(q, weight, target)
            return found

    def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        weight = torch.cat([k, queue])
        return fused(q / temperature, weight, torch.arange(len(q), device=q.device))

    return loss


def _from_package(name: str, function: str) -> Callable[..., Any]:
    package, module = _PACKAGES[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"backends: found no {function} of {package}, expected it installed ({error})") from error
    return found
