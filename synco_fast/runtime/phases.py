"""Named ranges of a training step: a profile measures them, without one they cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

__all__ = ["PHASES", "Recorder", "phase", "recorded_by"]

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
