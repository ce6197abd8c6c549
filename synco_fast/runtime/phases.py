"""Named phases of a training step: measured by a profile, free without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

__all__ = ["PHASES", "Mark", "Recorder", "mark", "phase", "recorded_by", "seconds_between", "wait_for"]

PHASES = (
    "data wait",
    "EMA update",
    "key forward",
    "query forward",
    "loss",
    "backward",
    "optimizer",
    "enqueue",
)


Mark = torch.cuda.Event | float
"""A moment: an event on the device's stream, or the host's clock."""


def mark(*, cuda: bool) -> Mark:
    """Mark now: on a GPU by an event, so that nothing waits for the device."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """The seconds between two marks of one kind; the device must have passed both."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Recorder(Protocol):
    """Measures phases."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A context around one occurrence of the phase ``name``."""
        ...


_recorder: Recorder | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """A context around a part of the step, measured where a recorder is active."""
    if _recorder is None or torch.compiler.is_compiling():
        return nullcontext()
    return _recorder.phase(name)


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Let ``recorder`` measure the phases inside."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
