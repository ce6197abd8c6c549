from __future__ import annotations

import json

import pytest
from triton.runtime import driver

from synco_fast.bench.experiments import host_time
from synco_fast.kernels.norm import ops as norm_ops


@pytest.fixture
def calls(monkeypatch):
    """Which forms of the batch norm were called."""
    seen = []
    for name in ("_Direct", "_normalise"):
        form = getattr(norm_ops, name)
        monkeypatch.setattr(norm_ops, name, _Noted(form, seen, name))
    return seen


class _Noted:
    def __init__(self, form, seen, name):
        self.form, self.seen, self.name = form, seen, name

    def __call__(self, *given):
        self.seen.append(self.name)
        return self.form(*given)

    def apply(self, *given):
        self.seen.append(self.name)
        return self.form.apply(*given)


def test_both_forms_in_turn_without_a_device(calls):
    before, served, traced = driver._active, norm_ops.unserved_by_triton, norm_ops.traced
    found = host_time.measure("norm", rounds=2, repeats=3)
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    assert min(found["direct"] + found["operator"]) > 0
    assert calls == (["_Direct"] * 3 + ["_normalise"] * 3) * 3
    assert (driver._active, norm_ops.unserved_by_triton, norm_ops.traced) == (before, served, traced)


def test_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(host_time, "measure", lambda name, **_: {"direct": [1e-6, 3e-6], "operator": [4e-6, 4e-6]})
    host_time.main(["--json", str(tmp_path / "record.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["loss", "direct", "2", "us"], ["loss", "operator", "4", "us"]]
    assert set(json.loads((tmp_path / "record.json").read_text())["seconds"]) == {"loss", "norm"}
