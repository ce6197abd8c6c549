"""Weighted nearest-neighbour classification of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.errors import ConfigError

__all__ = ["knn_accuracy", "knn_predict"]


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
            f"evaluation.neighbours: found {neighbours}, allowed up to {len(bank)}, the images to choose from"
        )
    bank = normalize(bank, dim=1)
    predictions = []
    for chunk in normalize(queries, dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(neighbours, dim=1)
        votes = similarity.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Share of ``queries`` whose class `knn_predict` finds, in [0, 1]."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    predicted = knn_predict(bank, bank_labels, queries, classes=classes, neighbours=neighbours, temperature=temperature)
    return float((predicted == labels).double().mean())
