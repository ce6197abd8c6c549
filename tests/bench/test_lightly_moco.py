"""The record beside lightly's MoCo v2: what it says without lightly, its page, and the loop where lightly is there."""

from __future__ import annotations

import json

import pytest

from synco_fast.bench.experiments import lightly_moco


def test_without_lightly_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(lightly_moco.importlib.util, "find_spec", lambda name: None)
    lightly_moco.main(["--runs", str(tmp_path / "runs")])
    assert capsys.readouterr().out == "skipped: lightly is not installed (pip install lightly)\n"
    assert not (tmp_path / "runs").exists()


def record() -> dict:
    runs = {
        who: {str(seed): {"knn": [0.2, 0.5 + seed / 10 + more], "loss": [5.0 + seed]} for seed in (0, 1)}
        for who, more in (("ours", 0.02), ("lightly", 0.0))
    }
    return {
        "environment": {"device": "a device", "cores": 2, "threads": 1, "torch": "2", "python": "3"},
        "lightly": "1.6.0",
        "command": "--epochs 1",
        "config": "Configuration `demo`",
        "epochs": 1,
        "steps": 37,
        "seeds": [0, 1],
        "runs": runs,
        "difference": lightly_moco.over_seeds([0.02, 0.04]),
    }


def test_the_page_has_both_curves_and_the_paired_difference(tmp_path):
    page = lightly_moco.table(record())
    assert "| synco-fast, kNN | 20.0% ± 0.0% | 57.0% ± 7.1% |" in page
    assert "| lightly, loss |  | 5.500 ± 0.707 |" in page
    assert "synco-fast minus lightly at the same seed: +3.0 points, standard error 1.0 (+2.0, +4.0)" in page
    lightly_moco.draw(record(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_epoch_of_each(tiny, tmp_path):
    pytest.importorskip("lightly.loss", reason="lightly is not installed")
    (tmp_path / "tiny.yaml").write_text(tiny().to_yaml())
    words = ["--config", str(tmp_path / "tiny.yaml"), "--epochs", "1", "--seeds", "0", "1"]
    lightly_moco.main([*words, "--runs", str(tmp_path / "runs"), "--record", str(tmp_path / "record")])
    found = json.loads((tmp_path / "record" / "record.json").read_text())
    for seed in ("0", "1"):
        ours, other = found["runs"]["ours"][seed], found["runs"]["lightly"][seed]
        assert ours["knn"][0] == other["knn"][0], "the same untrained backbone"
        assert ours["loss"] == pytest.approx(other["loss"], rel=0.1)
