"""How fast a run is, and how much of its time it waits for images."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Throughput"]


class Throughput:
    """Counts steps and time, without the first few steps, evaluations and checkpoints.

    Args:
        batch: Images a step, over all processes.
        settle: How many steps compile kernels and fill caches and are not counted.
    """

    def __init__(self, batch: int, settle: int) -> None:
        self._batch, self._settle = batch, settle
        self.training = self.data = 0.0
        self.images = 0
        self._from, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def begin(self) -> None:
        """Count from now on."""
        self._from, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self, waited: float) -> None:
        """One more step is done, which waited so many seconds for its batch."""
        if self._settle:
            self._settle -= 1
            self.begin()
            return
        self._waited += waited
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave out the last so many seconds."""
        self._from += seconds

    def pop(self) -> dict[str, float]:
        """Since the last call: ``data_wait``, a share, and ``images_per_second`` where steps were counted."""
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
        """Over the whole run."""
        return self.images / max(self.training, 1e-9)

    @property
    def data_wait(self) -> float:
        """Over the whole run, a share."""
        return self.data / max(self.training, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"seconds": {"training": self.training, "data": self.data}, "images_timed": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from a checkpoint."""
        self.training, self.data = state["seconds"]["training"], state["seconds"]["data"]
        self.images = state["images_timed"]
