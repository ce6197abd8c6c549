"""A training step by itself: micro-batches, skipped steps, rates and seeds, and the state it goes on from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from synco_fast.config import build_config
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.data.seeding import derive_seed
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.optimizer import key_momentum, learning_rate

from ..conftest import TINY
from ..support.training import assert_identical


def engine(**changes):
    made = Engine(build_config(TINY, {"optimizer.lr": 8.0, "method.warmup_epochs": 0, **changes}), 4)
    made.method.train()
    return made


def batch(number, bad=False):
    generator = torch.Generator().manual_seed(number)
    first, second = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    if bad:
        first = torch.full(first.shape, torch.nan)
    return Batch(first, second, torch.arange(8) + 8 * number)


def train(made, steps):
    for step in steps:
        made.step(batch(step), step, step // 4)


def test_micro_batches_make_the_step_of_the_batch():
    """As many groups of batch norm in all: then nothing but the order of sums tells them apart."""
    whole, parts = engine(), engine(**{"training.accumulate": 2})
    for made in (whole, parts):
        train(made, [0])
    for one, other in zip(whole.trainable.parameters(), parts.trainable.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    one, other = whole.means.pop(), parts.means.pop()
    assert one.keys() == other.keys()
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-3), name


def test_gradients_are_those_of_one_step():
    """Without momentum and decay the weights move by the rate times the gradient that the log states, and no more."""
    made = engine(**{"optimizer.momentum": 0, "optimizer.weight_decay": 0, "optimizer.schedule": "constant"})
    train(made, [0])
    made.means.pop()
    before = [parameter.clone() for parameter in made.trainable.parameters()]
    train(made, [1])
    norm = torch.stack(
        [(a - b).detach().norm() for a, b in zip(before, made.trainable.parameters(), strict=True)]
    ).norm()
    assert float(norm) == pytest.approx(made.rate(1) * made.means.pop()["gradient_norm"], rel=1e-3)


def test_a_skipped_step_leaves_no_trace_but_in_its_count():
    # The EMA moves before the loss is known; at a momentum of 1 it stays.
    made = engine(**{"model.momentum": 1.0})
    train(made, [0])
    made.means.pop()
    before = {name: value.clone() for name, value in made.method.state_dict().items() if "num_batches" not in name}
    made.step(batch(1, bad=True), 1, 0)
    for name, value in before.items():
        assert torch.equal(value, made.method.state_dict()[name]), name
    assert made.means.pop() == {}
    assert made.skipped.read() == (1, 1, 1)


def test_another_engine_goes_on_from_its_state(tmp_path):
    made, other = (engine(**{"optimizer.momentum": 0.9}) for _ in range(2))
    train(made, [0, 1])
    made.step(batch(2, bad=True), 2, 0)
    state = copy.deepcopy({**made.state_dict(), "step": 3})
    other.method.load_state_dict(state["method"])
    other.load_state_dict(state, tmp_path)
    assert other.skipped.read() == made.skipped.read() == (1, 1, 2)
    assert_identical(other.state_dict(), made.state_dict())
    for one in (made, other):
        train(one, [3, 4])
    assert_identical(other.state_dict(), made.state_dict())
    assert other.means.pop() == made.means.pop()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_and_momentum_are_those_of_the_configuration(schedule, monkeypatch):
    made = engine(
        **{
            "optimizer.warmup_epochs": 0.5,
            "optimizer.schedule": schedule,
            "optimizer.clip": 3.0,
            "model.momentum": 0.5,
            "model.momentum_schedule": schedule,
        }
    )
    seen, begin = [], made.method.begin_step
    monkeypatch.setattr(
        made.method,
        "begin_step",
        lambda *given, momentum, **named: (seen.append(float(momentum)), begin(*given, momentum=momentum, **named)),
    )
    # A batch of 8 has 8 / 256 of the rate of one of 256; the run has two epochs of four steps.
    for step in range(8):
        train(made, [step])
        rate = learning_rate(step, peak=0.25, steps=8, warmup=2, schedule=schedule)
        assert {group["lr"] for group in made.optimizer.param_groups} == {rate}
    momenta = [key_momentum(step, base=0.5, steps=8, schedule=schedule) for step in range(8)]
    assert seen == momenta
    assert made.figures(8)["key_momentum"] == momenta[-1]
    assert made.update.clip == 3.0


def test_the_global_seed_follows_run_step_and_rank(monkeypatch):
    made, seen = engine(seed=5), []
    shard = made.method.shard
    monkeypatch.setattr(
        made.method, "shard", lambda views, *, step: (seen.append(torch.initial_seed()), shard(views, step=step))[1]
    )
    train(made, [0, 1])
    made.env = replace(made.env, rank=1)
    train(made, [1])
    assert seen == [derive_seed(5, 0, 0), derive_seed(5, 1, 0), derive_seed(5, 1, 1)]
    assert len(set(seen)) == 3


def test_views_are_normalised_before_the_encoders():
    made = engine()
    views = batch(0).first
    made.method.eval()
    expected = made.method.encoder(normalise(views, made.config.augment))
    assert torch.equal(made.encode.query(views), expected)


def test_the_state_has_statistics_of_all_processes(monkeypatch):
    made, called = engine(), []
    monkeypatch.setattr(made.statistics, "average", lambda: called.append(1))
    made.state_dict()
    assert called == [1]


def test_the_hash_of_replicas_sees_where_a_value_lies():
    one, other = engine(), engine()
    assert one.replica_hash() == other.replica_hash()
    other.method.queue.rows.copy_(other.method.queue.rows.roll(1, dims=0))
    assert one.replica_hash() != other.replica_hash()
