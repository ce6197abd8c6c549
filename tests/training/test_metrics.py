import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.training.run.metrics import RunningMeans, read_metrics
from synco_fast.training.run.writers import JsonlWriter, MetricLog, TensorBoardWriter, WandbWriter, open_log


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
    log = MetricLog(JsonlWriter(tmp_path), TensorBoardWriter(tmp_path))
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    log = MetricLog(JsonlWriter(tmp_path, step=2), TensorBoardWriter(tmp_path, step=2))
    log.write("train", 3, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert read_metrics(tmp_path) == lines
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    log = JsonlWriter(tmp_path)
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
        JsonlWriter(tmp_path, step=2)
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
    log = open_log(tmp_path, 0, config, trackers={"wandb": "synco"})
    log.write("train", 3, {"loss": 1.5})
    log.close()
    assert run.lines == [(3, {"train/loss": 1.5})]
    assert run.finished
    assert (asked["project"], asked["name"], asked["resume"]) == ("synco", tmp_path.name, "allow")
    assert asked["config"]["method"]["name"] == "synco"
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 3, "loss": 1.5}]
    silent = open_log(tmp_path / "nowhere", 0, config, trackers={"wandb": "synco"}, writes=False)
    silent.write("train", 4, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists(), "one process writes"
    assert len(run.lines) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training\.wandb: found no package wandb"):
        open_log(tmp_path, 0, config, trackers={"wandb": "synco"})


def test_what_weights_and_biases_refuses_is_one_line(tmp_path, monkeypatch):
    """Such as a machine without a key, or a cluster's node without a connection."""

    class Refusal(Exception):
        pass

    def refuse(**settings):
        raise Refusal("No API key configured.\nUse `wandb login`.")

    fake = types.ModuleType("wandb")
    fake.init, fake.errors = refuse, types.SimpleNamespace(Error=Refusal)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"wandb: found no way to log to 'synco' \(No API key configured\.\), expected"):
        open_log(tmp_path, 0, {}, trackers={"wandb": "synco"})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_folder_has_a_run_of_its_own_on_weights_and_biases(tmp_path, monkeypatch):
    """Folders of one name, and one that was deleted and begun anew, do not write into each other's run."""

    def logged_as(folder, project="synco"):
        WandbWriter(folder, project, {})
        return asked["id"]

    asked = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: asked.update(settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    one, other, older = (tmp_path / name / "run" for name in ("a", "b", "c"))
    for folder in (one, other, older):
        folder.mkdir(parents=True)
    first = logged_as(one)
    assert json.loads((one / "wandb.json").read_text()) == {"project": "synco", "run": first}
    assert logged_as(one) == first, "it resumes"
    assert logged_as(one, "another") != first
    assert logged_as(other) != first
    (older / "wandb").mkdir()  # of a version that took the name
    assert logged_as(older) == "run"
    older.rename(tmp_path / "moved")
    assert logged_as(tmp_path / "moved") == "run"


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for the package, with the part of the client that is used; the server keeps what it is told."""

    class Refused(Exception):
        pass

    server = types.SimpleNamespace(experiments={}, runs={}, down=False)

    class Client:
        def _up(self):
            if server.down:
                raise Refused("no answer\nfrom the server")

        def get_experiment_by_name(self, name):
            self._up()
            found = server.experiments.get(name)
            return found and types.SimpleNamespace(experiment_id=found)

        def create_experiment(self, name):
            return server.experiments.setdefault(name, str(len(server.experiments) + 1))

        def create_run(self, experiment_id, run_name=None):
            run = f"run{len(server.runs)}"
            server.runs[run] = {"name": run_name, "experiment": experiment_id, "status": "RUNNING", "rows": []}
            server.runs[run]["params"] = {}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run))

        def update_run(self, run_id, status=None):
            server.runs[run_id]["status"] = status

        def log_batch(self, run_id, metrics=(), params=()):
            self._up()
            assert len(params) <= 100, "the server takes no more at once"
            server.runs[run_id]["rows"] += metrics
            server.runs[run_id]["params"] |= dict(params)

        def set_terminated(self, run_id):
            server.runs[run_id]["status"] = "FINISHED"

    package = types.ModuleType("mlflow")
    package.MlflowClient = Client
    package.exceptions = types.SimpleNamespace(MlflowException=Refused)
    package.entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step), Param=lambda key, value: (key, value)
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    return server


def test_mlflow_gets_the_same_lines_and_a_resumed_run_goes_on_in_its_own(tiny, tmp_path, mlflow, monkeypatch):
    config = tiny().model_dump(mode="json")
    for step in (3, 4):
        log = open_log(tmp_path, step - 1, config, trackers={"wandb": None, "mlflow": "small sets"})
        log.write("train", step, {"loss": 1.5, "similarity/hard": 0.5})
        log.close()
    assert mlflow.experiments == {"small sets": "1"}
    (run,) = mlflow.runs.values()
    assert (run["name"], run["experiment"], run["status"]) == (tmp_path.name, "1", "FINISHED")
    assert run["rows"] == [
        (f"train/{name}", value, step) for step in (3, 4) for name, value in (("loss", 1.5), ("similarity/hard", 0.5))
    ]
    assert run["params"]["method.name"] == "synco"
    assert run["params"]["training.mlflow"] == "None"
    open_log(tmp_path, 4, config, trackers={"mlflow": "another"}).close()
    assert len(mlflow.runs) == 2, "another experiment is another run"
    log = open_log(tmp_path, 4, config, trackers={"mlflow": "another"})
    mlflow.down = True
    with pytest.warns(UserWarning, match=r"training\.mlflow: found no way to log step 5 \(no answer\): the rest"):
        log.write("train", 5, {"loss": 1.0})
    log.write("train", 6, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4, 5, 6], "training goes on"
    with pytest.raises(UserError, match=r"training\.mlflow: found no way to log to 'a' \(no answer\)"):
        open_log(tmp_path, 6, config, trackers={"mlflow": "a"})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"training\.mlflow: found no package mlflow, expected after pip install"):
        open_log(tmp_path, 6, config, trackers={"mlflow": "a"})
