"""Features of a split under a frozen backbone, and their cache on disk in chunks, so that a killed job resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise
from synco_fast.data.pipelines.build import evaluation_batches
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.open import Split
from synco_fast.evaluation.context import EvalContext, progress, weights_sha256
from synco_fast.runtime.distributed import barrier, rank, world
from synco_fast.runtime.errors import DataError, DivergedError
from synco_fast.runtime.files import atomic_write

__all__ = ["CachedFeatures", "Features", "cached_features", "evenly_spaced", "extract_features"]

#: Images in a file: 128 MiB of ResNet-50's features.
CHUNK = 16384


@dataclass(frozen=True)
class Features:
    """Features and labels of the images that could be read.

    Attributes:
        values: (n, F) float32 on the CPU.
        labels: (n,) int64.
        corrupt: Reason by index, for images that could not be read.
        numbers: The split's index of each row's image, (n,) int64.
    """

    values: Tensor
    labels: Tensor
    corrupt: dict[int, str]
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def evenly_spaced(length: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices below ``length``, evenly spaced, so that every class folder is covered."""
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
    finite: bool = True,
    tick: Callable[[int], None] = lambda images: None,
) -> Features:
    """Run a split's central crops through the backbone in evaluation mode, then restore its mode.

    Args:
        backbone: Images (b, 3, H, W) to features (b, F).
        split: Labelled images.
        recipe: Size and normalisation.
        device: Device of the backbone.
        batch: Batch size.
        workers: Decoding processes.
        pipeline: ``data.pipeline`` of the run, which decides whether DALI decodes on a GPU.
        limit: At most so many images, evenly spaced.
        numbers: Only the images with these indices; if none can be read, the features are empty.
        labelled: Whether labels are required; otherwise a missing label is -1.
        finite: Whether features that are NaN or infinite are an error. One such row in the bank of a kNN would be a
            neighbour of every image.
        tick: Called with the number of images of each batch.

    Raises:
        DataError: The split has no labels, or no image of it can be read.
        DivergedError: A feature is NaN or infinite.
    """
    if split.labels is None and labelled:
        raise DataError(
            f"data: found no class folders or labels beside {split.name(0)}, expected one folder per class, or labels"
        )
    wanted = evenly_spaced(len(split), limit) if numbers is None else list(numbers)
    loader = evaluation_batches(
        split, recipe, batch=batch, pipeline=pipeline, device=device, workers=workers, numbers=wanted
    )
    was_training = backbone.training
    backbone.eval()
    values: list[Tensor] = []
    found: list[Tensor] = []
    corrupt: dict[int, str] = {}
    try:
        for images, indices, failed in loader:
            corrupt |= failed
            if len(images):
                values.append(backbone(normalise(images.to(device), recipe)).float().cpu())
                found.append(indices)
            tick(len(images))
    finally:
        backbone.train(was_training)
    if not values and numbers is None:
        raise DataError(f"data: found no readable image besides {split.name(0)}")
    if not values:
        empty = torch.empty(0, dtype=torch.int64)
        return Features(torch.empty(0, 0), empty, corrupt, empty)
    read, features = torch.cat(found), torch.cat(values)
    bad = read[~features.isfinite().flatten(1).all(dim=1)].tolist()
    if bad and finite:
        raise DivergedError(
            f"features: found NaN or infinity in those of {len(bad):,} of {len(read):,} images, such as "
            f"{split.name(bad[0])}, expected numbers; --precision fp32 helps where float16 is too small for them"
        )
    labels = torch.full_like(read, -1) if split.labels is None else torch.from_numpy(split.labels)[read]
    return Features(features, labels, corrupt, read)


@dataclass(frozen=True)
class CachedFeatures:
    """The features of a split in chunks on disk.

    Attributes:
        files: In order of the images.
    """

    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[Features]:
        for file in self.files:
            found = _read(file)
            if found is None:
                raise DataError(f"{file}: found features that cannot be read; --fresh extracts them again")
            yield found

    def load(self) -> Features:
        """Load all of them into memory.

        Raises:
            DataError: No image of the split could be read.
        """
        chunks = [chunk for chunk in self if len(chunk.labels)]
        if not chunks:
            raise DataError("data: found no readable image")
        corrupt = {number: reason for chunk in self for number, reason in chunk.corrupt.items()}
        return Features(
            torch.cat([chunk.values for chunk in chunks]),
            torch.cat([chunk.labels for chunk in chunks]),
            corrupt,
            torch.cat([chunk.numbers for chunk in chunks]),
        )


def cached_features(context: EvalContext, split: Split, title: str, console: Console | None = None) -> CachedFeatures:
    """Features of a whole split's central crops; chunks already on disk are reused.

    The ranks of a job divide the chunks, so all of them need access to the folder.

    Args:
        context: Backbone, recipe, device, and the folder below which ``features/`` lies.
        split: The images.
        title: For the progress bar.
        console: Where the bar is shown.

    Raises:
        DataError: The split has no labels.
    """
    folder = context.folder / "features" / _key(context, split)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with progress(console, f"features of {title}", len(split)) as bar:
        for place, start in enumerate(range(0, len(split), CHUNK)):
            end = min(start + CHUNK, len(split))
            file = folder / f"{start:08d}-{end:08d}.safetensors"
            files.append(file)
            if place % world() != rank():
                continue
            if not context.fresh and _read(file) is not None:
                bar.advance(end - start)
                continue
            with context.precision.autocast():
                found = extract_features(
                    context.backbone,
                    split,
                    context.recipe,
                    device=context.device,
                    workers=context.workers,
                    pipeline=context.pipeline,
                    numbers=range(start, end),
                    tick=bar.advance,
                )
            _write(file, found)
    barrier()
    return CachedFeatures(tuple(files))


def _key(context: EvalContext, split: Split) -> str:
    """A hash of what the features depend on: weights, images by name and label, crop, normalisation, number format."""
    recipe = context.recipe
    digest = hashlib.sha256(weights_sha256(context.backbone).encode())
    digest.update(f"{recipe.size} {recipe.resize} {recipe.mean} {recipe.std} {context.precision.name}".encode())
    digest.update(f"{len(split)} {context.source.spec}".encode())
    if context.device.type == "cuda":  # DALI's crops differ by rounding
        digest.update(context.pipeline.encode())
    for number in range(len(split)):
        digest.update(split.name(number).encode(errors="backslashreplace") + b"\0")
    if split.labels is not None:
        digest.update(split.labels.tobytes())
    return digest.hexdigest()[:16]


def _write(file: Path, found: Features) -> None:
    tensors = {"values": found.values, "labels": found.labels, "numbers": found.numbers}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata={"corrupt": json.dumps(found.corrupt)})


def _read(file: Path) -> Features | None:
    """A chunk, or None if it is missing or damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            corrupt = json.loads((opened.metadata() or {}).get("corrupt", "{}"))
            values, labels, numbers = (opened.get_tensor(name) for name in ("values", "labels", "numbers"))
    except (SafetensorError, OSError, ValueError):
        return None
    return Features(values, labels, {int(number): reason for number, reason in corrupt.items()}, numbers)
