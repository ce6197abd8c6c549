"""SimCLR: the loss is the paper's, the gradient reaches the whole batch, and a run learns and resumes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.config import build_config
from synco_fast.methods.base import Encoders, StepInputs
from synco_fast.methods.build import build_method
from synco_fast.methods.simclr import nt_xent
from synco_fast.runtime.errors import ConfigError

from ..conftest import TINY
from ..support.job import losses, run_job
from ..support.training import assert_identical, newest, pretrain, stop_after, trainer

SIMCLR = {"method.name": "simclr", "training.batch": 16, "optimizer.lr": 1.0}


def embeddings(rows=10, dim=6):
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def test_the_loss_is_that_of_the_paper_written_with_loops():
    z, t = embeddings(), 0.3
    half, expected = len(z) // 2, []
    for i in range(len(z)):
        j = (i + half) % len(z)
        others = sum(math.exp(float(z[i] @ z[k]) / t) for k in range(len(z)) if k != i)
        expected.append(-math.log(math.exp(float(z[i] @ z[j]) / t) / others))
    output = nt_xent(z, t)
    assert output.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert output.metrics["similarity/positive"].item() == pytest.approx(float((z[:half] * z[half:]).sum(1).mean()))


def test_the_accuracy_counts_partners_that_are_nearest():
    z = torch.eye(4)[[0, 1, 0, 2]]
    assert nt_xent(z, 0.5).metrics["top1"].item() == 0.5, "the first image's two views alone have found one another"


def test_a_step_takes_the_temperature_of_the_run_and_float32_unit_rows():
    model = build_method(build_config(TINY, {"method.name": "simclr", "method.temperature": 0.5}))
    first, second = (5 * embeddings(8).view(2, 4, 6)).bfloat16()
    inputs = StepInputs((first,), (second,), (), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        output = model.loss(inputs, Encoders(lambda views: views, lambda views: views), step=0, epoch=0)
    assert output.loss == nt_xent(normalize(torch.cat([first, second]).float(), dim=1), 0.5).loss


def test_micro_batches_would_take_negatives_away(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.accumulate: found 2, expected 1 with method\.name simclr"):
        trainer(tiny({**SIMCLR, "training.accumulate": 2}), tmp_path / "run")


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit(tiny, tmp_path):
    config = tiny({**SIMCLR, "training.epochs": 12, "evaluation.every": 12, "training.log_every": 4})
    summary = pretrain(config, tmp_path / "whole")
    assert summary.knn_after > summary.knn_before
    trainer(config, tmp_path / "parts", after_step=stop_after(11)).run()
    pretrain(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    train = losses(tmp_path / "whole")
    assert train[-1] < train[0] - 0.3
    assert "acc " in (tmp_path / "parts" / "screen.txt").read_text()


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(tiny, tmp_path):
    """Negatives and gradients reach across: without a gradient through the gather the second step would differ."""
    config = tiny(
        {
            **SIMCLR,
            "evaluation.every": 0,
            "training.max_steps": 4,
            "training.epochs": 4,
            "augment.size": 64,
            "augment.evaluation_resize": 64,
            "model.batch_norm_groups": 4,
            "optimizer.lr": 0.1,
        }
    )
    alone, job = run_job(1, config, tmp_path / "alone"), run_job(2, config, tmp_path / "job")
    assert job.codes == [0, 0], job.words
    assert torch.allclose(losses(tmp_path / "alone"), losses(tmp_path / "job"), atol=2e-4)
    for name, value in alone.states[0].items():
        if isinstance(value, torch.Tensor) and "running" not in name and "num_batches" not in name:
            assert torch.allclose(job.states[0][name], value, atol=2e-4), name
            assert torch.equal(job.states[0][name], job.states[1][name]), name
