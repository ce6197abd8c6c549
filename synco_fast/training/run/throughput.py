"""Throughput of a run, and its data wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from synco_fast.runtime.phases import Mark, mark, seconds_between

__all__ = ["Throughput"]


class Throughput:
    """Counts steps and time, excluding the first few steps, evaluations and checkpoints.

    The host queues a step on a GPU and then waits for the next batch while the GPU works. So on a GPU the data wait is
    the time there from when a batch is asked for, or from the end of the step before if that is later, to the start of
    the next step. Two events on the current stream measure it. It includes kernels that make views.

    Args:
        batch: Images per step, over all processes.
        settle: First steps, which compile kernels and fill caches, to exclude; again after each change of size.
        device: Device of the steps.

    Attributes:
        training, data: Seconds of training, and of waiting for data in them.
        images: Images of these seconds.
        by_size: Seconds and images by side of the views, where `begin` is given one.
    """

    def __init__(self, batch: int, settle: int, device: torch.device | None = None) -> None:
        self._batch, self._settle, self._settling = batch, settle, settle
        self._on_gpu = device is not None and device.type == "cuda"
        #: When each batch was asked for, and when it was there.
        self._waits: list[tuple[Mark, Mark]] = []
        self.training = self.data = 0.0
        self.images = 0
        self.by_size: dict[int, tuple[float, int]] = {}
        self._size: int | None = None
        self._restart()

    def begin(self, size: int | None = None) -> None:
        """Start counting now, with views of this side if it changes during the run."""
        if size is not None and self._size not in (None, size):
            self._settle = self._settling
        self._size = size
        self._restart()

    def _restart(self) -> None:
        self._from, self._steps = time.perf_counter(), 0
        self._waits.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context around the request for a batch."""
        asked = mark(cuda=self._on_gpu)
        yield
        self._waits.append((asked, mark(cuda=self._on_gpu)))

    def step(self) -> None:
        """Count a step."""
        if self._settle:
            self._settle -= 1
            self._restart()
            return
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Exclude the last so many seconds."""
        self._from += seconds

    def pop(self) -> dict[str, float]:
        """Since the last call: ``data_wait``, a fraction, and ``images_per_second`` if steps were counted."""
        for _, ready in self._waits[-1:]:
            if isinstance(ready, torch.cuda.Event):
                ready.synchronize()
        waited, steps = sum(seconds_between(*wait) for wait in self._waits), self._steps
        spent = max(time.perf_counter() - self._from, waited, 1e-9)
        self._restart()
        values = {"data_wait": waited / spent}
        if steps:
            self.training += spent
            self.data += waited
            self.images += steps * self._batch
            if self._size is not None:
                seconds, images = self.by_size.get(self._size, (0.0, 0))
                self.by_size[self._size] = seconds + spent, images + steps * self._batch
            values["images_per_second"] = steps * self._batch / spent
        return values

    @property
    def images_per_second(self) -> float:
        """Images per second over the whole run."""
        return self.images / max(self.training, 1e-9)

    @property
    def images_per_second_by_size(self) -> dict[str, float]:
        """Images per second by side of the views, smallest first; empty if it does not change."""
        return {str(size): images / max(seconds, 1e-9) for size, (seconds, images) in sorted(self.by_size.items())}

    @property
    def data_wait(self) -> float:
        """Fraction of time waiting for data over the whole run."""
        return self.data / max(self.training, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        by_size = {"by_size": dict(self.by_size)} if self.by_size else {}
        return {"seconds": {"training": self.training, "data": self.data, **by_size}, "images_timed": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load from a checkpoint."""
        self.training, self.data = state["seconds"]["training"], state["seconds"]["data"]
        self.images = state["images_timed"]
        self.by_size = {size: tuple(pair) for size, pair in state["seconds"].get("by_size", {}).items()}
