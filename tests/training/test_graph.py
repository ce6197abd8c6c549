"""The replayed step without a GPU: a stand-in for CUDA graphs that replays what it recorded, on the buffers it had."""

from __future__ import annotations

import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from synco_fast.methods.base import StepInputs
from synco_fast.training.step.compiled import GRAPH_WARMUP, GraphedStep
from synco_fast.training.step.parallel import DDP_GRAPH_WARMUP

CPU = torch.device("cpu")


class Recorder:
    """Runs a step, and keeps the call so that a replay computes again from the same tensors."""

    def __init__(self):
        self.seen, self.calls, self.capturing, self.fails = [], [], None, False
        self.graphs, self.current = weakref.WeakSet(), None

    def compute(self, inputs, step, epoch, momentum):
        if self.fails and self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def values():
            sums = [float(tensor.sum()) for part in inputs[:3] for tensor in part]
            return int(step), epoch, round(float(momentum), 4), sums, inputs.image_ids.tolist()

        if self.capturing is not None:
            self.capturing.recorded = lambda: self.seen.append(values())
        else:
            self.seen.append(values())


@pytest.fixture
def cuda(monkeypatch):
    recorder = Recorder()

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            pass

    class Graph:
        recorded = staticmethod(lambda: None)

        def __init__(self):
            recorder.graphs.add(self)

        def replay(self):
            recorder.calls.append("replay")
            self.recorded()

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert stream.device == CPU, "not a stream of the device of an earlier capture"
        recorder.calls.append("capture")
        recorder.capturing, before = graph, recorder.current
        recorder.current = stream
        try:
            yield
        finally:
            recorder.capturing = None
        recorder.current = before  # as in PyTorch, not after a failure

    recorder.current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: recorder.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(recorder, "current", stream))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return recorder


def inputs(number):
    one = torch.full((2, 3), float(number))
    return StepInputs((one,), (one + 1,), (torch.tensor([number, 0]),), torch.tensor([number, number + 1]))


def expected(number, key):
    return (number, key, round(0.9 + number / 1000, 4), [6 * number, 6 * number + 6, number], [number, number + 1])


def run(step, numbers, key=0):
    for number in numbers:
        step(inputs(number), number, key, 0.9 + number / 1000)


def test_a_replay_computes_the_step_at_hand(cuda):
    notes = []
    run(GraphedStep(cuda.compute, CPU, notes.append), range(GRAPH_WARMUP + 3))
    assert cuda.calls == ["capture", "replay", "replay", "replay"]
    assert cuda.seen == [expected(number, 0) for number in range(GRAPH_WARMUP + 3)]
    assert notes == []


def test_each_graph_key_has_a_graph_of_its_own(cuda):
    step = GraphedStep(cuda.compute, CPU, lambda line: None)
    for key in (0, 10, 0, 10):
        run(step, range(GRAPH_WARMUP + 1), key)
    assert cuda.calls.count("capture") == 2
    assert [one[1] for one in cuda.seen] == [key for key in (0, 10, 0, 10) for _ in range(GRAPH_WARMUP + 1)]


def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(cuda):
    notes = []
    cuda.fails = True
    run(GraphedStep(cuda.compute, CPU, notes.append), range(GRAPH_WARMUP + 3))
    assert notes == ["CUDA graph disabled: a step cannot be captured: operation not permitted when stream is capturing"]
    assert cuda.seen == [expected(number, 0) for number in range(GRAPH_WARMUP + 3)]


def test_a_failed_capture_leaves_stream_and_generator_as_they_were(cuda, monkeypatch):
    class Generator:
        """As in PyTorch 2.11, a failed capture leaves its state in the capture; a clone is not in it."""

        captured = True

        def clone_state(self):
            clone = Generator()
            clone.captured = False
            return clone

        def graphsafe_set_state(self, other):
            self.captured = other.captured

    others, own = Generator(), Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (others, own))
    cuda.fails, before = True, cuda.current
    run(GraphedStep(cuda.compute, CPU, lambda line: None), range(GRAPH_WARMUP + 2))
    assert cuda.current is before
    assert (others.captured, own.captured) == (False, True), "that of the device"


def test_released_graphs_are_gone_and_later_steps_capture_again(cuda):
    step = GraphedStep(cuda.compute, CPU, lambda line: None)
    run(step, range(GRAPH_WARMUP + 1))
    assert len(cuda.graphs) == 1
    step.release()
    assert not cuda.graphs, "nothing else may hold them: NCCL waits for graphs of its exchanges"
    run(step, range(GRAPH_WARMUP + 1))
    assert cuda.calls == ["capture", "replay"] * 2


def test_several_processes_warm_up_for_longer_and_replay_together_or_not_at_all(cuda):
    notes, asked = [], []

    def agree(works):
        asked.append(works)
        return works and len(asked) == 1

    step = GraphedStep(cuda.compute, CPU, notes.append, DDP_GRAPH_WARMUP, agree)
    run(step, range(13))
    assert cuda.calls == ["capture", "replay", "replay"], "eleven eager steps, as PyTorch asks of DDP"
    run(step, range(13, 26), key=1)  # another graph, which fails elsewhere
    assert (asked, step.works) == ([True, True], False)
    assert notes == ["CUDA graph disabled: a step cannot be captured: so says another process"]
    run(step, range(26, 28))
    assert cuda.calls.count("replay") == 2, "the first graph is not replayed either"
    assert cuda.seen == [expected(number, int(13 <= number < 26)) for number in range(28)]
