"""Reference contrastive loss in plain PyTorch: every synthetic vector is materialised.

It follows the papers line by line, and every faster backend is compared with it. It runs in any floating dtype and
leaves the gradient to autograd.

Notation: q and k are B unit rows of D numbers. The queue holds K past keys. Q^N are the N queue keys most similar to a
query, and T is the temperature. With s the synthetic negatives, the loss of a row is InfoNCE over all of them::

    -log( exp(q.k / T) / ( exp(q.k / T) + sum_n exp(q.n / T) + sum_s exp(q.s / T) ) )
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.rng import Draw, draw

__all__ = ["Contrast", "Statistics", "contrast", "hard_negatives", "mean_of_finite", "synthesise"]


class Statistics(NamedTuple):
    """Statistics to log: one value per query, without gradient.

    Attributes:
        positive: q.k, (B,).
        hard: Mean of q.n over Q^N, (B,); NaN if N = 0 or a mask leaves no key.
        synthetic: Mean of q.s for each family, (B, F), in the order of the F families of `FAMILIES`; NaN for a family
            without negatives.
        rank: Number of negatives (queue keys and synthetic ones) more similar to q than k is, (B,) int64. Contrastive
            top-1 accuracy is the fraction of rows with rank 0.
        queue_rank: The same among queue keys only, (B,) int64. It is comparable between methods and across a warm-up.
        fallback: 1 if the threshold estimated for Q^N failed, so that the row was selected again from all its
            similarities, which is slower and equally exact; else 0. (B,) int32. Almost always 0 on ordinary features,
            always 1 on collapsed ones. The reference estimates no threshold, so it returns 0.
    """

    positive: Tensor
    hard: Tensor
    synthetic: Tensor
    rank: Tensor
    queue_rank: Tensor
    fallback: Tensor


class Contrast(NamedTuple):
    """The loss of each query, (B,), differentiable with respect to q, and the statistics."""

    loss: Tensor
    statistics: Statistics


def mean_of_finite(similarity: Tensor) -> Tensor:
    """Means over the last dimension that ignore NaN and the -inf of masked keys; NaN if nothing is left."""
    return similarity.masked_fill(similarity == -torch.inf, torch.nan).nanmean(dim=-1)


def hard_negatives(similarity: Tensor, hard: int) -> tuple[Tensor, Tensor]:
    """Q^N: the N queue keys with the largest similarity. Ties go to the smaller queue index.

    Args:
        similarity: q.n for every queue key, (B, K); -inf for masked keys.
        hard: N, at most K.

    Returns:
        Similarities and queue indices, (B, N) each, in ascending order of the index. If fewer than N keys are unmasked,
        masked ones fill the end. Positions in Q^N are drawn uniformly, so their order does not matter; this one needs
        no sort in the kernels.
    """
    index = similarity.argsort(dim=1, descending=True, stable=True)[:, :hard].sort(dim=1).values
    masked = similarity.gather(1, index).isneginf()
    index = index.gather(1, masked.to(torch.uint8).argsort(dim=1, stable=True))
    return similarity.gather(1, index), index


def synthesise(q: Tensor, hard: Tensor, negatives: Negatives, draws: dict[str, Draw]) -> dict[str, Tensor]:
    """The synthetic negatives of each query: unit length, without gradient.

    Args:
        q: Queries, (B, D).
        hard: Q^N as vectors, (B, N, D), in the order of `hard_negatives`.
        negatives: The description that ``draws`` was made for.
        draws: From `synco_fast.kernels.draw`.

    Returns:
        The vectors of each family by its name, (B, count, D).
    """
    q, hard = q.detach()[:, None], hard.detach()

    def picked(position: Tensor | None) -> Tensor | None:
        return None if position is None else hard.gather(1, position[..., None].expand(-1, -1, hard.shape[-1]))

    vectors = {}
    for family in negatives.active():
        drawn = draws[family.name]
        t = None if drawn.coefficient is None else drawn.coefficient[..., None]
        n_i, n_j = picked(drawn.first), picked(drawn.second)
        vectors[family.name] = normalize(family.vector(q, n_i, n_j, t, drawn.noise, negatives), dim=-1)
    return vectors


def contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    *,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Contrast:
    """The loss on checked arguments; `synco_fast.kernels.synthetic_contrast` describes them."""
    dtype = torch.promote_types(q.dtype, queue.dtype)
    q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)

    positive = (q * k).sum(dim=1, keepdim=True)
    similarity = q @ queue.T
    available = None
    if image_ids is not None and queue_ids is not None:
        same_image = image_ids[:, None] == queue_ids[None, :]
        similarity = similarity.masked_fill(same_image, -torch.inf)
        available = (~same_image).sum(dim=1)

    logits, families, hard_mean = [positive, similarity], {}, None
    if negatives.hard:
        hard_similarity, index = hard_negatives(similarity.detach(), negatives.hard)
        hard_mean = mean_of_finite(hard_similarity)
        draws = draw(
            negatives,
            q.shape[0],
            q.shape[1],
            seed=seed,
            step=step,
            first_row=first_row,
            available=available,
            device=q.device,
            dtype=dtype,
        )
        for name, vectors in synthesise(q, queue[index], negatives, draws).items():
            synthetic = torch.einsum("bd,bnd->bn", q, vectors)
            if available is not None:
                synthetic = synthetic.masked_fill(available[:, None] == 0, -torch.inf)
            logits.append(synthetic)
            families[name] = mean_of_finite(synthetic.detach())

    everything = torch.cat(logits, dim=1)
    loss = everything.div(temperature).logsumexp(dim=1) - positive.squeeze(1) / temperature

    absent = torch.full_like(loss.detach(), torch.nan)
    statistics = Statistics(
        positive=positive.detach().squeeze(1),
        hard=absent if hard_mean is None else hard_mean,
        synthetic=torch.stack([families.get(family.name, absent) for family in FAMILIES], dim=1),
        rank=(everything[:, 1:] > positive).sum(dim=1),
        queue_rank=(similarity > positive).sum(dim=1),
        fallback=torch.zeros(q.shape[0], dtype=torch.int32, device=q.device),
    )
    return Contrast(loss, statistics)
