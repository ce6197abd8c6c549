"""The comparison that users run must itself notice what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from synco_fast.cli import main
from synco_fast.kernels.norm import ops, reference
from synco_fast.kernels.norm.validation import NormCase, norm_cases, validate_norm

CPU = torch.device("cpu")
CASE = NormCase((6, 8, 5, 4), 2, True, True, torch.float32)


def misses(case=CASE):
    return {miss for verdict in validate_norm([case], CPU, ["reference"]) for miss in verdict.misses}


def damaged(monkeypatch, change):
    true = reference.batch_norm

    def wrong(given):
        y = true(given)
        return y if given.x.dtype == torch.float64 else change(y, given)

    monkeypatch.setattr(ops.reference, "batch_norm", wrong)


def test_every_kind_is_met_and_passes():
    wanted = norm_cases([torch.float32, torch.bfloat16, torch.float16], large=False)
    assert {(case.relu, case.residual) for case in wanted} == {(False, False), (True, False), (True, True)}
    assert {case.training for case in wanted} == {True, False}
    assert {case.mean for case in wanted} == {1.0, 1000.0}
    some = [case for case in wanted if case.shape[0] * case.shape[1] < 1000]
    verdicts = list(validate_norm(some, CPU))
    assert not [verdict.as_dict() for verdict in verdicts if verdict.misses]
    assert {verdict.backend for verdict in verdicts} == {"reference", "native"}
    usual = [verdict for verdict in verdicts if verdict.case.mean == 1.0]
    assert all(verdict.bounds["y"] < (1e-4 if verdict.case.dtype == torch.float32 else 0.2) for verdict in usual)
    assert len(norm_cases([torch.float32], large=True)) > len(norm_cases([torch.float32], large=False))


def test_a_wrong_output(monkeypatch):
    assert misses() == set()
    damaged(monkeypatch, lambda y, *_: y * (1 + 1e-4))
    assert "y" in misses()


def test_a_gradient_that_is_lost(monkeypatch):
    damaged(monkeypatch, lambda y, *_: y * 0.5 + y.detach() * 0.5)
    assert {"dx", "dw", "db", "dr"} <= misses()


def test_running_statistics_that_do_not_move(monkeypatch):
    def still(y, given):
        given.running_mean.mul_(1.001)
        return y

    damaged(monkeypatch, still)
    assert misses() == {"running_mean"}


def test_numbers_that_are_none(monkeypatch):
    damaged(monkeypatch, lambda y, *_: y * torch.nan)
    assert {"y", "a repeat gives other bits"} <= misses()


def test_kernels_that_do_not_serve_are_not_replaced_in_silence():
    with pytest.raises(ValueError, match="backend: found triton, expected another one on this device: x is on cpu"):
        list(validate_norm([CASE], CPU, ["triton"]))


def test_the_command(tmp_path, capsys):
    file = tmp_path / "norm.json"
    words = ["validate", "--part", "norm", "--dtypes", "bfloat16", "--device", "cpu", "--json", str(file)]
    assert main(words) == 0
    found = capsys.readouterr().out
    assert "60 cases within their bounds" in found
    assert "triton not run: x is on cpu" in found
    assert len(json.loads(file.read_text())["cases"]) == 60
