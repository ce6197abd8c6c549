"""Throughput, stops and corrupt images: the parts of a run around its steps."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.training.bad_images import CorruptImages
from synco_fast.training.run import throughput
from synco_fast.training.run.run_folder import choose_run_folder
from synco_fast.training.run.stopping import StopSignals
from synco_fast.training.run.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_throughput_counts_steps_without_settling_and_pauses(clock):
    speed = Throughput(batch=8, settle=2)
    for waited, trained in ((40, 10), (40, 10), *[(0.5, 1.5)] * 4):  # the first two compile
        with speed.waiting():
            clock[0] += waited
        clock[0] += trained
        speed.step()
    clock[0] += 30  # an evaluation
    speed.pause(30)
    assert speed.pop() == {"data_wait": pytest.approx(0.25), "images_per_second": pytest.approx(4)}
    clock[0] += 1
    assert "images_per_second" not in speed.pop(), "no step, no speed"
    assert speed.images_per_second == pytest.approx(4)
    assert speed.training == pytest.approx(8)


def test_on_a_gpu_the_data_wait_is_what_the_gpu_waits(clock, monkeypatch):
    # The host waits almost all the time, the device only from the end of a step to the start of the next one.
    device = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = device[0]

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    monkeypatch.setattr(throughput.torch.cuda, "Event", Event)
    speed = Throughput(batch=8, settle=1, device=torch.device("cuda"))
    speed.begin()

    def step():
        with speed.waiting():  # from the end of the step before on
            clock[0] += 0.95
            device[0] += 200
        clock[0] += 0.05
        device[0] += 800
        speed.step()

    step()  # settles
    for _ in range(4):
        step()
    assert speed.pop() == {"data_wait": pytest.approx(0.2), "images_per_second": pytest.approx(8)}
    device[0] += 5000  # the figures are written
    clock[0] += 5
    speed.pause(5)
    step()
    assert speed.pop() == {"data_wait": pytest.approx(0.2), "images_per_second": pytest.approx(8)}, "one step a line"
    assert speed.data_wait == pytest.approx(0.2)


def test_throughput_goes_on_after_a_checkpoint(clock):
    one, other = Throughput(8, 0), Throughput(8, 0)
    one.begin()
    with one.waiting():
        clock[0] += 1
    clock[0] += 3
    one.step()
    one.pop()
    other.load_state_dict(one.state_dict())
    other.begin()
    clock[0] += 1
    other.step()
    other.pop()
    assert other.images_per_second == pytest.approx(16 / 5)
    assert other.data_wait == pytest.approx(1 / 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_a_second_one_interrupts(number, monkeypatch):
    """Those that come together are one: of a terminal and of a study, or of Slurm and of torchrun."""
    now = [100.0]
    monkeypatch.setattr("synco_fast.training.run.stopping.time.monotonic", lambda: now[0])
    before = signal.getsignal(number)
    stopping = StopSignals(HostGroup(DistEnv()), minutes=None)
    with stopping.on_signals():
        assert not stopping.after_step(1)
        os.kill(os.getpid(), number)
        for together in (signal.SIGINT, signal.SIGTERM):
            now[0] += 0.5
            signal.raise_signal(together)
        assert stopping.after_step(2)
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert stopping.agreed
    assert stopping.received == number


def test_a_second_signal_that_python_discards_ends_the_run_where_it_next_looks(monkeypatch, capsys):
    """What a generator raises while it is finalized, as one that drains a pipeline, is discarded."""
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: print(type(raised.exc_value).__name__))
    monkeypatch.setattr("synco_fast.training.run.stopping._TOGETHER", 0.0)

    def batches():
        try:
            yield "one"
        finally:
            signal.raise_signal(signal.SIGINT)

    stopping = StopSignals(HostGroup(DistEnv()), minutes=None)
    with stopping.on_signals():
        left = batches()
        next(left)
        signal.raise_signal(signal.SIGINT)
        assert stopping.after_step(1)
        del left
        assert capsys.readouterr().out == "KeyboardInterrupt\n"
        with pytest.raises(KeyboardInterrupt):
            stopping.agree()


def test_the_first_signal_says_what_follows():
    """A step or an evaluation may take minutes, and a second signal in the meantime would lose them."""
    said, told = [], threading.Event()
    stopping = StopSignals(HostGroup(DistEnv()), minutes=None)
    with stopping.on_signals(lambda line: (said.append(line), told.set())):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert told.wait(30)
    assert said == [
        "stopping after this step or evaluation, with a checkpoint; a second Ctrl-C ends the run at once, without one"
    ]


@pytest.mark.parametrize(
    ("layout", "out", "inside"),
    [
        ("", "runs/one", True),
        ("", ".", True),
        ("train", "runs/one", False),  # beside the images
        ("train", "train/one", True),
        ("", "../elsewhere", False),
    ],
)
def test_a_run_folder_among_the_images_is_refused(layout, out, inside, tmp_path, monkeypatch):
    """Its plots would be images of the next run, and runs/ a class."""
    images = tmp_path / "images"
    (images / layout).mkdir(parents=True)
    monkeypatch.chdir(images)
    for source in (".", str(images)):
        if inside:
            with pytest.raises(ConfigError, match=rf"^out: found {re.escape(out)} inside .*, expected --out with"):
                choose_run_folder(Path(out), "demo", source)
        else:
            assert choose_run_folder(Path(out), "demo", source) == Path(out)
    assert choose_run_folder(Path(out), "demo", "demo") == Path(out)


class Processes:
    """Stands for the communication of two processes: the other one's wish and time, and how often they exchanged."""

    env = DistEnv(world=2)

    def __init__(self) -> None:
        self.exchanges, self.other = 0, (0, 0)

    def max(self, *numbers: int) -> tuple[int, ...]:
        self.exchanges += 1
        return tuple(map(max, numbers, self.other))


@pytest.mark.parametrize(
    ("own", "other", "between"),
    [(4.0, 0.0, 1), (0.01, 4.0, 1), (0.3, 0.2, 3), (0.01, 0.01, 10), (0.0, 0.0, 10)],
    ids=["slow", "the other is slow", "between", "fast", "no time"],
)
def test_processes_agree_about_once_a_second_and_after_ten_steps_at_the_latest(monkeypatch, own, other, between):
    """torchrun kills 30 s after SIGTERM: ten steps of four seconds would not get to a checkpoint."""
    clock, control = [0.0], Processes()
    monkeypatch.setattr("synco_fast.training.run.stopping.time.monotonic", lambda: clock[0])
    stopping = StopSignals(control, minutes=None)
    exchanged, since = [], 0.0
    for step in range(1, 41):
        clock[0], since = clock[0] + own, since + other
        control.other = (0, round(1e6 * since))
        before = control.exchanges
        assert not stopping.after_step(step)
        if control.exchanges > before:
            exchanged.append(step)
            since = 0.0
    assert exchanged[:2] == [1, 1 + between], "the first step is timed"
    assert {later - earlier for earlier, later in itertools.pairwise(exchanged)} == {between}
    control.other = (1, 0)
    assert any(stopping.after_step(step) for step in range(41, 41 + between)), "the other one's wish is met by then"


def test_hanging_up_asks_as_often_as_it_comes_and_nohup_keeps_it_away():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            stopping = StopSignals(HostGroup(DistEnv()), minutes=None)
            with stopping.on_signals():
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGHUP)
                assert stopping.agree() == asked
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


#: Says a word to a terminal that is gone, as the progress of a step does, and leaves a file if that was no error.
WRITER = """
import sys, time
from types import SimpleNamespace
from synco_fast.training.run.stopping import StopSignals
stopping = StopSignals(SimpleNamespace(max=lambda *wishes: wishes), None)
with stopping.on_signals():
    print("ready", flush=True)
    while not stopping.agree():
        time.sleep(0.01)
    print("a step more", flush=True)
    print("an error", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write(str(stopping.agree()))
"""


def without_nohup() -> None:
    """A test under nohup would hand on that SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_terminal_that_is_gone_does_not_end_the_last_step(tmp_path):
    """A shell passes SIGHUP on; the next line of output would fail with EIO."""
    terminal, inside = os.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "asked")], stdout=inside, stderr=inside, preexec_fn=without_nohup
    )
    os.close(inside)
    assert b"ready" in os.read(terminal, 99)
    os.close(terminal)
    program.send_signal(signal.SIGHUP)
    assert program.wait(60) == 0
    assert (tmp_path / "asked").read_text() == "True"


#: A data loader's worker, and a parent that is killed: before the worker is set up (argument 1) or after it.
PARENT = """
import multiprocessing, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from synco_fast.data.workers import start_worker

def work():
    parent = os.getppid()
    (folder / "pid").write_text(str(os.getpid()))
    while early and os.getppid() == parent:
        time.sleep(0.01)
    start_worker(0)
    (folder / "ready").touch()
    time.sleep(600)

folder, early = Path(sys.argv[1]), sys.argv[2] == "early"
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_worker_dies_with_a_parent_that_is_killed(tmp_path, when):
    program = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), when])
    wait_until(lambda: (tmp_path / ("pid" if when == "early" else "ready")).exists())
    wait_until(lambda: (tmp_path / "pid").read_text())
    worker = Path("/proc") / (tmp_path / "pid").read_text()
    program.kill()
    program.wait()
    wait_until(lambda: not worker.exists() or ") Z " in (worker / "stat").read_text())
    assert (tmp_path / "ready").exists() == (when == "late")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_time_limit_stops():
    assert not StopSignals(HostGroup(DistEnv()), minutes=60).after_step(1)
    assert StopSignals(HostGroup(DistEnv()), minutes=0).after_step(1)


def test_a_limit_of_steps_stops_without_an_exchange():
    control = Processes()
    stopping = StopSignals(control, minutes=None, at=2)
    stopping.begin(0)
    assert [stopping.after_step(step) for step in (1, 2)] == [False, True]
    assert control.exchanges == 1
    stopping.begin(2)
    assert stopping.agreed


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


def test_corrupt_images_of_all_ranks_count_and_a_resumed_run_names_none_again():
    notes = []
    one = CorruptImages(100, 0.02, notes.append)
    one.replaced({1: "a.jpg: cut short"})
    one.excluded(["e.jpg: empty"])
    others = SimpleNamespace(max=lambda number: (1,), gather=lambda found: [found, {2: "b.jpg: empty"}])
    one.share(others)
    assert len(one) == 2
    assert len(notes) == 3
    other = CorruptImages(100, 0.02, notes.append)
    other.load_state_dict(one.state_dict())
    other.replaced({1: "a.jpg: cut short"})
    other.excluded(["e.jpg: empty"])
    assert (len(other), len(notes)) == (2, 3)
    others.gather = lambda found: [found, {3: "c.jpg: empty"}]
    with pytest.raises(DataError, match="found 3 corrupt images"):
        other.share(others)
