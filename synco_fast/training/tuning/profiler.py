"""Profiling a step: time and memory by phase, without synchronising, and a trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from synco_fast.config import Config
from synco_fast.data.sources.open import open_source
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.phases import PHASES, Mark, mark, phase, recorded_by, seconds_between, wait_for
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.forms import choose_forms, choose_views
from synco_fast.training.step.pipeline import open_pipeline

__all__ = ["PhaseClock", "profile_step"]

_MIB = 1 << 20
#: Phases timed on the host even with a GPU, which cannot time the host's waits.
_OF_THE_HOST = ("data wait",)
_WITHOUT_GRAPH = {"graph": "eager", "compile+graph": "compile"}


class PhaseClock:
    """Times phases by events on the device's stream, or by the host's clock on a CPU.

    Every phase is also a range for Nsight Systems (NVTX) and in a PyTorch trace.

    Args:
        device: Where the phases run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._times: list[tuple[str, Mark, Mark]] = []
        self.memory: list[dict[str, Any]] = []
        self._begun = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one occurrence."""
        on_device = self._cuda and name not in _OF_THE_HOST
        nvtx: AbstractContextManager[None] = torch.cuda.nvtx.range(name) if self._cuda else nullcontext()
        with nvtx, record_function(name):
            begin = mark(cuda=on_device)
            try:
                yield
            finally:
                self._times.append((name, begin, mark(cuda=on_device)))
                seconds = time.perf_counter() - self._begun
                self.memory.append({"seconds": seconds, "phase": name, "mib": self._held() / _MIB})

    def pop(self) -> list[tuple[str, float]]:
        """The phases since the last call and their seconds; waits for the device."""
        wait_for(self._device)
        taken = [(name, seconds_between(begin, end)) for name, begin, end in self._times]
        self._times.clear()
        return taken

    def _held(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated(self._device)
        # Resident pages; on a system without this file the timeline is flat.
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def profile_step(config: Config, folder: Path, *, steps: int) -> dict[str, Any]:
    """Train a few steps on the configured images and measure where they spend their time.

    Writes ``trace.json`` (for Perfetto or chrome://tracing) and, on a GPU, ``memory.pickle``
    (for pytorch.org/memory_viz) into the folder.

    Args:
        config: The configuration. Synthetic negatives are on from the first step; CUDA graphs are off, since they hide
            phases.
        folder: Created if missing.
        steps: Timed steps, after those that compile and fill caches.

    Returns:
        Environment, configuration, files; by phase the median milliseconds per step and their share of the step; the
        milliseconds of the step, images per second, and a timeline of the memory held at the end of every phase.
    """
    values = config.model_dump(mode="json")
    values["method"]["warmup_epochs"] = 0
    values["augment"]["min_size"] = None  # progressive resizing is profiled at its full size
    values["training"]["engine"] = _WITHOUT_GRAPH.get(config.training.engine, config.training.engine)
    config = Config.model_validate(values)
    folder.mkdir(parents=True, exist_ok=True)
    split = open_source(config.data.source, config.data.limits, config.data.stream).train
    notes: list[str] = []
    engine = Engine(config, len(split) // config.training.batch, note=notes.append)
    choose_forms(engine, HostGroup(DistEnv()))
    pipeline = open_pipeline(config, split, device=engine.device, dtype=engine.precision.dtype)
    choose_views(engine, HostGroup(DistEnv()), pipeline)
    clock = PhaseClock(engine.device)
    number, epoch, batches = 0, 0, iter(pipeline)

    def step() -> None:
        nonlocal number, epoch, batches
        with phase("data wait"):
            batch = next(batches, None)
            if batch is None:
                epoch += 1
                pipeline.set_epoch(epoch)
                batches = iter(pipeline)
                batch = next(batches)
        engine.step(batch, number, 0)
        number += 1

    try:
        for _ in range(engine.settling):
            step()
        by_step: list[dict[str, float]] = []
        with recorded_by(clock):
            for _ in range(steps):
                begun = time.perf_counter()
                step()
                taken = clock.pop()
                whole: dict[str, float] = {"step": time.perf_counter() - begun}
                for name, seconds in taken:
                    whole[name] = whole.get(name, 0.0) + seconds
                by_step.append(whole)
            timeline = list(clock.memory)
            files = _trace(step, folder, engine.device)
    finally:
        pipeline.close()
    middle = statistics.median(whole["step"] for whole in by_step)
    phases = {name: statistics.median(whole.get(name, 0.0) for whole in by_step) for name in PHASES}
    phases["other"] = max(0.0, middle - sum(phases.values()))
    return {
        "environment": describe_environment(engine.device),
        "config": values,
        "step_ms": 1000 * middle,
        "images_per_second": config.training.batch / middle,
        "phases": {name: {"ms": 1000 * value, "share": value / middle} for name, value in phases.items()},
        "memory": timeline,
        "peak_mib": max(point["mib"] for point in timeline),
        "notes": notes,
        "files": files,
    }


def _trace(step: Callable[[], None], folder: Path, device: torch.device) -> list[str]:
    """Run three further steps under PyTorch's profiler, which slows them down; returns the files written."""
    activities, cuda = [ProfilerActivity.CPU], device.type == "cuda"
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history()
    with profile(activities=activities, profile_memory=True) as trace:
        for _ in range(3):
            step()
        wait_for(device)
    files = [folder / "trace.json"]
    trace.export_chrome_trace(str(files[0]))
    if cuda:
        files.append(folder / "memory.pickle")
        torch.cuda.memory._dump_snapshot(str(files[1]))
        torch.cuda.memory._record_memory_history(enabled=None)
    return [str(file) for file in files]
