"""The run folder: configuration, environment, summary and plots of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synco_fast.config import Config
from synco_fast.data.sources.layout import TRAIN
from synco_fast.data.sources.open import Source
from synco_fast.runtime.checkpoint import BEST, newest_checkpoint
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import check_writable, write_json
from synco_fast.runtime.precision import resolve_device
from synco_fast.runtime.run_config import holds_run, write_run_config
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.plots import draw_curves
from synco_fast.training.run.task import RunConfig
from synco_fast.training.run.throughput import Throughput

__all__ = ["Summary", "choose_run_folder", "close_run", "describe_run", "refuse_run"]


@dataclass(frozen=True)
class Summary:
    """The summary of a run; fractions are in [0, 1], None if nothing was evaluated.

    ``finished`` is false if the run was stopped. ``images_per_second`` counts only training steps, without the first
    few, evaluations and checkpoints. ``feature_rank`` is the backbone's effective rank at the end. ``best``, with
    `training.keep_best`, has ``knn``, ``epoch``, ``step`` and ``checkpoint`` of the best checkpoint. ``forms`` names
    the implementation of each part of a step, and why it was chosen.
    ``images_per_second_by_size`` has the images per second by side of the views; empty if it does not change.
    ``environment`` has versions, device and commit.
    """

    method: str
    source: str
    epochs: float
    steps: int
    finished: bool
    knn_before: float | None
    knn_after: float | None
    feature_rank: float | None
    chance: float | None
    best: dict[str, Any] | None
    images_per_second: float
    data_wait: float
    training_seconds: float
    corrupt_images: int
    forms: dict[str, dict[str, str]]
    run: str
    checkpoint: str
    curves: str
    pairs: str
    images_per_second_by_size: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str | int] = field(default_factory=describe_environment)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _image_folder(source: str) -> Path | None:
    """The folder in which a source's training images are, if it is one."""
    # Unlike pathlib's functions these take a long list of files, or a user that is not there, for no folder.
    place = os.path.expanduser(source)  # noqa: PTH111
    for folder in (os.path.join(place, TRAIN), place):  # noqa: PTH118
        if source != "demo" and os.path.isdir(folder):  # noqa: PTH112
            return Path(folder)
    return None


def choose_run_folder(folder: Path | None, name: str, source: str) -> Path:
    """The folder of a new run: ``folder``, or ``runs/NAME-DATE-TIME`` in the working folder; not created yet.

    Args:
        folder: As the user named it.
        name: Begins the name of a new one.
        source: The training images, as ``data.source`` names them.

    Raises:
        ConfigError: The folder already holds a run, is a file, or lies where the training images are read.
    """
    folder = folder or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    refuse_run(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: found a file {folder}, expected a folder")
    check_writable(folder, "out")
    images = _image_folder(source)
    if images and folder.resolve().is_relative_to(images.resolve()):
        raise ConfigError(
            f"out: found {folder} inside {images}, where its plots would become training images of the next run, "
            "expected --out with a folder elsewhere"
        )
    return folder


def refuse_run(folder: Path) -> None:
    """Check that the folder of a new run holds no run.

    Raises:
        ConfigError: It does.
    """
    if holds_run(folder):
        raise ConfigError(f"out: found a run in {folder}, expected a new folder, or --resume {folder} to resume it")


def describe_run(
    folder: Path, config: RunConfig, facts: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> None:
    """Create the run folder and write the settings of the run into it, also those that a resumed run was given.

    ``config.yaml`` is written again if the configuration has changed, ``environment.json`` if there is none.

    Args:
        folder: The run folder.
        config: Its configuration.
        facts: Further entries of ``environment.json``.
        device: The device of the run.
    """
    for inner in ("checkpoints", "plots"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    write_run_config(folder, config.to_yaml())
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", {**describe_environment(device), **(facts or {})})


def close_run(
    folder: Path,
    config: Config,
    source: Source,
    *,
    steps_per_epoch: int,
    step: int,
    finished: bool,
    throughput: Throughput,
    corrupt: int,
    forms: dict[str, dict[str, str]],
    best: dict[str, Any] | None = None,
    writes: bool = True,
) -> Summary:
    """Draw the curves and write ``summary.json``.

    Args:
        folder: The run folder.
        config: Configuration of the run.
        source: The images of its evaluations.
        steps_per_epoch, step, finished: Its progress.
        throughput: Its throughput.
        corrupt: Number of corrupt images.
        forms: By part of a step, ``name`` of its implementation and ``why`` it was chosen.
        best: ``score`` and ``step`` of the best checkpoint, if one was kept.
        writes: Whether this process writes; otherwise the summary is only returned.
    """
    lines = read_metrics(folder)
    knn = [line["knn"] for line in lines if line["kind"] == "evaluation" and "knn" in line]
    ranks = [line["feature_rank"] for line in lines if "feature_rank" in line]
    labels = source.validation.labels if source.validation else None
    chance = 1 / len(np.unique(labels)) if labels is not None and knn else None
    curves = folder / "plots" / "curves.png"
    summary = Summary(
        method=config.method.name,
        source=config.data.source,
        epochs=step / steps_per_epoch,
        steps=step,
        finished=finished,
        knn_before=knn[0] if knn else None,
        knn_after=knn[-1] if len(knn) > 1 else None,
        feature_rank=ranks[-1] if len(knn) > 1 and ranks else None,
        chance=chance,
        best=None
        if best is None
        else {
            "knn": best["score"],
            "epoch": best["step"] / steps_per_epoch,
            "step": best["step"],
            "checkpoint": str(folder / "checkpoints" / BEST),
        },
        images_per_second=throughput.images_per_second,
        data_wait=throughput.data_wait,
        training_seconds=throughput.training,
        corrupt_images=corrupt,
        forms=forms,
        run=str(folder),
        checkpoint=str(newest_checkpoint(folder) or ""),
        curves=str(curves),
        pairs=str(folder / "plots" / "pairs.png"),
        images_per_second_by_size=throughput.images_per_second_by_size,
        environment=describe_environment(resolve_device(config.training.device)),
    )
    if writes:
        title = f"{config.method.name} on {config.data.source}, {config.model.backbone}, seed {config.seed}"
        draw_curves(lines, curves, title=title, chance=chance)
        write_json(folder / "summary.json", summary.as_dict())
    return summary
