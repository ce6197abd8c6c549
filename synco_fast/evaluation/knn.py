"""Weighted nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.runtime.errors import ConfigError

__all__ = ["knn_accuracy", "knn_predict", "nearest", "vote"]

#: Queries that are compared with the bank at a time.
_QUERIES = 1024


def nearest(banks: Iterable[Tensor], queries: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The nearest features of a bank that comes in parts, so that no more than one part need be in memory.

    Args:
        banks: Features, (n_i, F) each; normalised here and moved to the device of the queries.
        queries: (m, F); normalised here, compared a thousand at a time.
        neighbours: k, at most the sum of the n_i.

    Returns:
        Cosine similarities, (m, k), largest first, and whose they are, (m, k) int64, counted through all parts.

    Raises:
        ConfigError: There are fewer than k features in the bank.
    """
    queries = normalize(queries, dim=1)
    best = queries.new_empty(len(queries), 0)
    whose = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    seen = 0
    for part in banks:
        bank = normalize(part.to(queries.device), dim=1)
        keep = min(neighbours, seen + len(bank))
        parts = []
        for chunk, old, old_whose in zip(
            queries.split(_QUERIES), best.split(_QUERIES), whose.split(_QUERIES), strict=True
        ):
            new, places = (chunk @ bank.T).topk(min(neighbours, len(bank)), dim=1)
            both = torch.cat([old, new], dim=1)
            top, chosen = both.topk(keep, dim=1)
            parts.append((top, torch.cat([old_whose, places + seen], dim=1).gather(1, chosen)))
        best, whose = torch.cat([top for top, _ in parts]), torch.cat([places for _, places in parts])
        seen += len(bank)
    if neighbours > seen:
        raise ConfigError(f"neighbours: found {neighbours}, expected up to {seen}, the images to choose from")
    return best, whose


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Predicted classes, (m,) int64, by votes of exp(similarity / temperature).

    Args:
        similarity: Of each query's neighbours, (m, k).
        labels: Of the same neighbours, (m, k) int64.
        classes: How many classes there are.
        temperature: Of the votes.
    """
    votes = similarity.new_zeros(len(similarity), classes)
    # The largest similarity is taken out, which changes no winner and keeps a small temperature from overflowing.
    weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    return votes.scatter_add_(1, labels, weights).argmax(dim=1)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Classify by the votes of the nearest neighbours (Wu et al., arXiv 1805.01978 section 3.4).

    A neighbour of cosine similarity c has exp(c / temperature) votes.

    Args:
        bank: Features with known labels, (n, F); normalised here.
        bank_labels: (n,) int64.
        queries: Features to classify, (m, F), on the device of the bank; taken a thousand at a time.
        classes: How many classes there are.
        neighbours: k, at most n.
        temperature: Of the votes.

    Returns:
        Predicted classes, (m,) int64.

    Raises:
        ConfigError: There are fewer than k features in the bank.
    """
    if neighbours > len(bank):
        raise ConfigError(
            f"evaluation.neighbours: found {neighbours}, expected up to {len(bank)}, the images to choose from"
        )
    similarity, whose = nearest([bank], queries, neighbours)
    return vote(similarity, bank_labels[whose], classes=classes, temperature=temperature)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Share of ``queries`` whose class `knn_predict` finds, in [0, 1]."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    predicted = knn_predict(bank, bank_labels, queries, classes=classes, neighbours=neighbours, temperature=temperature)
    return float((predicted == labels).double().mean())
