"""Weighted kNN on frozen features: the vote, ``evaluate knn``, and the periodic kNN of a run.

Wu et al., arXiv 1805.01978 section 3.4: a neighbour of cosine similarity c has exp(c / temperature) votes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.open import Source
from synco_fast.evaluation.context import (
    EvalOptions,
    check_unchanged,
    for_features,
    join_job,
    labelled_splits,
    open_context,
    weights_sha256,
)
from synco_fast.evaluation.features import cached_features, extract_features
from synco_fast.evaluation.monitor import feature_figures
from synco_fast.runtime.distributed import rank, sum_over_ranks, world
from synco_fast.runtime.errors import ConfigError

__all__ = [
    "KnnResult",
    "PeriodicKnn",
    "evaluate_knn",
    "knn_accuracy",
    "knn_predict",
    "nearest",
    "periodic_knn",
]

#: The values of k in the papers.
PUBLISHED = (20, 200)
#: Queries compared with the bank at a time.
_QUERIES = 1024


def nearest(banks: Iterable[Tensor], queries: Tensor, k: int, *, key: str = "k") -> tuple[Tensor, Tensor]:
    """The k nearest features of a bank given in parts, of which only one need be in memory.

    Args:
        banks: Features, (n_i, F) each; normalised here and moved to the device of the queries.
        queries: (m, F); normalised here, compared a thousand at a time.
        k: At most the sum of the n_i.
        key: The name of k in messages.

    Returns:
        Cosine similarities, (m, k), largest first, and the neighbours' indices, (m, k) int64, counted over all
        parts.

    Raises:
        ConfigError: There are fewer than k features in the bank.
    """
    queries = normalize(queries, dim=1)
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    seen = 0
    for part in banks:
        bank = normalize(part.to(queries.device), dim=1)
        keep = min(k, seen + len(bank))
        parts = []
        for chunk, old, old_index in zip(
            queries.split(_QUERIES), best.split(_QUERIES), index.split(_QUERIES), strict=True
        ):
            new, places = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
            both = torch.cat([old, new], dim=1)
            top, chosen = both.topk(keep, dim=1)
            parts.append((top, torch.cat([old_index, places + seen], dim=1).gather(1, chosen)))
        best, index = torch.cat([top for top, _ in parts]), torch.cat([places for _, places in parts])
        seen += len(bank)
    if k > seen:
        raise ConfigError(f"{key}: found {k}, expected up to {seen}, the images to choose from")
    return best, index


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Predicted classes, (m,) int64, by votes of exp(similarity / temperature).

    Args:
        similarity: Similarities of each query's neighbours, (m, k).
        labels: Labels of the same neighbours, (m, k) int64.
        classes: Number of classes.
        temperature: Temperature of the votes.
    """
    votes = similarity.new_zeros(len(similarity), classes)
    # Subtracting the largest similarity changes no winner and avoids overflow at a small temperature.
    weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    return votes.scatter_add_(1, labels, weights).argmax(dim=1)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, classes: int, k: int, temperature: float, key: str = "k"
) -> Tensor:
    """Classify by the votes of the k nearest neighbours.

    Args:
        bank: Features with known labels, (n, F); normalised here.
        bank_labels: (n,) int64.
        queries: Features to classify, (m, F), on the device of the bank; taken a thousand at a time.
        classes: Number of classes.
        k: At most n.
        temperature: Temperature of the votes.
        key: The name of k in messages.

    Returns:
        Predicted classes, (m,) int64.

    Raises:
        ConfigError: There are fewer than k features in the bank.
    """
    similarity, index = nearest([bank], queries, k, key=key)
    return vote(similarity, bank_labels[index], classes=classes, temperature=temperature)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int, temperature: float, key: str = "k"
) -> float:
    """The fraction of ``queries`` whose class `knn_predict` finds, in [0, 1]."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    predicted = knn_predict(bank, bank_labels, queries, classes=classes, k=k, temperature=temperature, key=key)
    return float((predicted == labels).double().mean())


def evaluate_knn(
    path: Path,
    options: EvalOptions | None = None,
    *,
    k: tuple[int, ...] | None = None,
    temperature: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Weighted kNN accuracy of a checkpoint's backbone, on features extracted once and cached.

    All training images form the bank; all held-out images are classified.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        options: Source, folder, device; precision ``auto`` is fp32, as in a run's periodic kNN.
        k: Several; by default 20, 200 and the run's own, as far as there are so many training images.
        temperature: Temperature of the votes; the run's own (0.07) by default.
        console: Where progress is shown.

    Returns:
        ``accuracies`` by k, ``knn`` (that of the run's own k, or of the first), ``chance``, and the protocol.

    Raises:
        CheckpointError, DataError, ConfigError: The checkpoint cannot be read, the source has no labelled held-out
            split, or k is larger than the set.
    """
    options = for_features(options or EvalOptions())
    with join_job(options.device) as device:
        context = open_context(path, options, device)
        own = context.weights.config.evaluation
        temperature = own.temperature if temperature is None else temperature
        size = len(context.train)
        wanted = k or tuple(each for each in sorted({*PUBLISHED, own.k}) if each <= size)
        if not wanted or max(wanted) > size:
            raise ConfigError(
                f"k: found {max(wanted, default=min(PUBLISHED))}, expected up to {size}, the training images"
            )
        before = weights_sha256(context.backbone)
        bank = cached_features(context, context.train, "training images", console)
        queries = cached_features(context, context.held_out, "held-out images", console).load()
        mine = slice(rank(), None, world())
        labels = torch.cat([part.labels for part in bank]).to(device)
        similarity, index = nearest(
            (part.values for part in bank if len(part.labels)), queries.values[mine].to(device), max(wanted)
        )
        accuracies = {}
        for each in wanted:
            predicted = vote(
                similarity[:, :each], labels[index[:, :each]], classes=context.classes, temperature=temperature
            )
            right = (predicted == queries.labels[mine].to(device)).sum()
            accuracies[str(each)] = int(sum_over_ranks(right)) / len(queries.labels)
        first = str(own.k) if own.k in wanted else str(wanted[0])
        check_unchanged(context.backbone, before)
        return context.result(
            "knn",
            {f"kNN, k {each}": accuracy for each, accuracy in accuracies.items()},
            knn=accuracies[first],
            k=list(wanted),
            accuracies=accuracies,
            temperature=temperature,
            bank=len(labels),
            queries=len(queries.labels),
            backbone_unchanged=True,
        )


@dataclass(frozen=True)
class KnnResult:
    """Accuracy and chance level in [0, 1], images in the bank, images classified, and why some could not be read.

    ``figures`` describe the features of the bank, see `feature_figures`.
    """

    accuracy: float
    chance: float
    bank: int
    queries: int
    corrupt: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)


def periodic_knn(
    backbone: nn.Module,
    source: Source,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    device: torch.device,
    pipeline: PipelineName = "auto",
    workers: int | None = None,
) -> KnnResult:
    """The kNN accuracy of a backbone during training, in float32, by the configuration.

    It is 0 where a feature is NaN or infinite: the trainer knows better than an evaluation why, and what to advise.

    Args:
        backbone: Images (b, 3, H, W) to features (b, F), on ``device``.
        source: Both splits.
        recipe: Size and normalisation.
        evaluation: k, temperature, and how many images of each split.
        device: Where features are computed and compared.
        pipeline: ``data.pipeline`` of the run.
        workers: Decoding processes.

    Raises:
        DataError: The source has no held-out split or no labels.
        ConfigError: k is larger than the number of neighbours to choose from.
    """
    train, held_out = labelled_splits(source)
    bank, queries = (
        extract_features(
            backbone,
            split,
            recipe,
            device=device,
            batch=evaluation.batch,
            pipeline=pipeline,
            workers=workers,
            limit=limit,
            finite=False,
        )
        for split, limit in ((train, evaluation.train_images), (held_out, evaluation.images))
    )
    accuracy = knn_accuracy(
        bank.values.to(device),
        bank.labels.to(device),
        queries.values.to(device),
        queries.labels.to(device),
        k=evaluation.k,
        temperature=evaluation.temperature,
        key="evaluation.k",
    )
    finite = all(bool(part.values.isfinite().all()) for part in (bank, queries))
    return KnnResult(
        accuracy if finite else 0.0,
        chance=1 / int(bank.labels.unique().numel()),
        bank=len(bank.labels),
        queries=len(queries.labels),
        corrupt=(*bank.corrupt.values(), *queries.corrupt.values()),
        figures=feature_figures(bank.values.to(device)),
    )


class PeriodicKnn:
    """`periodic_knn` and a check before the first step, as one object, which is passed to the trainer."""

    def check(self, evaluation: EvaluationConfig, source: Source) -> None:
        """Refuse a source on which it cannot work.

        Raises:
            DataError: There is no held-out split, or a split has no labels.
            ConfigError: k is larger than the number of training images to choose from.
        """
        hint = " for kNN; --evaluation.source SOURCE takes other images, --evaluation.every 0 pretrains without kNN"
        train, _ = labelled_splits(source, hint)
        bank = min(len(train), evaluation.train_images or len(train))
        if evaluation.k > bank:
            raise ConfigError(f"evaluation.k: found {evaluation.k}, expected up to {bank}, the images to choose from")

    def __call__(
        self,
        backbone: nn.Module,
        source: Source,
        recipe: Recipe,
        evaluation: EvaluationConfig,
        *,
        device: torch.device,
        pipeline: PipelineName,
        workers: int | None,
    ) -> KnnResult:
        """As `periodic_knn`."""
        return periodic_knn(backbone, source, recipe, evaluation, device=device, pipeline=pipeline, workers=workers)
