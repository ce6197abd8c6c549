"""``evaluate knn``: weighted nearest neighbours on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from synco_fast.evaluation.cache import cached_features
from synco_fast.evaluation.context import Setting, check_unchanged, fingerprint, open_subject
from synco_fast.evaluation.knn import nearest, vote
from synco_fast.evaluation.ranks import joined, rank, sum_over_ranks, world
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.precision import resolve_device

__all__ = ["evaluate_knn"]

#: The k that the papers report.
PUBLISHED = (20, 200)


def evaluate_knn(
    path: Path,
    setting: Setting | None = None,
    *,
    neighbours: tuple[int, ...] | None = None,
    temperature: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Weighted kNN accuracy of a checkpoint's backbone (Wu et al., arXiv 1805.01978 section 3.4).

    Every training image is a neighbour to choose from, every held-out image is classified.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        setting: Source, folder, device.
        neighbours: Each k; by default 20, 200 and the run's own, as far as there are so many training images.
        temperature: Of the votes, by default the run's own (0.07).
        console: Where progress is shown.

    Returns:
        ``accuracies`` by k, ``knn`` (that of the run's own k, or of the first), ``chance``, and what was measured how.

    Raises:
        CheckpointError, DataError, ConfigError: The checkpoint cannot be read, the source has no labelled held-out
            split, or k is larger than the set.
    """
    setting = setting or Setting()
    with joined(resolve_device(setting.device)) as device:
        subject = open_subject(path, setting, device)
        own = subject.weights.config.evaluation
        temperature = own.temperature if temperature is None else temperature
        size = len(subject.train)
        wanted = neighbours or tuple(k for k in sorted({*PUBLISHED, own.neighbours}) if k <= size)
        if not wanted or max(wanted) > size:
            raise ConfigError(
                f"neighbours: found {max(wanted, default=min(PUBLISHED))}, expected up to {size}, the training images"
            )
        before = fingerprint(subject.backbone)
        bank = cached_features(subject, subject.train, "training images", console)
        queries = cached_features(subject, subject.held_out, "held-out images", console).load()
        mine = slice(rank(), None, world())
        labels = torch.cat([part.labels for part in bank]).to(device)
        similarity, whose = nearest(
            (part.values for part in bank if len(part.labels)), queries.values[mine].to(device), max(wanted)
        )
        accuracies = {}
        for k in wanted:
            predicted = vote(similarity[:, :k], labels[whose[:, :k]], classes=subject.classes, temperature=temperature)
            right = (predicted == queries.labels[mine].to(device)).sum()
            accuracies[str(k)] = int(sum_over_ranks(right)) / len(queries.labels)
        first = str(own.neighbours) if own.neighbours in wanted else str(wanted[0])
        check_unchanged(subject, before)
        return subject.result(
            "knn",
            {f"kNN, k {k}": accuracy for k, accuracy in accuracies.items()},
            knn=accuracies[first],
            neighbours=list(wanted),
            accuracies=accuracies,
            temperature=temperature,
            bank=len(labels),
            queries=len(queries.labels),
            backbone_unchanged=True,
        )
