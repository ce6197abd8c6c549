"""Features of a whole split under a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import PipelineName, normalise
from synco_fast.data.pipelines.build import evaluation_batches
from synco_fast.data.sources.open import Split
from synco_fast.runtime.errors import DataError

__all__ = ["Features", "extract_features", "spread"]


@dataclass(frozen=True)
class Features:
    """Features and labels of the images that could be read.

    Attributes:
        values: (n, F) float32 on the CPU.
        labels: (n,) int64.
        broken: By number of an image that could not be read, why.
        numbers: Which image of the split each row is, (n,) int64.
    """

    values: Tensor
    labels: Tensor
    broken: dict[int, str]
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def spread(length: int, limit: int | None) -> list[int]:
    """At most ``limit`` whole numbers below ``length``, evenly spread: a subset that takes from every class folder."""
    if limit is None or limit >= length:
        return list(range(length))
    return [place * length // limit for place in range(limit)]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    split: Split,
    recipe: Recipe,
    *,
    device: torch.device,
    batch: int = 256,
    workers: int | None = None,
    pipeline: PipelineName = "auto",
    limit: int | None = None,
    numbers: Iterable[int] | None = None,
    labelled: bool = True,
    tick: Callable[[int], None] = lambda done: None,
) -> Features:
    """Run a split's central crops through the backbone in evaluation mode, in float32; its mode is restored.

    Args:
        backbone: Images (b, 3, H, W) to features (b, F).
        split: Labelled images.
        recipe: Size and normalisation.
        device: Where the backbone is.
        batch: Images at a time.
        workers: Decoding processes.
        pipeline: ``data.pipeline`` of the run, which says whether DALI decodes on a GPU.
        limit: Take at most so many images, evenly spread.
        numbers: Take these images instead; where none of them can be read, the features are empty.
        labelled: Whether labels must be there; where they need not be and are not, they are -1.
        tick: Called with the number of images of each batch.

    Raises:
        DataError: The split has no labels, or no image of it can be read.
    """
    if split.labels is None and labelled:
        raise DataError(f"data: found no class folders beside {split.name(0)}, expected one folder a class for kNN")
    wanted = spread(len(split), limit) if numbers is None else list(numbers)
    loader = evaluation_batches(
        split, recipe, batch=batch, pipeline=pipeline, device=device, workers=workers, numbers=wanted
    )
    was_training = backbone.training
    backbone.eval()
    values: list[Tensor] = []
    found: list[Tensor] = []
    broken: dict[int, str] = {}
    try:
        for images, indices, failed in loader:
            broken |= failed
            if len(images):
                values.append(backbone(normalise(images.to(device), recipe)).float().cpu())
                found.append(indices)
            tick(len(images))
    finally:
        backbone.train(was_training)
    if not values and numbers is None:
        raise DataError(f"data: found no readable image beside {split.name(0)}")
    if not values:
        empty = torch.empty(0, dtype=torch.int64)
        return Features(torch.empty(0, 0), empty, broken, empty)
    read = torch.cat(found)
    labels = torch.full_like(read, -1) if split.labels is None else torch.from_numpy(split.labels)[read]
    return Features(torch.cat(values), labels, broken, read)
