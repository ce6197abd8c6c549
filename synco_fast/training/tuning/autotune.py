"""The choice of engine and pipeline for ``auto``: a long run measures them before its first step.

The fastest engine that agrees with eager is used, and the first pipeline that keeps up with it. A shorter run on a GPU
only tries the CUDA graph, which takes a second: in eager, the host limits every small model. The checkpoint holds the
choice, so that a run that resumes on the same kind of device stays equal bit for bit; ``engines.json`` holds the
measurements.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from synco_fast.data.pipelines.base import Pipeline
from synco_fast.data.pipelines.build import choose_pipeline, pipelines_for
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.splits import Split
from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import write_json
from synco_fast.runtime.names import EngineName
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.forms import choose_views, chosen_here
from synco_fast.training.step.pipeline import open_pipeline
from synco_fast.training.tuning.trials import EngineTrial, PipelineTrial, feed, reason_of, try_engines, try_pipeline

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
#: What a checkpoint can hold for each key.
_NAMES = {"engine": get_args(EngineName), "pipeline": get_args(PipelineName)}


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
        #: The choice in the resumed checkpoint, until `begin` takes it over or not.
        self._stored: dict[str, str] | None = None
        self.name = choose_pipeline(config.data.pipeline, split, engine.device)
        self.pipeline = self._build(self.name)
        #: Progressive resizing is measured at its end, whose views are the largest.
        self._first = config.training.epochs - 1 if config.augment.grows else 0
        #: The choice for each key that is ``auto``; None before it is made, and where the next start may make another.
        self._chosen: dict[str, str] | None = None
        self._settled = False

    def _build(self, name: PipelineName) -> Pipeline:
        engine = self._engine
        return open_pipeline(
            engine.config, self._split, device=engine.device, dtype=engine.precision.dtype, name=name, env=engine.env
        )

    def begin(self, kept: dict[str, Any] | None) -> None:
        """Take over a checkpoint's choice, and choose what makes the pipeline's views; before the first batch.

        All processes call it.

        Args:
            kept: `synco_fast.training.step.forms.forms_state` of the resumed checkpoint, as in `choose_forms`.
        """
        self._kept = kept
        if self._stored is not None:
            self._take_over(self._stored, kept or {})
        choose_views(self._engine, self._control, self.pipeline, kept=kept)

    def _take_over(self, stored: dict[str, str], kept: Mapping[str, Any]) -> None:
        """Use the choice of a checkpoint if it was made on this kind of device and its pipeline works here."""
        name, made, reason = self.name, self.pipeline, None
        if not chosen_here(kept, self._engine.device):
            reason = f"chosen on {kept['device']}"
        elif self._open["pipeline"] and stored.get("pipeline", name) != name:
            name = cast(PipelineName, stored["pipeline"])
            try:
                made = self._build(name)
            except Exception as error:
                reason = reason_of(error, self._control.env.world)
        if self._control.max(int(reason is not None))[0]:
            if made is not self.pipeline:
                made.close()
            said = " and ".join(f"{key} {choice}" for key, choice in stored.items() if self._open[key])
            if said:
                self._note(
                    f"auto: choosing again, since the run used {said} ({reason or 'another process cannot'}); "
                    "it may no longer be equal bit for bit",
                    "yellow",
                )
            return
        if self._open["engine"]:
            self._engine.use(cast(EngineName, stored.get("engine", "eager")))
        if made is not self.pipeline:
            self.pipeline.close()
            self.name, self.pipeline = name, made
        self._chosen, self._settled = stored, True

    def settle(self, steps: int, folder: Path, *, whole: int | None = None) -> bool:
        """Choose for each key that is ``auto``, once, by measurement if many steps remain; all processes call it.

        A start that ends early measures no more than pays in it. If the rest of the run would measure more, the choice
        is not kept, and the next start makes its own.

        Args:
            steps: Steps to the end of this start.
            folder: The run folder, which exists; ``engines.json`` is written there.
            whole: Steps to the end of the run; the same by default.

        Returns:
            Whether something was measured.
        """
        if self._settled:
            return False
        measured, self._settled = False, True
        engine, scope, whole = self._engine, self._scope(steps), steps if whole is None else whole
        lasts = self._scope(whole) == scope
        if scope:
            every = self._open["pipeline"] and scope == "all"
            names = pipelines_for(self._split, engine.device) if every else [self.name]
            if self._open["engine"] or len(names) > 1:
                self._measure(names, whole if lasts else steps, folder, short=scope == "graph")
                measured = True
        if lasts:
            found = {"engine": engine.form, "pipeline": self.name}
            self._chosen = {key: found[key] for key, is_open in self._open.items() if is_open}
        return measured

    def _scope(self, steps: int) -> Literal["all", "graph"] | None:
        """What so many steps measure of what is ``auto``; nothing where state is not in tensors (`trial`)."""
        if not any(self._open.values()) or self._engine.method.extra_state():
            return None
        return scope_of(steps, self._engine.device, engine_open=self._open["engine"])

    def state_dict(self) -> dict[str, Any]:
        """The choices; None before they are made, and where the next start may make others."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read the choices of a checkpoint, for `begin`; one without any comes from a run that measured nothing.

        Raises:
            ValueError: A choice is none of the names.
        """
        chosen = state.get("chosen", {})
        self._chosen, self._settled = None, False
        self._stored = None if chosen is None else dict(chosen)
        for key, name in (self._stored or {}).items():
            if name not in _NAMES.get(key, ()):
                raise ValueError(f"chosen: found {key} {name!r}")

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
            made, reason, form = self.pipeline, None, self._engine.forms.get("augment")
            try:
                if name != self.name:
                    made = self._build(name)
            except Exception as error:
                reason = reason_of(error, self._control.env.world)
            rate = None
            if not self._control.max(int(reason is not None))[0]:
                if made is not self.pipeline:
                    choose_views(self._engine, self._control, made, kept=self._kept)
                rate, reason = try_pipeline(
                    self._engine, using, made, self._control, step_seconds=seconds, first=self._first, **place
                )
            dropped = None if rate is not None else reason or "another process refused it"
            fed.append(PipelineTrial(name, rate, dropped))
            if made is not self.pipeline:
                if rate is not None and rate > best:
                    self.name, self.pipeline, made = name, made, self.pipeline
                else:
                    self._engine.forms.pop("augment", None)
                    self._engine.forms |= {} if form is None else {"augment": form}
                made.close()
            best = max(best, -1.0 if rate is None else rate)
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
