"""The comparison that users run must itself notice what is wrong."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels import blockwise, ops, validation
from synco_fast.kernels.validation import cases, validate

CPU = torch.device("cpu")
SHAPE = (5, 300, 16, 40)


def misses(wanted=None):
    wanted = wanted or cases([SHAPE], [torch.float32, torch.bfloat16])
    return {miss for verdict in validate(["blockwise"], wanted, CPU) for miss in verdict.misses}


def damaged(monkeypatch, change):
    true = blockwise.contrast_and_gradient

    def wrong(*arguments, **named):
        return change(true(*arguments, **named))

    monkeypatch.setattr(ops.blockwise, "contrast_and_gradient", wrong)


def test_every_method_dtype_softmax_and_mask_is_met_and_passes():
    wanted = cases([SHAPE], [torch.float32, torch.bfloat16, torch.float16])
    assert {case.method for case in wanted} == {"moco", "mochi", "synco"}
    assert {case.peaked for case in wanted} == {case.masked for case in wanted} == {True, False}
    verdicts = list(validate(["blockwise", "reference"], wanted, CPU))
    assert not any(verdict.misses for verdict in verdicts)
    assert all(0 < verdict.loss_bound < 1e-4 for verdict in verdicts)
    assert {verdict.case.dtype for verdict in verdicts if verdict.backend == "reference"} == {torch.float32}
    assert all(
        0 < verdict.gradient_bound < (1e-3 if verdict.case.dtype == torch.float32 else 0.1) for verdict in verdicts
    )


def test_a_wrong_loss(monkeypatch):
    damaged(monkeypatch, lambda outputs: outputs._replace(loss=outputs.loss * (1 + 1e-4)))
    assert misses() == {"loss"}


def test_a_gradient_of_another_row(monkeypatch):
    damaged(monkeypatch, lambda outputs: outputs._replace(gradient=outputs.gradient.roll(1, 0)))
    assert misses() == {"gradient"}


def test_numbers_that_are_none(monkeypatch):
    damaged(monkeypatch, lambda outputs: outputs._replace(loss=outputs.loss * torch.nan))
    assert misses() == {"loss", "a repeat gives other bits"}


def test_other_hard_negatives(monkeypatch):
    damaged(monkeypatch, lambda outputs: outputs._replace(hard=outputs.hard - 1e-3))
    assert misses() == {"statistics.hard"}


def test_ranks(monkeypatch):
    damaged(monkeypatch, lambda outputs: outputs._replace(rank=outputs.rank + 2, queue_rank=outputs.queue_rank + 1))
    assert misses() == {"statistics.rank", "statistics.queue_rank"}


def test_repeats_that_differ(monkeypatch):
    calls = iter(range(10**6))
    damaged(monkeypatch, lambda outputs: outputs._replace(loss=outputs.loss + next(calls) % 2 * 2e-7))
    assert misses(cases([SHAPE], [torch.float32])[:1]) == {"a repeat gives other bits"}


@pytest.mark.parametrize(("setting", "expected"), [("none", 0), ("ieee", 0), ("tf32", 2.0**-10)])
def test_the_bound_of_float32_allows_for_tf32_where_pytorch_does(setting, expected):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert validation._weight_rounding(torch.float32, torch.device("cuda")) == expected
        assert validation._weight_rounding(torch.float32, torch.device("cpu")) == 0
        assert validation._weight_rounding(torch.bfloat16, torch.device("cuda")) == 2.0**-8
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
