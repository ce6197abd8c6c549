"""A rank that says nothing is given up; one that has left, or a pause of one's own, is no reason to."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from synco_fast.runtime import heartbeat
from synco_fast.runtime.heartbeat import Heartbeat


class Job:
    """Ranks over one store, each a heartbeat of this process."""

    def __init__(self, world: int, timeout: float) -> None:
        store = dist.HashStore()
        self.found: list[tuple[int, list[int], float]] = []
        self.given_up = threading.Event()
        self.ranks = [Heartbeat(store, rank, world, timeout, self.give_up_by(rank)) for rank in range(world)]
        for rank in self.ranks:
            rank.start()

    def give_up_by(self, rank: int):
        def give_up(silent: list[int], seconds: float) -> None:
            self.found.append((rank, silent, seconds))
            self.given_up.set()

        return give_up


def test_a_silent_rank_is_named_and_one_that_has_left_is_not():
    job = Job(3, timeout=0.4)
    job.ranks[2].stop(finished=True)
    assert not job.given_up.wait(1)
    job.ranks[1].stop(finished=False)
    assert job.given_up.wait(60)
    job.ranks[0].stop(finished=True)
    assert job.found == [(0, [1], 0.5)]


def test_time_in_which_this_process_was_stopped_does_not_count(monkeypatch):
    """The clock jumps, as after SIGCONT: the others were stopped with this one."""
    jump = [0.0]
    real = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: real() + jump[0])
    job = Job(2, timeout=2)
    time.sleep(0.3)
    jump[0] = 1000
    assert not job.given_up.wait(1)
    for rank in job.ranks:
        rank.stop(finished=True)
