"""Throughput, stops and corrupt images: the parts of a run around its steps."""

from __future__ import annotations

import os
import signal

import pytest

from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import DataError
from synco_fast.training import throughput
from synco_fast.training.bad_images import CorruptImages
from synco_fast.training.stopping import StopSignals
from synco_fast.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_throughput_counts_steps_without_settling_and_pauses(clock):
    speed = Throughput(batch=8, settle=2)
    for _ in range(2):
        clock[0] += 50  # compiling
        speed.step(40)
    for _ in range(4):
        clock[0] += 2
        speed.step(0.5)
    clock[0] += 30  # an evaluation
    speed.pause(30)
    assert speed.pop() == {"data_wait": pytest.approx(0.25), "images_per_second": pytest.approx(4)}
    clock[0] += 1
    assert "images_per_second" not in speed.pop(), "no step, no speed"
    assert speed.images_per_second == pytest.approx(4)
    assert speed.training == pytest.approx(8)


def test_throughput_goes_on_after_a_checkpoint(clock):
    one, other = Throughput(8, 0), Throughput(8, 0)
    one.begin()
    clock[0] += 4
    one.step(1)
    one.pop()
    other.load_state_dict(one.state_dict())
    other.begin()
    clock[0] += 1
    other.step(0)
    other.pop()
    assert other.images_per_second == pytest.approx(16 / 5)
    assert other.data_wait == pytest.approx(1 / 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_a_second_one_interrupts(number):
    before = signal.getsignal(number)
    stopping = StopSignals(HostGroup(DistEnv()), minutes=None)
    with stopping.on_signals():
        assert not stopping.after_step(1)
        os.kill(os.getpid(), number)
        assert stopping.after_step(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert stopping.agreed


def test_a_time_limit_stops():
    assert not StopSignals(HostGroup(DistEnv()), minutes=60).after_step(1)
    assert StopSignals(HostGroup(DistEnv()), minutes=0).after_step(1)


def test_corrupt_images_are_named_once_and_too_many_end_the_run():
    said = []
    found = CorruptImages(100, 0.02, said.append)
    found.replaced({3: "a.jpg: cut short"})
    found.replaced({3: "a.jpg: cut short", 5: "b.jpg: no image"})
    found.excluded(["a.jpg: cut short", "c.jpg: no image"])
    assert len(found) == 2
    assert [line.split(": ")[1] for line in said] == ["a.jpg", "b.jpg", "c.jpg"]
    again = CorruptImages(100, 0.02, said.append)
    again.load_state_dict(found.state_dict())
    again.replaced({3: "a.jpg: cut short"})
    assert len(said) == 3
    with pytest.raises(DataError, match="found 3 corrupt images"):
        again.replaced({7: "d.jpg: no image"})


def test_a_single_corrupt_image_never_ends_a_run():
    CorruptImages(10, 0.0, lambda line: None).replaced({0: "a.jpg: cut short"})
