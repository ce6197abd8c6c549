"""The dtype of the queue: what a configuration makes of it, in a step, and across a stop."""

from __future__ import annotations

import pytest
import torch

from synco_fast.config import build_config
from synco_fast.loss import SynthContrastLoss
from synco_fast.methods.build import build_method
from synco_fast.methods.contrastive import ContrastSettings
from synco_fast.models.queue import KeyQueue
from synco_fast.runtime import precision
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.precision import resolve_queue_dtype

from ..conftest import TINY
from ..support.training import newest, screen, trainer
from .test_contrastive import advance

HALF = {"method.queue_dtype": "bfloat16"}


def test_auto_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for fast in (True, False):
        monkeypatch.setattr(precision, "_has_fast_bf16", lambda device, fast=fast: fast)
        assert resolve_queue_dtype("auto", cpu) == torch.float32
        assert resolve_queue_dtype("auto", cuda) == (torch.bfloat16 if fast else torch.float32)
    for name in ("float32", "bfloat16", "float16"):
        assert resolve_queue_dtype(name, cpu) == resolve_queue_dtype(name, cuda) == getattr(torch, name)
    with pytest.raises(ConfigError, match=r"method.queue_dtype: found 'half', expected 'auto', 'float32'"):
        build_config(TINY, {"method.queue_dtype": "half"})


def test_the_settings_say_so():
    assert ContrastSettings.of(build_config(TINY)).queue_dtype == torch.float32
    assert ContrastSettings.of(build_config(TINY, HALF)).queue_dtype == torch.bfloat16


def test_keys_are_rounded_when_they_enter():
    queue, keys = KeyQueue(5, 8, dtype=torch.bfloat16), torch.rand(3, 8)
    assert torch.equal(queue.rows, KeyQueue(5, 8).rows.bfloat16())
    queue.enqueue(keys, torch.arange(3), torch.tensor(True))
    assert torch.equal(queue.rows[:3], keys.bfloat16())


def test_a_step_hands_the_loss_what_is_rounded_and_learns_in_float32(monkeypatch):
    from synco_fast.methods import contrastive

    model = build_method(build_config(TINY, {"training.epochs": 4, **HALF}))
    true, given = contrastive.synthetic_contrast, []

    def watched(q, k, queue, *arguments, **named):
        found = true(q, k, queue, *arguments, **named)
        given.append((q.dtype, k.dtype, queue.dtype, named["operand_dtype"], found.loss.dtype))
        return found

    monkeypatch.setattr(contrastive, "synthetic_contrast", watched)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    for step in range(2):
        advance(model, optimizer, step)
    assert given == [(torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)] * 2
    assert model.queue.rows.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in model.encoder.parameters()} == {torch.float32}


def test_a_run_goes_on_in_the_other_dtype_and_says_so(tiny, tmp_path):
    folder, before = tmp_path / "run", None
    for steps, name in enumerate(("float32", "bfloat16", "float32"), start=1):
        changes = {"training.epochs": 1, "training.max_steps": steps, "evaluation.every": 0, "method.queue_dtype": name}
        console, text = screen()
        run = trainer(tiny(changes), folder, resume=None if before is None else folder, console=console)
        if before is not None:
            assert torch.equal(run.task.method.queue.rows, before.to(getattr(torch, name)))
            found = str(before.dtype).removeprefix("torch.")
            assert f"method.queue_dtype: converting the checkpoint's queue from {found} to {name}" in text.getvalue()
        if steps == 3:
            return
        run.run()
        before = newest(folder)["method"]["queue.rows"]
        assert before.dtype == getattr(torch, name)


def test_auto_keeps_the_dtype_that_a_run_began_with(tiny):
    method = build_method(tiny())
    state = build_method(tiny(HALF)).state_dict()
    (line,) = method.adapt_state(state, keep=True)
    assert line.startswith("method.queue_dtype: the run keeps bfloat16")
    assert method.queue.rows.dtype == method.operand_dtype == state["queue.rows"].dtype == torch.bfloat16
    method.load_state_dict(state)
    assert method.adapt_state(state, keep=True) == []


def test_an_odd_queue_of_halves_has_a_hash(tiny):
    from synco_fast.training.step.engine import Engine

    config = tiny({**HALF, "method.queue": 33, "model.dim": 15, "training.batch": 8})
    engine = Engine(config, steps_per_epoch=4)
    before = engine.replica_hash()
    engine.method.queue.rows[32, 14] += 1
    assert engine.replica_hash() != before


def test_the_module_for_loops_of_ones_own():
    one, other = (
        SynthContrastLoss(dim=16, queue=64, method="moco", queue_dtype=kind) for kind in (torch.float32, torch.bfloat16)
    )
    q, k = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    losses = [loss(q, k) for loss in (one, other)]
    assert losses[1].dtype == torch.float32
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
    assert other.queue.rows.dtype == torch.bfloat16
