"""The Python interface: pretrain from a script or a notebook, and read what a run left."""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.config import SECTIONS, Config, build_config, read_mapping
from synco_fast.presets import load_config, load_values
from synco_fast.runtime.console import open_console, say
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import named_path, read_json
from synco_fast.runtime.run_config import holds_run, read_run_config

if TYPE_CHECKING:
    from torch import nn

    from synco_fast.config import TrainingConfig
    from synco_fast.training.run.loop import Trainer
    from synco_fast.training.run.run_folder import Summary

__all__ = ["Run", "pretrain", "train"]


class Run:
    """A run folder: its metrics, its checkpoint and its backbone.

    Attributes:
        folder: The folder, absolute: the process may work in another one later.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = named_path(folder, "run").absolute()

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run, finished or not.

        Raises:
            ConfigError: The folder holds no run.
        """
        found = cls(folder)
        found._check()
        return found

    def _check(self) -> None:
        if not holds_run(self.folder):
            raise ConfigError(f"run: found no run in {self.folder}, expected a folder with a config.yaml")

    @property
    def config(self) -> Config:
        """The configuration, which `resume` continues with.

        Raises:
            ConfigError: ``config.yaml`` is damaged.
        """
        return build_config(read_run_config(self.folder))

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; empty while the run has not ended or stopped.

        Raises:
            ConfigError: The folder holds no run, as where it was moved or removed.
            UserError: The file is damaged.
        """
        self._check()
        return read_json(self.folder / "summary.json")

    @property
    def finished(self) -> bool:
        """Whether the run reached the end that its configuration sets, not a limit of one call or a signal."""
        summary, training = self.summary, self.config.training
        if not summary.get("finished"):
            return False
        limit = math.inf if training.max_steps is None else training.max_steps
        return bool(summary["epochs"] >= training.epochs or summary["steps"] >= limit)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, oldest first; ``pandas.DataFrame(run.metrics)`` makes a table.

        Each has ``kind`` (``train`` or ``evaluation``), ``step``, ``epoch`` and the values measured there.

        Raises:
            ConfigError: The folder holds no run, as where it was moved or removed.
            UserError: A line is damaged.
        """
        from synco_fast.training.run.metrics import read_metrics

        self._check()
        return read_metrics(self.folder)

    @property
    def knn(self) -> float | None:
        """The last kNN accuracy on held-out images, in [0, 1]; None if there was no evaluation."""
        found = [line["knn"] for line in self.metrics if "knn" in line]
        return found[-1] if found else None

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            CheckpointError: There is none.
        """
        from synco_fast.runtime.checkpoint import newest_checkpoint

        newest = newest_checkpoint(self.folder)
        if newest is None:
            raise CheckpointError(f"checkpoint: found none in {self.folder}, expected at least one")
        return newest

    @cached_property
    def backbone(self) -> nn.Module:
        """The newest checkpoint's backbone on the CPU, in evaluation mode: images (B, 3, H, W) to features (B, F).

        It is read once; `synco_fast.load_backbone` reads it again.

        Raises:
            CheckpointError: There is no checkpoint that can be read.
        """
        from synco_fast.export.load import load_backbone

        return load_backbone(self.folder)

    def resume(
        self,
        *,
        max_steps: int | None = None,
        max_time: float | None = None,
        progress: bool = True,
        settings: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Run:
        """Train on from the newest checkpoint, as ``synco-fast pretrain --resume`` does.

        Args:
            max_steps, max_time, progress, settings, overrides: As in `pretrain`. Some settings cannot change in a run.

        Returns:
            The run, with its new metrics and checkpoint.

        Raises:
            UserError: A setting cannot change, or the run cannot go on.
            KeyboardInterrupt: As in `pretrain`.
        """
        changes, values = _overrides(settings, overrides), read_run_config(self.folder)
        return _pretrain(
            build_config(values, changes), _limits(max_steps, max_time), resume=self.folder, progress=progress
        )

    def report(self, out: str | Path | None = None) -> Path:
        """Write the HTML report, ``report.html`` in the run folder by default; its path.

        Raises:
            ConfigError: The folder holds no run, or a file in it is damaged.
            UserError: The page cannot be written there.
        """
        from synco_fast.evaluation.context import EvalOptions
        from synco_fast.report.page import write_report

        page = self.folder / "report.html" if out is None else named_path(out, "out")
        return write_report(self.folder, page, EvalOptions(out=page.parent))

    def export(self, format: str, out: str | Path | None = None) -> Path:
        """Write the backbone for another tool, as ``synco-fast export``; the folder of the files.

        Args:
            format: ``timm``, ``torchvision``, ``safetensors``, ``moco``, ``detectron2`` or ``onnx``.
            out: The folder; ``export/FORMAT`` in the run folder by default.

        Raises:
            ConfigError: The format is unknown, or needs a package that is missing.
            CheckpointError: There is no checkpoint, or the format does not support the backbone.
        """
        from synco_fast.export.save import export_checkpoint

        return export_checkpoint(self.folder, format, None if out is None else named_path(out, "out")).folder

    def __repr__(self) -> str:
        """Folder, from the one where the process works, steps and accuracy."""
        place = self.folder
        with suppress(ValueError, OSError):  # elsewhere, or a working folder that was removed
            place = place.relative_to(Path.cwd())
        if not holds_run(self.folder):
            return f"Run({place}, moved or removed)"
        summary, knn = self.summary, self.knn
        words = [f"{place}", f"{summary['steps']:,} steps" if "steps" in summary else "not ended"]
        return f"Run({', '.join(words if knn is None else [*words, f'kNN {knn:.1%}'])})"


def pretrain(
    config: str | Path | Mapping[str, Any] | Config,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Run:
    """Pretrain an encoder, as ``synco-fast pretrain`` does, and return the run when it ends.

    It trains with gradients, and with float32 and the CPU as PyTorch's defaults, whatever the process has set. What it
    changes there is restored: signal handlers, PyTorch's random state on all devices, these modes, and ``benchmark``
    and ``fp32_precision`` of cuDNN. It can be called again in the same process. Under ``torchrun`` or Slurm every
    process calls it.

    Args:
        config: A preset's name, a YAML file, a `synco_fast.config.Config`, or its sections and keys; ``preset`` among
            them names the preset that they change.
        data: The images: a folder, or any source that ``data.source`` takes; that of the configuration by default.
        out: The run folder, which must hold no run; ``runs/PRESET-DATE-TIME`` by default.
        max_steps: Stop after this many steps this time, as after a signal; the run does not keep it.
        max_time: Stop after this many minutes this time; the run does not keep it.
        progress: Whether to print: a progress bar on a terminal and in a notebook, else lines.
        settings: Keys of the configuration by dotted name, such as ``{"training.epochs": 10}``.
        overrides: The same as keyword arguments: ``SECTION_KEY=value``, such as ``training_epochs=10``, a whole
            section's mapping, such as ``training={"epochs": 10}``, or ``seed=1``.

    Raises:
        ConfigError: A preset, key or value is wrong, or the folder holds a run.
        DataError: The images cannot be read, or too many are corrupt.
        DivergedError: Training diverged.
        LostProcessError: Another process of the job is gone.
        KeyboardInterrupt: On the first Ctrl-C (or a notebook's interrupt), once the step is finished and a checkpoint
            is written; at once on one that comes two seconds later or more. `Run.resume` goes on. Likewise SIGTERM and
            SIGHUP reach the handlers that were installed before.
    """
    changes = _overrides(settings, overrides)
    if isinstance(data, Mapping):
        raise ConfigError("data: found a mapping, expected a folder or a source; the section's keys are data_KEY=value")
    if data is not None:
        if "data.source" in changes:
            raise ConfigError(f"data.source: found {changes['data.source']} with data={data}, expected one of them")
        changes["data.source"] = str(data)
    place = None if out is None else named_path(out, "out")
    return _pretrain(_read(config, changes), _limits(max_steps, max_time), out=place, progress=progress)


def _pretrain(
    config: Config,
    limits: dict[str, Any],
    *,
    out: Path | None = None,
    resume: Path | None = None,
    progress: bool,
) -> Run:
    from synco_fast.runtime.torch_state import torch_state_kept

    console = open_console() if progress else Console(quiet=True)
    limited = build_config(config.model_dump(mode="json"), limits).training
    with torch_state_kept():
        trainer, _ = train(config, out=out, resume=resume, limits=limited, console=console)
    folder, received = trainer.folder, trainer.stopping.received
    # Networks and optimizer lie in cycles of references, and a next run needs their memory.
    del trainer
    gc.collect()
    if received is not None:
        say(console, f"stopped on request: synco_fast.Run.open({str(folder)!r}).resume() goes on")
        signal.raise_signal(received)
    return Run(folder)


def train(
    config: Config,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    limits: TrainingConfig | None = None,
    console: Console | None = None,
) -> tuple[Trainer[Summary], Summary]:
    """Join the job, train, and leave the job: what `pretrain` and ``synco-fast pretrain`` share.

    Args:
        config: The configuration, which the run keeps.
        out: The folder of a new run.
        resume: The run to resume; then ``out`` is not read.
        limits: Its ``max_steps`` and ``max_time`` are those of this start.
        console: Where progress is shown.

    Returns:
        The trainer, which has ended, and the summary.

    Raises:
        UserError: As `pretrain`.
    """
    from synco_fast.evaluation.knn import PeriodicKnn
    from synco_fast.evaluation.monitor import HealthMonitor
    from synco_fast.runtime.distributed import DistEnv, init_distributed
    from synco_fast.training.pretraining import Pretraining
    from synco_fast.training.run.loop import Trainer
    from synco_fast.training.run.resuming import check_same_start
    from synco_fast.training.run.run_folder import choose_run_folder

    with init_distributed(DistEnv.detect(), config.training.device, timeout=config.training.timeout) as control:
        check_same_start(control, "no run" if resume is None else "a run")
        # The name holds the time, so one rank chooses it.
        folder = resume or control.from_main(lambda: choose_run_folder(out, config.preset, config.data.source))
        task = Pretraining(config, control=control, evaluate=PeriodicKnn(), monitor=HealthMonitor(), limits=limits)
        trainer = Trainer(task, folder, resume=resume, console=console)
        return trainer, trainer.run()


def _read(config: str | Path | Mapping[str, Any] | Config, overrides: dict[str, Any]) -> Config:
    if isinstance(config, Config):
        return build_config(config.model_dump(mode="json"), overrides)
    if isinstance(config, Mapping):
        return load_values(dict(config), overrides)
    if isinstance(config, Path):
        return load_values(read_mapping(config), overrides)
    if isinstance(config, str):
        return load_config(config, overrides)
    raise ConfigError(f"config: found {type(config).__name__}, expected a preset's name, a YAML file or a Config")


def _overrides(settings: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Both forms of overrides by dotted name.

    Raises:
        ConfigError: A key is given twice, or a section's name without a mapping.
    """
    found: dict[str, Any] = {}
    for name, value in (*(settings or {}).items(), *keywords.items()):
        for dotted, each in _dotted(name, value):
            if dotted in found:
                raise ConfigError(f"{dotted}: found it given twice, expected once")
            found[dotted] = str(each) if isinstance(each, Path) else each
    return found


def _dotted(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Keys by dotted name. No section has an underscore in its name, so ``SECTION_KEY`` is unambiguous."""
    section, _, key = name.partition("_")
    if name in SECTIONS:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: found {value!r}, expected the section's keys, or {name}_KEY=value")
        yield from ((f"{name}.{inner}", each) for inner, each in value.items())
    elif "." not in name and section in SECTIONS:
        yield f"{section}.{key}", value
    else:
        yield name, value


def _limits(max_steps: int | None, max_time: float | None) -> dict[str, Any]:
    given = {"training.max_steps": max_steps, "training.max_time": max_time}
    return {key: value for key, value in given.items() if value is not None}
