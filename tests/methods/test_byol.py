"""BYOL: the predictor learns, targets have no gradient, and a run learns without collapse and resumes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.config import build_config
from synco_fast.methods.base import Encoders, Views
from synco_fast.methods.build import build_method
from synco_fast.training.run.metrics import read_metrics
from tests.support.rotation import in_turn

from ..conftest import TINY
from ..support.job import losses, run_job
from ..support.training import assert_identical, newest, pretrain, stop_after, trainer

BYOL = {
    "method.name": "byol",
    "training.batch": 16,
    "optimizer.lr": 1.0,
    "model.hidden": 32,
    "model.momentum": 0.9,
    "model.momentum_schedule": "cosine",
}


def method(**changes):
    return build_method(build_config(TINY, {**BYOL, "model.batch_norm_groups": 1, **changes}))


def step(model, micro_batches=1):
    first, second = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = model.shard(Views(first, second, torch.arange(8)), step=0)
    encode = Encoders(model.trainable, model.target)
    model.begin_step(inputs, encode, momentum=0.5, micro_batches=micro_batches)
    outputs = [
        model.loss(inputs, encode, step=0, epoch=0, micro_batch=part, micro_batches=micro_batches)
        for part in range(micro_batches)
    ]
    return first, second, outputs


def test_the_loss_is_that_of_the_paper_in_both_directions():
    model = method().eval()
    first, second, (output,) = step(model)
    expected = 0
    for one, other in ((first, second), (second, first)):
        p = normalize(model.predictor(model.encoder(one)), dim=1)
        z = normalize(model.key_encoder(other), dim=1)
        expected += (p - z).square().sum(dim=1).mean()
    assert torch.allclose(output.loss, expected, atol=1e-5)
    z = normalize(model.key_encoder(torch.cat([second, first])), dim=1)
    assert torch.allclose(output.metrics["embedding_std"], z.std(dim=0).mean() * 16**0.5)


def test_projector_and_predictor_are_those_of_the_paper_and_of_the_seed():
    shapes = [tuple(value.shape) for value in method(**{"model.hidden": 24}).predictor.parameters()]
    assert shapes == [(24, 16), (24,), (24,), (24,), (16, 24), (16,)]
    assert [type(layer).__name__ for layer in method().encoder.head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    one, again, other = (method(seed=seed) for seed in (0, 0, 1))
    for part in ("encoder.head.0.weight", "predictor.0.weight"):
        assert torch.equal(one.get_parameter(part), again.get_parameter(part))
        assert not torch.equal(one.get_parameter(part), other.get_parameter(part))


def test_the_gradient_reaches_encoder_and_predictor_alone():
    model = method()
    step(model)[2][0].loss.backward()
    assert all(parameter.grad is not None for parameter in [*model.encoder.parameters(), *model.predictor.parameters()])
    assert all(parameter.grad is None for parameter in model.key_encoder.parameters())


def test_micro_batches_are_the_batch():
    """In evaluation mode, where batch norm does not tell them apart."""
    model = method().eval()
    (whole,), parts = step(model)[2], step(model, micro_batches=2)[2]
    assert torch.allclose(whole.loss, sum(part.loss for part in parts) / 2, atol=1e-5)


def test_the_target_is_the_ema_of_the_encoder():
    model = method()
    before = [parameter.clone() for parameter in model.key_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1)
    step(model)
    for old, now, online in zip(before, model.key_encoder.parameters(), model.encoder.parameters(), strict=True):
        assert torch.allclose(now, 0.5 * old + 0.5 * online, atol=1e-6)


@pytest.mark.slow
def test_a_run_learns_without_collapse_and_resumes_to_the_bit(tiny, tmp_path):
    config = tiny({**BYOL, "training.epochs": 12, "evaluation.every": 12, "training.log_every": 4})
    summary = pretrain(config, tmp_path / "whole")
    assert summary.knn_after > summary.knn_before
    trainer(config, tmp_path / "parts", after_step=stop_after(11)).run()
    pretrain(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    lines = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["embedding_std"] > 0.5, "1 is spread evenly, 0 is collapse"
    assert {"key_momentum", "gradient_norm", "parameter_norm"} <= lines[-1].keys()
    assert lines[-1]["alignment"] == pytest.approx(2 - 2 * lines[-1]["similarity/positive"])
    assert not {"queue_age", "key_rank"} & lines[-1].keys(), "without a queue"


@pytest.mark.slow
@in_turn(0, 2)
def test_a_job_of_two_processes_trains_one_predictor_and_resumes_to_the_bit(tiny, tmp_path):
    config = tiny({**BYOL, "evaluation.every": 0, "training.epochs": 4, "training.checkpoint_every": 3})
    whole = run_job(2, config, tmp_path / "whole")
    assert whole.codes == [0, 0], whole.words
    stopped = run_job(2, config, tmp_path / "parts", act="ask to stop")
    assert stopped.codes == [0, 0], stopped.words
    resumed = run_job(2, config, tmp_path / "parts", resume=True)
    assert "resumed from" in resumed.words[0]
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    one, other = resumed.states
    predictor = [name for name in one if name.startswith("predictor") and "running" not in name]
    assert predictor
    assert all(torch.equal(one[name], other[name]) for name in predictor)
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "parts"))
