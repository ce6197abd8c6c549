"""The kNN evaluation of a backbone on a source, as the configuration describes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.sources.open import Source
from synco_fast.evaluation.features import extract_features
from synco_fast.evaluation.knn import knn_accuracy
from synco_fast.runtime.errors import DataError

__all__ = ["KnnResult", "evaluate_backbone"]


@dataclass(frozen=True)
class KnnResult:
    """Accuracy and chance level in [0, 1]; how many images were neighbours and how many classified; what was broken."""

    accuracy: float
    chance: float
    bank: int
    queries: int
    broken: tuple[str, ...]


def evaluate_backbone(
    backbone: nn.Module,
    source: Source,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    device: torch.device,
    workers: int | None = None,
) -> KnnResult:
    """Classify the held-out split by its nearest neighbours among the training images.

    Args:
        backbone: Images (b, 3, H, W) to features (b, F), on ``device``.
        source: Where both splits come from.
        recipe: Size and normalisation.
        evaluation: k, temperature, and how many images of each split.
        device: Where features are made and compared.
        workers: Decoding processes.

    Raises:
        DataError: The source has no held-out split or no labels.
        ConfigError: k is larger than the number of neighbours to choose from.
    """
    if source.validation is None:
        raise DataError(f"data: found no held-out split in {source.spec}, expected train/ and val/ with class folders")
    bank, queries = (
        extract_features(backbone, split, recipe, device=device, batch=evaluation.batch, workers=workers, limit=limit)
        for split, limit in ((source.train, evaluation.train_images), (source.validation, evaluation.images))
    )
    accuracy = knn_accuracy(
        bank.values.to(device),
        bank.labels.to(device),
        queries.values.to(device),
        queries.labels.to(device),
        neighbours=evaluation.neighbours,
        temperature=evaluation.temperature,
    )
    return KnnResult(
        accuracy,
        chance=1 / int(bank.labels.unique().numel()),
        bank=len(bank.labels),
        queries=len(queries.labels),
        broken=(*bank.broken.values(), *queries.broken.values()),
    )
