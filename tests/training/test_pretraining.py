"""Pretraining as a task, without a step: its images, its length, what is due when, and what may change on a resume."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from synco_fast.config import build_config
from synco_fast.runtime.errors import ConfigError
from synco_fast.training.changes import explain_changes
from synco_fast.training.pretraining import Pretraining

from ..conftest import TINY, write_images


class Evaluation:
    """A periodic evaluation that finds what it is given, and remembers what it was asked."""

    def __init__(self, *accuracies):
        self.accuracies, self.asked = iter(accuracies), []

    def check(self, evaluation, source):
        self.asked.append(source)

    def __call__(self, backbone, source, recipe, evaluation, **named):
        self.asked.append(source)
        return SimpleNamespace(accuracy=next(self.accuracies), figures={"feature_rank": 2.0}, corrupt=(), queries=12)


def test_a_fraction_of_the_images_makes_shorter_epochs(tiny):
    with closing(Pretraining(tiny({"data.fraction": 0.5, "training.epochs": 3}))) as task:
        assert (task.steps_per_epoch, task.settings.steps, task.engine.steps) == (2, 6, 6)
        assert len(task.source.train) == 33


def test_what_is_due_after_which_step(tiny):
    changes = {"training.epochs": 5, "evaluation.every": 2, "training.checkpoint_every": 3}
    with closing(Pretraining(tiny(changes), evaluate=Evaluation())) as task:
        assert [step for step in range(21) if task.evaluation_due(step)] == [0, 8, 16, 20]
        assert [step for step in range(1, 13) if task.checkpoint_due(step)] == [3, 4, 6, 8, 9, 12]
        assert [task.round_end(step) for step in (0, 3, 4)] == [4, 4, 8]
        assert task.describe_step(4) == "5 (epoch 2)"
        values, _ = task.figures(6, {})
        assert (values["lr"], values["epoch"]) == (task.engine.rate(5), 1.5)
    with closing(Pretraining(tiny({**changes, "training.max_steps": 6}), evaluate=Evaluation())) as task:
        assert task.settings.steps == 6
        assert [step for step in range(7) if task.evaluation_due(step)] == [0, 6]


def test_the_evaluation_takes_its_own_images_and_the_best_accuracy_stays(tiny, tmp_path):
    write_images(tmp_path / "others" / "train", classes=2, each=4, seed=2)
    write_images(tmp_path / "others" / "val", classes=2, each=2, seed=3)
    other, evaluate, lines = str(tmp_path / "others"), Evaluation(0.5, 0.9, 0.7), []
    config = tiny({"evaluation.source": other, "training.keep_best": True})
    log = SimpleNamespace(write=lambda kind, step, values: lines.append((kind, step, values)))
    with closing(Pretraining(config, evaluate=evaluate)) as task:
        assert [task.evaluate(step, log) for step in (0, 4, 8)] == [0.5, 0.9, 0.7]
    assert [source.spec for source in evaluate.asked] == [other] * 4
    assert [(kind, step, values.get("best_knn")) for kind, step, values in lines] == [
        ("evaluation", 0, None),  # no checkpoint is written there
        ("evaluation", 4, 0.9),
        ("evaluation", 8, 0.9),
    ]
    assert lines[1][2] == {"epoch": 1.0, "knn": 0.9, "feature_rank": 2.0, "best_knn": 0.9}


def test_a_monitor_begins_with_the_lines_up_to_the_checkpoint(tiny, tmp_path):
    """Those after it are dropped, since a resumed run writes them again."""
    begun = []
    monitor = SimpleNamespace(begin=lambda labels, lines: begun.append((len(labels), [line["step"] for line in lines])))
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with closing(Pretraining(tiny({"evaluation.every": 0}), monitor=monitor)) as task:
        task.begin(tmp_path, fresh=True)
        task._resumed_at = 4
        task.begin(tmp_path, fresh=False)
    assert begun == [(33, []), (33, [2, 4])]


FREE = {"method.warmup_epochs": 2, "training.epochs": 9, "optimizer.lr": 0.25, "data.workers": 1, "model.norm": "plain"}
FIXED = {
    "seed": 1,
    "model.dim": 24,
    "model.momentum": 0.5,
    "method.temperature": 0.1,
    "method.queue": 48,
    "optimizer.name": "adamw",
}


def changed(changes):
    before, after = (build_config(TINY, values).model_dump(mode="json") for values in ({}, changes))
    return explain_changes(before, after, Path("step-00000004.pt"))


def test_what_may_change_in_the_middle_of_a_run_is_said():
    assert changed({}) is None
    assert changed({"training.max_steps": 3, "training.max_time": 5}) is None, "limits of one start"
    said = changed(FREE)
    assert said.startswith("changed since step-00000004.pt: ")
    assert all(key in said for key in FREE)
    assert "optimizer.lr 1.0 -> 0.25" in said
    assert "augment.min_size null -> 24" in changed({"augment.min_size": 24, "augment.size": 32}), "as in a file"


@pytest.mark.parametrize("key", FIXED)
def test_what_cannot_change_in_the_middle_of_a_run_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: found {FIXED[key]!r}, expected .* as in step-00000004.pt"):
        changed({key: FIXED[key]})
