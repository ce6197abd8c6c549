import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from synco_fast.runtime.errors import ConfigError
from synco_fast.training.metrics import (
    JsonlLogger,
    MetricLog,
    RunningMeans,
    TensorBoardLogger,
    open_log,
    read_metrics,
)


def test_means_over_steps_without_what_was_not_measured():
    means = RunningMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss), "hard": torch.tensor(math.nan)})
    assert means.pop() == {"loss": 3.0}
    assert means.pop() == {}
    means.add({"loss": torch.tensor(5.0), "hard": torch.tensor(2.0)})
    assert means.pop() == {"loss": 5.0, "hard": 2.0}


def test_a_skipped_step_does_not_count():
    means = RunningMeans()
    for loss, step_ok in ((1.0, True), (math.nan, False), (3.0, True)):
        means.add({"loss": torch.tensor(loss)}, torch.tensor(step_ok))
    assert means.pop() == {"loss": 2.0}
    means.add({"loss": torch.tensor(1.0)}, torch.tensor(False))
    assert means.pop() == {}


def test_means_survive_a_checkpoint():
    one, other = RunningMeans(), RunningMeans()
    one.add({"loss": torch.tensor(1.0)})
    other.load_state_dict(one.state_dict())
    for means in (one, other):
        means.add({"loss": torch.tensor(2.0)})
    assert one.pop() == other.pop() == {"loss": 1.5}


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = MetricLog(JsonlLogger(tmp_path), TensorBoardLogger(tmp_path))
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    log = MetricLog(JsonlLogger(tmp_path, step=2), TensorBoardLogger(tmp_path, step=2))
    log.write("train", 3, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert read_metrics(tmp_path) == lines
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    log = JsonlLogger(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    seen = []

    def killed(*_):
        seen.append((tmp_path / "metrics.jsonl").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlLogger(tmp_path, step=2)
    assert seen == [before], "the old file is whole until the new one is"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_weights_and_biases_get_the_same_lines(tiny, tmp_path, monkeypatch):
    class Run:
        def __init__(self):
            self.lines, self.finished = [], False

        def log(self, values, step):
            self.lines.append((step, values))

        def finish(self):
            self.finished = True

    run, asked = Run(), {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: asked.update(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny().model_dump(mode="json")
    log = open_log(tmp_path, 0, config, wandb="synco")
    log.write("train", 3, {"loss": 1.5})
    log.close()
    assert run.lines == [(3, {"train/loss": 1.5})]
    assert run.finished
    assert (asked["project"], asked["id"], asked["resume"]) == ("synco", tmp_path.name, "allow")
    assert asked["config"]["method"]["name"] == "synco"
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 3, "loss": 1.5}]
    open_log(tmp_path / "nowhere", 0, config, wandb="synco", writes=False).write("train", 4, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists(), "one process writes"
    assert len(run.lines) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training\.wandb: found no package wandb"):
        open_log(tmp_path, 0, config, wandb="synco")
