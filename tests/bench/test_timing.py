"""Timing on a CPU, and on a GPU by what is asked of it."""

from __future__ import annotations

import mmap
import time
import weakref
from functools import partial

import pytest
import torch

from synco_fast.bench import timing
from synco_fast.bench.timing import peak_memory, reset_peak_memory, seconds_of
from tests.support.graphs import stand_in

CPU = torch.device("cpu")


def test_warm_up_runs_are_not_counted():
    calls = []
    assert len(seconds_of(lambda: calls.append(time.perf_counter()), CPU, repeats=3, warmup=2)) == 3
    assert len(calls) == 5


def test_peak_memory_sees_what_was_held_in_between():
    before = reset_peak_memory(CPU)
    # Pages that no allocator held from an earlier test.
    with mmap.mmap(-1, 64 << 20) as pages:
        for begin in range(0, len(pages), 4096):
            pages[begin] = 1
    assert peak_memory(CPU) - before > 48 << 20


def test_a_cold_cache_is_read_through_and_never_written(monkeypatch):
    """A cache that was written through would be written back while the timed work runs."""
    log = []

    class Event:
        def __init__(self, **options):
            pass

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 1.0

    class Flush:
        def __getattr__(self, name):
            return lambda *arguments: log.append(name)

    def zeros(count, *, device):
        assert count * 4 == 2 * 50_000_000
        return Flush()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"L2_cache_size": 50_000_000})
    )
    monkeypatch.setattr(timing.torch, "zeros", zeros)
    found = seconds_of(lambda: log.append("run"), torch.device("cuda"), repeats=2, warmup=1, cold=True)
    assert found == [1e-3, 1e-3]
    assert log == ["run", *["sum", "event", "run", "event"] * 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_holds_as_many_copies_as_asked():
    device = torch.device("cuda")
    count = torch.zeros((), device=device)
    replay = timing.capture(lambda: count.add_(1), device, copies=5)
    before = count.item()
    replay()
    assert count.item() == before + 5


def test_a_graph_keeps_the_tensors_that_it_reads(monkeypatch):
    """A graph holds addresses: freed, they would be read and written all the same."""
    stand_in(monkeypatch)
    read = torch.zeros(2)
    alive = weakref.ref(read)
    replay = timing.capture(partial(torch.Tensor.sum, read), CPU)
    del read
    assert alive() is not None
    del replay
    assert alive() is None


def test_seconds_in_a_graph_are_those_of_one_copy(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "capture", lambda run, device, copies: lambda: [run() for _ in range(copies)])
    monkeypatch.setattr(timing, "seconds_of", lambda replay, device, repeats: replay() and [6.0, 8.0, 20.0][:repeats])
    assert timing.graph_seconds(lambda: calls.append(1), CPU, copies=4, repeats=3) == 2.0
    assert len(calls) == 4
