"""Compiled steps compute what eager ones do; what cannot be compiled or captured is said."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from synco_fast.data.pipelines.base import Batch
from synco_fast.models.batch_norm import SplitBatchNorm2d
from synco_fast.training.step import compiled
from synco_fast.training.step.compiled import Compiled
from synco_fast.training.step.engine import Engine

MILD = {"training.batch": 16, "optimizer.lr": 0.05, "evaluation.every": 0, "method.warmup_epochs": 1}


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    first, second = torch.randint(0, 256, (2, 16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(first, second, torch.arange(16) + 16 * number)


def train(config, steps: int = 4):
    """The losses of a few steps, the second half of them with synthetic negatives; and what was said."""
    notes: list[str] = []
    engine, losses = Engine(config, steps_per_epoch=steps // 2, note=notes.append), []
    for step in range(steps):
        engine.step(batch(step), step, step // (steps // 2))
        losses.append(engine.means.pop()["loss"])
    return torch.tensor(losses), notes


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Everything of torch.compile but the machine code: tracing, functionalisation, graph breaks, recompilation."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_losses_are_the_same_compiled_or_not(tiny, without_a_compiler):
    plain, _ = train(tiny(MILD))
    found, notes = train(tiny({**MILD, "training.engine": "compile"}))
    assert notes == []
    assert torch.allclose(plain, found, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_machine_code_computes_the_same(tmp_path, monkeypatch):
    """Split batch norm in training, with its gradient and its statistics; a whole encoder takes over a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), SplitBatchNorm2d(4, 2), nn.ReLU())
    other, notes = copy.deepcopy(one), []
    x = torch.randn(4, 3, 8, 8)
    plain, found = one(x), Compiled(other, "the encoder", notes.append)(x)
    torch._dynamo.reset()
    assert notes == []
    assert torch.allclose(plain, found, atol=1e-5)
    for out in (plain, found):
        out.square().sum().backward()
    for a, b in zip([*one.parameters(), *one.buffers()], [*other.parameters(), *other.buffers()], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_compiled_runs_eagerly_and_is_named(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    notes: list[str] = []
    double = Compiled(lambda x: x * 2, "the encoder", notes.append)
    for _ in range(2):
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    (line,) = notes
    assert line.startswith("torch.compile failed for the encoder; running it eagerly: ")
    assert "no compiler here" in line


def test_an_error_of_the_function_is_not_hidden(without_a_compiler):
    notes: list[str] = []
    wrong = Compiled(lambda x: x.view(7), "the encoder", notes.append)
    with pytest.raises(Exception, match=r"view|shape|size"):
        wrong(torch.ones(3))


def test_a_graph_that_cannot_be_had_is_named(tiny):
    notes: list[str] = []
    engine = Engine(tiny({"training.engine": "graph"}), 4, note=notes.append)
    assert notes == ["CUDA graph disabled: no GPU"]
    assert (engine.graphed, engine.form) == (False, "eager")


def test_what_a_graph_reads_from_the_device_changes_nothing(tiny):
    """Step, momentum and loss counted on the device, as a captured step has them, against numbers on the host."""
    config = tiny({**MILD, "model.momentum_schedule": "cosine"})
    one, other = (Engine(config, 2) for _ in range(2))
    for step in range(4):
        epoch = step // 2
        one.step(batch(step), step, epoch)
        other._run = lambda inputs, step, kind, momentum: other._compute(
            inputs, torch.tensor(step), kind, torch.tensor(momentum)
        )
        other.step(batch(step), step, epoch)
        assert one.means.pop()["loss"] == pytest.approx(other.means.pop()["loss"], rel=1e-5)
    assert other.skipped.read() == (0, 0, -1)
