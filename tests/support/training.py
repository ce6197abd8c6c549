"""Whole runs on the small image set, and what is compared of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from synco_fast.config import Config
from synco_fast.evaluation.knn import PeriodicKnn
from synco_fast.evaluation.monitor import HealthMonitor
from synco_fast.runtime.checkpoint import find_checkpoint
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.run_folder import Summary, choose_run_folder

#: What a clock or the machine decides.
OF_THE_MACHINE = ("images_per_second", "data_wait", "memory_mib", "generators_time")


def trainer(config: Config, folder: Path, **settings: Any) -> Trainer[Summary]:
    """A trainer as the command makes it, silent unless ``console`` is given."""
    settings.setdefault("console", Console(quiet=True))
    return Trainer(Pretraining(config, evaluate=PeriodicKnn(), monitor=HealthMonitor()), folder, **settings)


def pretrain(config: Config, folder: Path, resume: Path | None = None) -> Summary:
    """A whole run; what it shows goes to ``screen.txt``."""
    if resume is None:
        choose_run_folder(folder, config.preset, config.data.source)
    folder.mkdir(exist_ok=True)
    console = Console(file=(folder / "screen.txt").open("a"), width=200)
    return trainer(config, folder, resume=resume, console=console).run()


def screen(width: int = 200) -> tuple[Console, StringIO]:
    """A console, and what was written to it."""
    text = StringIO()
    return Console(file=text, width=width), text


def stop_after(step: int) -> Callable[[Any], None]:
    """An ``after_step`` that asks the run to stop, as a batch system does."""

    def stop(run: Any) -> None:
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's content."""
    return find_checkpoint(folder)[0]


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log without what the machine decides."""
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in read_metrics(folder)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path."""
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in flat(inner, f"{prefix}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), prefix)
    return {prefix: value}


def assert_identical(one: dict[str, Any], other: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """Bit for bit, but for how long things took and the parts named ``without``."""
    excluded = ("/seconds", "/images_timed", "/config/data/workers", *without)
    one, other = (
        {name: value for name, value in flat(state).items() if not name.startswith(excluded)} for state in (one, other)
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
