"""Throughput of a run, and its data wait."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Throughput"]


class Throughput:
    """Counts steps and time, excluding the first few steps, evaluations and checkpoints.

    Args:
        batch: Images per step, over all processes.
        settle: First steps, which compile kernels and fill caches, to exclude.
    """

    def __init__(self, batch: int, settle: int) -> None:
        self._batch, self._settle = batch, settle
        self.training = self.data = 0.0
        self.images = 0
        self._from, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def begin(self) -> None:
        """Start counting now."""
        self._from, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self, waited: float) -> None:
        """Count a step that waited so many seconds for its batch."""
        if self._settle:
            self._settle -= 1
            self.begin()
            return
        self._waited += waited
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Exclude the last so many seconds."""
        self._from += seconds

    def pop(self) -> dict[str, float]:
        """Since the last call: ``data_wait``, a fraction, and ``images_per_second`` if steps were counted."""
        spent = max(time.perf_counter() - self._from, 1e-9)
        waited, steps = self._waited, self._steps
        self.begin()
        values = {"data_wait": waited / spent}
        if steps:
            self.training += spent
            self.data += waited
            self.images += steps * self._batch
            values["images_per_second"] = steps * self._batch / spent
        return values

    @property
    def images_per_second(self) -> float:
        """Images per second over the whole run."""
        return self.images / max(self.training, 1e-9)

    @property
    def data_wait(self) -> float:
        """Fraction of time waiting for data over the whole run."""
        return self.data / max(self.training, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"seconds": {"training": self.training, "data": self.data}, "images_timed": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load from a checkpoint."""
        self.training, self.data = state["seconds"]["training"], state["seconds"]["data"]
        self.images = state["images_timed"]
