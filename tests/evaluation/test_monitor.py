"""The monitors of a run: what they measure, what they warn of, and that they change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import normalize

from synco_fast.evaluation.health import rankme, uniformity
from synco_fast.evaluation.monitor import HealthMonitor, feature_figures
from synco_fast.methods.base import Recent
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer
from synco_fast.training.run.metrics import read_metrics

from ..support.training import assert_identical, newest, pretrain, screen
from .test_health import CONTRACTED, LEARNED, noise

HEALTH = {"alignment", "uniformity", "key_rank", "false_negatives"}


def recent(**changes) -> Recent:
    """Three queries among six keys, the last of which is random."""
    values = {
        "queries": normalize(noise(3, 8), dim=1),
        "query_ids": torch.tensor([0, 1, 2]),
        "keys": normalize(noise(6, 8, seed=1), dim=1),
        "key_ids": torch.tensor([0, 1, 2, 3, 4, -1]),
        "hard": 2,
    }
    return Recent(**{**values, **changes})


def watching(labels=None, lines=()) -> HealthMonitor:
    monitor = HealthMonitor()
    monitor.begin(labels, lines)
    return monitor


def test_the_figures_are_those_of_the_formulas():
    given = recent()
    found = watching(np.array([0, 1, 0, 1, 0])).measure({"similarity/positive": 0.75}, given)
    assert found.keys() == HEALTH
    assert found["alignment"] == pytest.approx(2 - 2 * 0.75)
    assert found["uniformity"] == pytest.approx(uniformity(given.keys[:5]), rel=1e-12)
    assert found["key_rank"] == pytest.approx(rankme(given.keys[:5]), rel=1e-12)


def test_false_negatives_by_hand():
    labels, right = np.array([0, 1, 0, 1, 0]), 0
    given = recent()
    for row in range(3):
        order = (given.queries[row].double() @ given.keys.double().T).argsort(descending=True).tolist()
        nearest = [place for place in order if place not in (row, 5)][:2]
        right += sum(labels[place] == labels[row] for place in nearest)
    assert watching(labels).measure({}, given)["false_negatives"] == pytest.approx(right / 6)
    # More hard negatives than there are other images: those that are excluded count for nothing.
    everything = watching(labels).measure({}, given._replace(hard=6))["false_negatives"]
    assert everything == pytest.approx((2 + 1 + 2) / 12)


def test_what_cannot_be_measured_is_omitted():
    measure = watching(np.array([0, 1, 0, 1, 0])).measure
    assert measure({"loss": 1.0}, None) == {}
    random = recent(key_ids=torch.full((6,), -1))
    assert measure({}, random) == {}, "a queue of random rows tells nothing"
    bad = recent(queries=torch.full((3, 8), math.nan))
    assert measure({}, bad).keys() == {"uniformity", "key_rank"}, "a skipped step's queries"
    assert measure({}, recent(keys=torch.full((6, 8), math.nan))).keys() <= {"false_negatives"}
    assert watching(None).measure({}, recent()).keys() == {"uniformity", "key_rank"}, "no labels"
    unknown = watching(np.full(5, -1)).measure({}, recent())
    assert "false_negatives" not in unknown


def test_figures_of_collapsed_and_healthy_features():
    healthy, collapsed = feature_figures(noise(200, 16)), feature_figures(noise(200, 1) @ noise(1, 16) + 50)
    assert healthy["feature_rank"] > 15
    assert healthy["feature_uniformity"] < -2
    assert collapsed["feature_rank"] < 1.1
    assert collapsed["feature_uniformity"] > -0.1
    assert feature_figures(torch.full((4, 2), math.inf)) == {}
    assert feature_figures(torch.ones(1, 2)) == {}


def lines_of(curves) -> list[dict]:
    return [{"queue_top1": top1, "similarity/hard": near} for top1, near in zip(*curves, strict=True)]


def test_each_sign_is_warned_of_once():
    monitor, said = watching(), []
    for line in lines_of(CONTRACTED):
        said += monitor.look(line)
    assert len(said) == 1
    assert "the embeddings contract" in said[0]
    assert said[0].endswith("(docs/curves.md)")
    for rank in [40.0] * 5 + [8.0] * 5:
        said += monitor.look({"key_rank": rank})
    said += monitor.look({"feature_rank": 90.0}) + monitor.look({"feature_rank": 5.0})
    begins = [line.partition(":")[0] for line in said[1:]]
    assert begins == ["key_rank fell from 40.0 to 8.0", "feature_rank fell from 90.0 to 5.0"]
    assert monitor.look({"feature_rank": 1.0}) == []


def test_a_healthy_run_is_not_warned_of():
    monitor = watching()
    assert [monitor.look(line) for line in lines_of(LEARNED)] == [[]] * len(LEARNED[0])
    # The ranks of a run that ended at 84 % kNN: keys of one class draw together.
    for rank in (71, 72, 71, 70, 68, 66, 60, 52, 44, 40, 37, 35, 34, 34, 33, 33):
        assert monitor.look({"key_rank": float(rank)}) == []
    assert monitor.look({"loss": 1.0, "similarity/positive": 0.9}) == []
    assert monitor.look({"queue_top1": 0.5, "similarity/hard": math.nan}) == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("healthy", []),
        ("contracting", ["key_rank", "top-1"]),
        ("contracting-today", ["key_rank", "top-1"]),
        ("collapsing", ["key_rank", "feature_rank"]),
    ],
)
def test_recorded_runs_are_told_apart(name, kinds):
    text = (Path(__file__).parents[2] / "bench" / "records" / "health" / f"{name}.jsonl").read_text()
    monitor = watching()
    said = [warning for line in text.splitlines() for warning in monitor.look(json.loads(line))]
    assert [warning.partition(" ")[0] for warning in said] == kinds


def test_a_resumed_run_knows_its_curves_and_repeats_no_warning():
    lines = lines_of(CONTRACTED)
    at = next(n for n in range(len(lines)) if watching(None, lines[:n]).look(lines[n]))
    assert watching(None, lines[: at + 1]).look(lines[-1]) == []
    assert watching(None, lines[at + 1 :]).look(lines[-1]) == [], "the end alone is too short to judge"


def test_monitors_change_nothing(tiny, tmp_path):
    """Every line has their figures, from the first on."""
    config = tiny({"training.max_steps": 3})
    pretrain(config, tmp_path / "whole")
    console, _ = screen()
    Trainer(Pretraining(config), tmp_path / "plain", console=console).run()
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "plain"), without=("/evaluated_at",))
    lines = read_metrics(tmp_path / "whole")
    assert [line.keys() >= HEALTH for line in lines if line["kind"] == "train"] == [True] * 3
    assert [line.keys() >= {"feature_rank", "feature_uniformity"} for line in lines if "knn" in line] == [True] * 2
    assert all(0 <= line["false_negatives"] <= 1 for line in lines if line["kind"] == "train")


def test_a_run_shows_what_its_monitor_says(tiny, tmp_path):
    class Loud(HealthMonitor):
        def look(self, values):
            return [f"line at epoch {values['epoch']:g}"]

    with (tmp_path / "screen.txt").open("w") as said:
        console = Console(file=said, width=200)
        task = Pretraining(tiny({"training.max_steps": 1}), monitor=Loud())
        Trainer(task, tmp_path / "run", console=console).run()
    assert (tmp_path / "screen.txt").read_text().count("line at epoch 0.25") == 1
