"""Features that are extracted once: chunks on disk, so that a killed job goes on and ImageNet fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from synco_fast.data.sources.open import Split
from synco_fast.evaluation.context import Subject, fingerprint
from synco_fast.evaluation.features import Features, extract_features
from synco_fast.evaluation.progress import Bar
from synco_fast.evaluation.ranks import barrier, rank, world
from synco_fast.runtime.errors import DataError
from synco_fast.runtime.files import atomic_write

__all__ = ["CachedFeatures", "cached_features"]

#: Images in a file: 128 MiB of ResNet-50's features.
CHUNK = 16384


@dataclass(frozen=True)
class CachedFeatures:
    """The features of a split, chunk by chunk on disk.

    Attributes:
        files: In order of the images.
    """

    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[Features]:
        for file in self.files:
            found = _read(file)
            if found is None:
                raise DataError(f"{file}: found a chunk of features that cannot be read; --fresh extracts them again")
            yield found

    def load(self) -> Features:
        """All of them in memory.

        Raises:
            DataError: No image of the split could be read.
        """
        chunks = [chunk for chunk in self if len(chunk.labels)]
        if not chunks:
            raise DataError("data: found no readable image")
        broken = {number: reason for chunk in self for number, reason in chunk.broken.items()}
        return Features(
            torch.cat([chunk.values for chunk in chunks]),
            torch.cat([chunk.labels for chunk in chunks]),
            broken,
            torch.cat([chunk.numbers for chunk in chunks]),
        )


def cached_features(subject: Subject, split: Split, title: str, console: Console | None = None) -> CachedFeatures:
    """Central crops of a whole split through the subject's backbone; chunks that are on disk already are kept.

    The ranks of a torchrun job share the chunks among them, so the folder must be one that all of them see.

    Args:
        subject: Backbone, recipe, device, and the folder below which ``features/`` lies.
        split: The images.
        title: For the progress bar.
        console: Where the bar is shown.

    Raises:
        DataError: The split has no labels.
    """
    folder = subject.folder / "features" / _key(subject, split)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with Bar(console, f"features of {title}", len(split)) as bar:
        for place, start in enumerate(range(0, len(split), CHUNK)):
            end = min(start + CHUNK, len(split))
            file = folder / f"{start:08d}-{end:08d}.safetensors"
            files.append(file)
            if place % world() != rank():
                continue
            if not subject.fresh and _read(file) is not None:
                bar.advance(end - start)
                continue
            with subject.precision.autocast():
                found = extract_features(
                    subject.backbone,
                    split,
                    subject.recipe,
                    device=subject.device,
                    workers=subject.workers,
                    numbers=range(start, end),
                    tick=lambda images: bar.advance(images),
                )
            _write(file, found)
    barrier()
    return CachedFeatures(tuple(files))


def _key(subject: Subject, split: Split) -> str:
    """What decides the features: weights, images by name and label, crop, normalisation, number format."""
    recipe = subject.recipe
    digest = hashlib.sha256(fingerprint(subject.backbone).encode())
    digest.update(f"{recipe.size} {recipe.resize} {recipe.mean} {recipe.std} {subject.precision.name}".encode())
    digest.update(f"{len(split)} {subject.source.spec}".encode())
    for number in range(len(split)):
        digest.update(split.name(number).encode() + b"\0")
    if split.labels is not None:
        digest.update(split.labels.tobytes())
    return digest.hexdigest()[:16]


def _write(file: Path, found: Features) -> None:
    tensors = {"values": found.values, "labels": found.labels, "numbers": found.numbers}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata={"broken": json.dumps(found.broken)})


def _read(file: Path) -> Features | None:
    """A chunk, or None where there is none that is whole."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            broken = json.loads((opened.metadata() or {}).get("broken", "{}"))
            values, labels, numbers = (opened.get_tensor(name) for name in ("values", "labels", "numbers"))
    except (SafetensorError, OSError):
        return None
    return Features(values, labels, {int(number): reason for number, reason in broken.items()}, numbers)
