"""Heartbeats: each rank signals that it is alive, and notices ranks that no longer do.

A collective with a stopped rank ends after its timeout. Ranks also wait without one: an evaluation of rank 0 may take
hours. And the cleanup after an error can block on the same stopped rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from threading import Event, Lock, Thread

from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["Heartbeat"]

#: Beats in a timeout.
_BEATS = 20
#: Timeouts until a silent rank counts as lost. Over gloo, collectives fail after one, with a more precise message.
_PATIENCE = 1.25
#: Seconds to wait for a thread that may be stuck.
_JOIN = 1
#: Last value of a rank that has finished.
_FINISHED = b"finished"


class Heartbeat:
    """Heartbeats between `start` and `stop`.

    There are two threads: the one that uses the store blocks if the store's host hangs.

    Args:
        store: Shared by all ranks, over a connection that nothing else uses.
        rank, world: Rank of this process, and W.
        timeout: Seconds.
        give_up: Called once, in a thread, when ranks have been silent for 1.25 timeouts: with these ranks and the
            seconds. Time in which this process was stopped itself does not count.
    """

    def __init__(
        self, store: Store, rank: int, world: int, timeout: float, give_up: Callable[[list[int], float], None]
    ) -> None:
        self._store, self._rank, self._give_up = store, rank, give_up
        self._keys = [f"beat/{number}" for number in range(world)]
        self._interval, self._limit = timeout / _BEATS, timeout * _PATIENCE
        self._heard = [time.monotonic()] * world
        self._lock, self._stopped = Lock(), Event()
        self._finished = False
        self._threads = [Thread(target=work, daemon=True) for work in (self._beat, self._judge)]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, *, finished: bool) -> None:
        """Stop both threads; ``finished`` tells the other ranks not to expect this one any more."""
        self._finished = finished
        self._stopped.set()
        for thread in self._threads:
            thread.join(_JOIN)

    def _beat(self) -> None:
        found: list[bytes] = [b""] * len(self._keys)
        try:
            for number in count(1):
                self._store.set(self._keys[self._rank], str(number))
                if self._store.check(self._keys):
                    before, found = found, self._store.multi_get(self._keys)
                    self._listen(before, found)
                if self._stopped.wait(self._interval):
                    break
            if self._finished:
                self._store.set(self._keys[self._rank], _FINISHED.decode())
        except RuntimeError:
            return  # the store is gone: all ranks are silent from now on

    def _listen(self, before: list[bytes], found: list[bytes]) -> None:
        """Note which ranks have written something new since the last time."""
        now = time.monotonic()
        with self._lock:
            for other, (old, new) in enumerate(zip(before, found, strict=True)):
                if old != new:
                    self._heard[other] = math.inf if new == _FINISHED else now

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            stopped, looked = now - looked - self._interval, now
            with self._lock:
                if stopped > self._interval:
                    self._heard = [heard + stopped for heard in self._heard]
                silent = [number for number, heard in enumerate(self._heard) if now - heard > self._limit]
            silent = [number for number in silent if number != self._rank]
            if silent:
                self._give_up(silent, self._limit)
                return
