"""The context of an evaluation: options, backbone, images, output folder, processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.open import Source, Split, open_source
from synco_fast.export.card import has_card
from synco_fast.export.load import Weights, backbone_of, read_weights
from synco_fast.runtime.distributed import DistEnv, init_distributed, rank
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.runtime.files import check_text, check_writable, write_json
from synco_fast.runtime.precision import Precision, resolve_device
from synco_fast.runtime.progress import ProgressBar
from synco_fast.runtime.results import result_stem

__all__ = [
    "EvalContext",
    "EvalOptions",
    "check_labels",
    "check_unchanged",
    "folder_of",
    "for_features",
    "join_job",
    "labelled_splits",
    "open_context",
    "progress",
    "source_of",
    "weights_sha256",
]

#: Seconds that a rank waits for the others, which may have one more chunk of features to extract.
_PATIENCE = 3600


@dataclass(frozen=True)
class EvalOptions:
    """Options of every evaluation.

    Attributes:
        data: The source; the run's own by default.
        out: Folder of results, cached features and states; ``evaluation/`` in the run folder by default.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: As in training; ``auto`` is fp32 where only frozen features are computed, see `for_features`.
        workers: Decoding processes.
        fresh: Ignore cached results and start over.
    """

    data: str | None = None
    out: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class EvalContext:
    """A backbone and everything that an evaluation needs."""

    weights: Weights
    backbone: nn.Module
    source: Source
    train: Split
    held_out: Split
    recipe: Recipe
    device: torch.device
    precision: Precision
    folder: Path
    pipeline: PipelineName
    workers: int | None
    fresh: bool

    @property
    def classes(self) -> int:
        """The outputs of a classifier: every label is below it, but not every number below it needs to be a label."""
        assert self.train.classes is not None
        return len(self.train.classes)

    @property
    def present(self) -> int:
        """The number of classes that have images."""
        return len(np.unique(self.train.labels))  # type: ignore[arg-type]  # labelled, see `check_labels`

    @property
    def chance(self) -> float:
        """The accuracy of guessing among equally likely classes."""
        return 1 / self.present

    def file_of(self, name: str) -> Path:
        """The file of a result; images other than the run's own are part of its name.

        Weights without a run have no images of their own. In a folder that the user chose, no images are named.
        """
        run, config = self.weights.run, self.weights.config
        if run is not None and self.folder.resolve() == run / "evaluation":
            stem = result_stem(name, self.source.spec, config.evaluation.source or config.data.source)
        elif run is None and self.folder == _beside(self.weights.file):
            stem = result_stem(name, self.source.spec, "")
        else:
            stem = name
        return self.folder / f"{stem}.json"

    def result(self, name: str, headline: dict[str, float], **figures: Any) -> dict[str, Any]:
        """An evaluation's result with everything that identifies it; rank 0 writes it, see `file_of`."""
        found = {
            "evaluation": name,
            "checkpoint": str(self.weights.file),
            "step": self.weights.step,
            "weights": weights_sha256(self.backbone),
            "source": self.source.spec,
            "classes": self.present,
            "chance": self.chance,
            "headline": headline,
            **figures,
            "precision": self.precision.name,
            "environment": describe_environment(self.device),
        }
        if rank() == 0:
            write_json(self.file_of(name), found)
        return found


@contextmanager
def join_job(device: str) -> Iterator[torch.device]:
    """Join the torchrun or Slurm job of this process, if any; yields this process's device.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; on GPUs each process takes the one of its local rank.

    Raises:
        ConfigError: More processes than GPUs on this machine, or ``cuda`` without a GPU.
    """
    kind = resolve_device(device).type
    if dist.is_available() and dist.is_initialized():
        yield resolve_device(kind)
        return
    with init_distributed(DistEnv.detect(), kind, timeout=_PATIENCE):
        yield resolve_device(kind)


def progress(console: Console | None, title: str, total: int, done: int = 0, *, unit: str = "") -> ProgressBar:
    """The progress bar of an evaluation, shown by rank 0 only."""
    return ProgressBar(console if rank() == 0 else None, title, total, done, unit=unit)


def open_context(path: Path, options: EvalOptions, device: torch.device | None = None) -> EvalContext:
    """Read the checkpoint, open the images, and check that both fit an evaluation.

    Raises:
        CheckpointError, ConfigError, DataError: The checkpoint, the source or its labels do not fit.
        UserError: The folder of results cannot be written.
    """
    weights = read_weights(path)
    spec = source_of(weights, options)
    folder = folder_of(weights, options)
    device = device or resolve_device(options.device)
    source = open_source(spec)
    train, held_out = check_labels(source)
    return EvalContext(
        weights=weights,
        backbone=backbone_of(weights).to(device),
        source=source,
        train=train,
        held_out=held_out,
        recipe=weights.config.augment,
        device=device,
        precision=Precision(options.precision, device, key="precision"),
        folder=folder,
        pipeline=weights.config.data.pipeline,
        workers=options.workers if options.workers is not None else weights.config.data.workers,
        fresh=options.fresh,
    )


def for_features(options: EvalOptions) -> EvalOptions:
    """The options with ``auto`` as fp32, for evaluations of frozen features.

    The kNN of a training run computes in float32; the same checkpoint then gives the same accuracy in both.
    """
    return replace(options, precision="fp32") if options.precision == "auto" else options


def source_of(weights: Weights, options: EvalOptions) -> str:
    """The source given in the options, else the one that the run was evaluated on.

    Raises:
        ConfigError: Imported weights record no source, or its name is not UTF-8.
    """
    if options.data is None and weights.imported:
        raise ConfigError("data: found none, expected --data SOURCE: an imported checkpoint records no images")
    config = weights.config
    check_text(options.data or "", "data")
    return options.data or config.evaluation.source or config.data.source


def folder_of(weights: Weights, options: EvalOptions) -> Path:
    """The folder of an evaluation's files: ``out``, else in the run folder, else beside the checkpoint.

    Of an export it is beside its folder, which is copied and uploaded as a whole.

    Raises:
        UserError: It cannot be written.
    """
    folder = options.out or (weights.run / "evaluation" if weights.run else _beside(weights.file))
    if folder.is_file():
        raise ConfigError(f"out: found a file {folder}, expected a folder")
    check_writable(folder, "out")
    return folder


def _beside(file: Path) -> Path:
    if not has_card(file.parent):
        return file.with_name(f"{file.stem}-evaluation")
    export = file.parent.resolve()
    return export.with_name(f"{export.name}-evaluation")


def labelled_splits(source: Source, hint: str = "") -> tuple[Split, Split]:
    """Training and held-out split, both labelled; of training images only those with labels, if others are apart.

    Args:
        source: The images.
        hint: Advice at the end of the message.

    Raises:
        DataError: There is no held-out split, or a split has no labels.
    """
    if source.notes:  # they may say why
        hint += f" ({'; '.join(source.notes)})"
    if source.validation is None:
        raise DataError(
            f"data: found no held-out split in {source.spec}, expected train/ and val/ with one folder per class{hint}"
        )
    for split in (source.evaluated, source.validation):
        if split.labels is None:
            raise DataError(
                f"data: found no class folders or labels beside {split.name(0)}, expected one folder per class, or a "
                f"label of each image{hint}"
            )
    return source.evaluated, source.validation


def check_labels(source: Source) -> tuple[Split, Split]:
    """Both splits, checked to be labelled with the same classes.

    Raises:
        DataError: As `labelled_splits` says, or the splits differ in classes.
    """
    train, held_out = labelled_splits(source)
    names, others = _classes(train), _classes(held_out)
    if names != others:
        apart = sorted(names ^ others)
        which = f"{', '.join(apart[:4])}{', ...' if apart[4:] else ''} in one of them alone"
        raise DataError(
            f"data: found {len(names)} classes among the training images of {source.spec} and {len(others)} among the "
            f"held-out ones ({which}), expected the same"
        )
    return train, held_out


def _classes(split: Split) -> set[str]:
    """The names of the classes that have images."""
    assert split.labels is not None
    assert split.classes is not None
    return {split.classes[label] for label in np.unique(split.labels)}


def check_unchanged(backbone: nn.Module, before: str) -> None:
    """Check that an evaluation did not change a frozen backbone.

    Args:
        backbone: After the evaluation.
        before: Its `weights_sha256` before the evaluation.

    Raises:
        RuntimeError: It changed.
    """
    if weights_sha256(backbone) != before:
        raise RuntimeError("a frozen backbone was changed by its evaluation")


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer of a module, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0" + str(value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
