"""The choice of engine and pipeline for ``auto``: a long run measures them before its first step.

The fastest engine that agrees with eager is used, and the first pipeline that keeps up with it. A shorter run on a GPU
only tries the CUDA graph, which takes a second: in eager, the host limits every small model. The checkpoint holds the
choice, so that a resumed run stays equal bit for bit; ``engines.json`` holds the measurements.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from synco_fast.data.errors import UserError
from synco_fast.data.pipelines.base import Pipeline
from synco_fast.data.pipelines.build import choose_pipeline, pipelines_for
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.splits import Split
from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import write_json
from synco_fast.runtime.names import EngineName
from synco_fast.training.engine import Engine
from synco_fast.training.forms import choose_views
from synco_fast.training.pipeline import open_pipeline
from synco_fast.training.trials import EngineTrial, PipelineTrial, feed, try_engines, try_pipeline

__all__ = ["FILE", "Auto", "engines_for", "fastest", "scope_of"]

FILE = "engines.json"
#: In a shorter run a whole measurement costs more than it can save.
MIN_STEPS = 5_000
#: From so many steps on, a run on a GPU tries the CUDA graph, for so many seconds of timed steps of each engine.
MIN_GRAPH_STEPS = 200
_GRAPH_SECONDS = 0.5
#: Another engine must save this share of eager's time; less is noise.
GAIN = 0.03
#: Compiling on a CPU takes minutes; it is not tried if the whole run takes fewer seconds than this in eager.
COMPILE_PAYS = 3600.0
#: A pipeline keeps up if training from it reaches this share of the step's own rate.
SERVES = 0.97
_BATCHES = 4


class Auto:
    """The engine and the pipeline of a run: the configured ones, or for ``auto`` those that it chooses.

    Args:
        engine: The engine.
        split: The training images.
        control: Communication between the processes.
        note: Called with each line for the terminal and its style.

    Attributes:
        pipeline: The pipeline of the batches.
        name: The pipeline's name.

    Raises:
        DataError: The configured pipeline does not support these images.
    """

    def __init__(
        self, engine: Engine, split: Split, control: HostGroup, note: Callable[[str, str | None], None]
    ) -> None:
        self._engine, self._split, self._control, self._note = engine, split, control, note
        config = engine.config
        self._open = {"engine": config.training.engine == "auto", "pipeline": config.data.pipeline == "auto"}
        self._kept: dict[str, Any] | None = None
        self.name = choose_pipeline(config.data.pipeline, split, engine.device)
        self.pipeline = self._build(self.name)
        #: Progressive resizing is measured at its end, whose views are the largest.
        self._first = config.training.epochs - 1 if config.augment.grows else 0
        #: The choice for each key that is ``auto``; None before it is made.
        self._chosen: dict[str, str] | None = None

    def _build(self, name: PipelineName) -> Pipeline:
        engine = self._engine
        return open_pipeline(
            engine.config, self._split, device=engine.device, dtype=engine.precision.dtype, name=name, env=engine.env
        )

    def begin(self, kept: dict[str, Any] | None) -> None:
        """Choose what makes the pipeline's views; all processes call it, before the first batch.

        Args:
            kept: `synco_fast.training.forms.forms_state` of the resumed checkpoint, as in `choose_forms`.
        """
        self._kept = kept
        choose_views(self._engine, self._control, self.pipeline, kept=kept)

    def settle(self, steps: int, folder: Path) -> bool:
        """Choose for each key that is ``auto``, once, by measurement if many steps remain; all processes call it.

        Args:
            steps: Remaining steps.
            folder: The run folder, which exists; ``engines.json`` is written there.

        Returns:
            Whether something was measured.
        """
        if self._chosen is not None:
            return False
        measured = False
        engine = self._engine
        scope = scope_of(steps, engine.device, engine_open=self._open["engine"])
        if scope and any(self._open.values()) and not engine.method.extra_state():
            every = self._open["pipeline"] and scope == "all"
            names = pipelines_for(self._split, engine.device) if every else [self.name]
            if self._open["engine"] or len(names) > 1:
                self._measure(names, steps, folder, short=scope == "graph")
                measured = True
        found = {"engine": engine.form, "pipeline": self.name}
        self._chosen = {key: found[key] for key, is_open in self._open.items() if is_open}
        return measured

    def state_dict(self) -> dict[str, Any]:
        """The choices; None before they are made."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the choices of a checkpoint; one without any comes from a run that measured nothing."""
        chosen = state.get("chosen", {})
        if chosen is None:
            return
        if self._open["engine"]:
            self._engine.use(chosen.get("engine", "eager"))
        name = chosen.get("pipeline", self.name) if self._open["pipeline"] else self.name
        if name != self.name:
            self.pipeline.close()
            self.name, self.pipeline = name, self._build(name)
        self._chosen = dict(chosen)

    # -- measuring ----------------------------------------------------------------------------------------------

    def _measure(self, pipelines: list[PipelineName], steps: int, folder: Path, *, short: bool) -> None:
        engine, measured = self._engine, self._open["engine"]
        place = {"step": engine.steps // 2, "epoch": engine.config.training.epochs // 2}
        batches = [each.to(engine.device) for each in islice(feed(self.pipeline, self._first), _BATCHES)]
        names, without = engines_for(engine) if measured else ([engine.form], {})
        if short:
            without |= {name: "the run is too short to compile for" for name in names if name.startswith("compile")}
            names = [name for name in names if name not in without]

        def unless(name: EngineName, seconds: float) -> str | None:
            short = engine.device.type == "cpu" and name == "compile" and steps * seconds < COMPILE_PAYS
            return "the run is too short to compile for" if short else None

        tried = try_engines(
            engine,
            names,
            batches,
            self._control,
            seconds=_GRAPH_SECONDS if short else None,
            unless=unless,
            say=lambda line: self._note(line, "dim"),
            **place,
        )
        chosen = fastest(tried)
        del batches
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = next((each.seconds for each in tried if each.engine == chosen), None)
        fed: list[PipelineTrial] = []
        if seconds is not None and len(pipelines) > 1:
            fed = self._try_pipelines(pipelines, chosen, seconds, place)
        if self._control.env.is_main:
            table = _table(tried, without, fed, engine.config.training.batch, chosen, self.name)
            write_json(folder / FILE, {"environment": describe_environment(engine.device), **table})
            if measured or fed:
                self._note(_line(table, measured=measured, fed=bool(fed)), None)
        engine.use(chosen)

    def _try_pipelines(
        self, names: list[PipelineName], using: EngineName, seconds: float, place: dict[str, int]
    ) -> list[PipelineTrial]:
        """Switch to the first pipeline that keeps up with the step, else to the fastest one."""
        need = self._engine.config.training.batch / seconds
        best, fed = -1.0, []
        for name in names:
            made, reason = self.pipeline, None
            if name != self.name:
                try:
                    made = self._build(name)
                except UserError as error:
                    reason = str(error)
            if self._control.max(int(reason is not None))[0]:
                if made is not self.pipeline:
                    made.close()
                fed.append(PipelineTrial(name, None, reason or "another process refused it"))
                continue
            form = self._engine.forms.get("augment")
            if made is not self.pipeline:
                choose_views(self._engine, self._control, made, kept=self._kept)
            rate = try_pipeline(
                self._engine, using, made, self._control, step_seconds=seconds, first=self._first, **place
            )
            fed.append(PipelineTrial(name, rate))
            if made is not self.pipeline:
                if rate > best:
                    self.name, self.pipeline, made = name, made, self.pipeline
                else:
                    self._engine.forms.pop("augment", None)
                    self._engine.forms |= {} if form is None else {"augment": form}
                made.close()
            best = max(best, rate)
            if best >= SERVES * need:
                break
        return fed


def scope_of(steps: int, device: torch.device, *, engine_open: bool) -> Literal["all", "graph"] | None:
    """What a run of so many steps on a device measures: everything, only the CUDA graph beside eager, or nothing."""
    if steps >= MIN_STEPS:
        return "all"
    return "graph" if engine_open and device.type == "cuda" and steps >= MIN_GRAPH_STEPS else None


def engines_for(engine: Engine) -> tuple[list[EngineName], dict[EngineName, str]]:
    """The engines to measure on this device, eager first, and for each other one why it cannot run here."""
    captured = engine.uncapturable()
    compiler = "no C++ compiler" if engine.device.type == "cpu" and not _cpp_compiler() else None
    reasons: dict[EngineName, str | None] = {
        "eager": None,
        "graph": captured,
        "compile": compiler,
        "compile+graph": captured or compiler,
    }
    return [name for name, reason in reasons.items() if not reason], {
        name: reason for name, reason in reasons.items() if reason
    }


def _cpp_compiler() -> str | None:
    """The compiler that torch.compile would call, if there is one."""
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])), None)


def fastest(tried: list[EngineTrial]) -> EngineName:
    """The fastest engine that was not dropped; the first, unless another is faster by more than noise."""
    first = tried[0]
    timed = [each for each in tried if each.reason is None and each.seconds is not None]
    if first.seconds is None or not timed:
        return first.engine
    best = min(timed, key=lambda each: each.seconds or 0.0)
    return best.engine if (best.seconds or 0.0) < (1 - GAIN) * first.seconds else first.engine


def _table(
    tried: list[EngineTrial],
    without: dict[EngineName, str],
    fed: list[PipelineTrial],
    batch: int,
    engine: EngineName,
    pipeline: PipelineName,
) -> dict[str, Any]:
    """The content of ``engines.json``."""
    rows = [
        {**asdict(each), "images_per_second": None if each.seconds is None else batch / each.seconds}
        for each in [*tried, *(EngineTrial(name, reason=reason) for name, reason in without.items())]
    ]
    return {
        "engine": engine,
        "pipeline": pipeline,
        "need": next((row["images_per_second"] for row in rows if row["engine"] == engine), None),
        "engines": rows,
        "pipelines": [asdict(each) for each in fed],
    }


def _line(table: dict[str, Any], *, measured: bool, fed: bool) -> str:
    """The line for the terminal."""

    def said(row: dict[str, Any], name: str) -> str:
        rate = row["images_per_second"]
        return f"{row[name]} out ({row['reason']})" if rate is None else f"{row[name]} {rate:,.0f}"

    parts = []
    if measured:
        rows = sorted(table["engines"], key=lambda row: -(row["images_per_second"] or 0))
        parts.append(f"engine {table['engine']}: {', '.join(said(row, 'engine') for row in rows)}")
    if fed:
        parts.append(f"pipeline {table['pipeline']}: {', '.join(said(row, 'pipeline') for row in table['pipelines'])}")
    return f"{'; '.join(parts)}; images/s as measured ({FILE})"
