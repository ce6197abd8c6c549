"""What is evaluated: a backbone, the images it is judged on, and where the figures go."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.sources.open import Source, Split, open_source
from synco_fast.evaluation.ranks import rank
from synco_fast.export.load import Weights, backbone_of, read_weights
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.runtime.files import write_json
from synco_fast.runtime.precision import Precision, resolve_device

__all__ = ["Setting", "Subject", "check_labels", "check_unchanged", "fingerprint", "open_subject"]


@dataclass(frozen=True)
class Setting:
    """How an evaluation computes, whatever it evaluates.

    Attributes:
        data: The source; the run's own by default.
        out: Where figures, cached features and states go; ``evaluation/`` in the run folder by default.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: As in training.
        workers: Decoding processes.
        fresh: Take up nothing that an earlier evaluation left.
    """

    data: str | None = None
    out: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Subject:
    """A backbone with everything that an evaluation needs."""

    weights: Weights
    backbone: nn.Module
    source: Source
    train: Split
    held_out: Split
    recipe: Recipe
    device: torch.device
    precision: Precision
    folder: Path
    workers: int | None
    fresh: bool

    @property
    def classes(self) -> int:
        """How many classes there are."""
        assert self.train.classes is not None
        return len(self.train.classes)

    @property
    def chance(self) -> float:
        """The accuracy of guessing among equally likely classes."""
        return 1 / self.classes

    def result(self, name: str, headline: dict[str, float], **figures: Any) -> dict[str, Any]:
        """The figures of an evaluation with everything that identifies them; rank 0 writes ``NAME.json``."""
        found = {
            "evaluation": name,
            "checkpoint": str(self.weights.file),
            "source": self.source.spec,
            "classes": self.classes,
            "chance": self.chance,
            "headline": headline,
            **figures,
            "precision": self.precision.name,
            "environment": describe_environment(),
        }
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{name}.json", found)
        return found


def open_subject(path: Path, setting: Setting, device: torch.device | None = None) -> Subject:
    """Read the checkpoint, open the images, and check that they can be evaluated on.

    Raises:
        CheckpointError, ConfigError, DataError: The checkpoint, the source or its labels are not what they must be.
    """
    weights = read_weights(path)
    if setting.data is None and weights.imported:
        raise ConfigError("data: found none, expected --data SOURCE: an imported checkpoint does not know its images")
    device = device or resolve_device(setting.device)
    source = open_source(setting.data or weights.config.data.source)
    train, held_out = check_labels(source)
    default = weights.run / "evaluation" if weights.run else weights.file.with_name(f"{weights.file.stem}-evaluation")
    return Subject(
        weights=weights,
        backbone=backbone_of(weights).to(device),
        source=source,
        train=train,
        held_out=held_out,
        recipe=weights.config.augment,
        device=device,
        precision=Precision(setting.precision, device),
        folder=setting.out or default,
        workers=setting.workers if setting.workers is not None else weights.config.data.workers,
        fresh=setting.fresh,
    )


def check_labels(source: Source) -> tuple[Split, Split]:
    """Both splits, labelled, with the same classes.

    Raises:
        DataError: There is no held-out split, a split has no labels, or the splits differ in classes.
    """
    if source.validation is None:
        raise DataError(f"data: found no held-out split in {source.spec}, expected train/ and val/ with class folders")
    counts = []
    for split in (source.train, source.validation):
        if split.labels is None:
            raise DataError(f"data: found no class folders beside {split.name(0)}, expected one folder a class")
        counts.append(len(np.unique(split.labels)))
    if counts[0] != counts[1]:
        raise DataError(
            f"data: found {counts[0]} classes among the training images of {source.spec} and {counts[1]} among the "
            "held-out ones, expected the same"
        )
    return source.train, source.validation


def check_unchanged(subject: Subject, before: str) -> None:
    """Make sure that an evaluation of frozen features left the backbone as it was.

    Args:
        subject: After the evaluation.
        before: The backbone's `fingerprint` at its beginning.

    Raises:
        RuntimeError: It did not.
    """
    if fingerprint(subject.backbone) != before:
        raise RuntimeError("a frozen backbone was changed by its evaluation")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer of a module, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0" + str(value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
