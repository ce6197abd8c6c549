"""Pretraining from Python: what it returns, what it leaves behind in the process, how it stops and goes on."""

from __future__ import annotations

import os
import signal
import threading

import matplotlib
import pytest
import torch

import synco_fast
from synco_fast.api import _overrides, _read
from synco_fast.presets import PRESETS
from synco_fast.runtime.errors import CheckpointError, ConfigError, DataError, UserError
from synco_fast.training.pretraining import Pretraining
from tests.conftest import TINY


@pytest.fixture
def preset(monkeypatch):
    """The small set's configuration as a preset."""
    monkeypatch.setitem(PRESETS, "tiny", {key: value for key, value in TINY.items() if key != "preset"})
    return "tiny"


@pytest.fixture
def signalled(monkeypatch):
    """Send a signal to this process in a step, counted from 0."""
    due: dict[int, int] = {}
    step = Pretraining.train_step

    def train_step(task, batch, done):
        if done in due:
            os.kill(os.getpid(), due[done])
        step(task, batch, done)

    monkeypatch.setattr(Pretraining, "train_step", train_step)
    return due


@pytest.mark.usefixtures("rendered")
def test_a_run_and_what_it_leaves(preset, image_folder, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    # Another backend than the one that a plot would choose, and that the tests run with.
    request.addfinalizer(lambda: matplotlib.use("Agg"))
    matplotlib.use("svg")
    torch.manual_seed(7)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    handlers, drawn, backend = signal.getsignal(signal.SIGINT), torch.get_rng_state(), matplotlib.get_backend()
    run = synco_fast.pretrain(preset, image_folder, method_name="moco", training={"epochs": 1}, seed=3)
    assert signal.getsignal(signal.SIGINT) is handlers
    assert torch.equal(torch.get_rng_state(), drawn)
    assert matplotlib.get_backend() == backend
    assert "kNN" in capsys.readouterr().out

    assert run.folder.parent == tmp_path / "runs"
    assert run.folder.name.startswith("tiny-")
    assert run.finished
    assert (run.config.method.name, run.config.training.epochs, run.config.seed) == ("moco", 1, 3)
    assert [line["step"] for line in run.metrics if line["kind"] == "train"] == [1, 2, 3, 4]
    assert run.knn == run.summary["knn_after"] == run.metrics[-1]["knn"]
    assert run.checkpoint == run.folder / "checkpoints" / "step-00000004.pt"
    assert run.backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    assert run.backbone is run.backbone
    assert not run.backbone.training
    assert repr(run) == f"Run(runs/{run.folder.name}, 4 steps, kNN {run.knn:.1%})"

    again = synco_fast.Run.open(run.folder)
    assert again.metrics == run.metrics


def test_a_run_stays_where_it_is_when_the_process_goes_elsewhere(tiny, tmp_path, monkeypatch):
    """Read from there by a relative path, it had no metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    few = {"max_steps": 1, "progress": False, "evaluation_every": 0}
    run = synco_fast.pretrain(tiny(), out="one", **few)
    home = synco_fast.pretrain(tiny(), out="~/two", **few)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [line["step"] for line in run.metrics] == [1]
    assert run.resume(max_steps=2, progress=False).summary["steps"] == 2
    assert home.folder == tmp_path / "home" / "two"
    assert synco_fast.Run.open("~/two").checkpoint == home.checkpoint
    assert not (tmp_path / "~").exists()
    with pytest.raises(UserError, match="out: found '', expected the name"):
        synco_fast.pretrain(tiny(), out="", **few)
    with pytest.raises(ConfigError, match=r"data.source: found 'l.udce4ufe', a name that is not UTF-8"):
        synco_fast.pretrain(tiny(), "l\udce4ufe", out="three", **few)
    run.folder.rename(tmp_path / "moved")
    assert repr(run) == f"Run({tmp_path / 'one'}, moved or removed)"
    for read in (lambda: run.knn, lambda: run.finished, lambda: run.metrics):
        with pytest.raises(ConfigError, match=r"found no run in .*one"):
            read()


def test_a_configuration_in_every_form_is_the_same(preset, tiny, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny().to_yaml(), encoding="utf-8")
    forms = (tiny(), tiny().model_dump(mode="json"), file, str(file), preset)
    found = [_read(config, {"data.source": "here", "seed": 4}).to_yaml() for config in forms]
    assert len(set(found)) == 1
    assert "seed: 4" in found[0]


def test_stop_signals_leave_a_checkpoint_and_are_delivered_again(tiny, tmp_path, signalled, capsys, request):
    signalled |= {2: signal.SIGINT, 5: signal.SIGTERM}
    # A shell starts its background jobs with SIGINT ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupt))
    with pytest.raises(KeyboardInterrupt):
        synco_fast.pretrain(tiny(), out=tmp_path / "run", evaluation_every=0)
    assert f"synco_fast.Run.open('{tmp_path / 'run'}').resume() goes on" in capsys.readouterr().out
    run = synco_fast.Run.open(tmp_path / "run")
    assert not run.finished
    assert run.checkpoint.name == "step-00000003.pt"

    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        run = run.resume(progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert run.checkpoint.name == "step-00000006.pt"
    assert [line["step"] for line in run.metrics] == list(range(1, 7))
    assert capsys.readouterr().out == ""


def test_it_runs_outside_the_main_thread(tiny, tmp_path):
    """As some notebooks and web applications call it; only there signals cannot be handled."""
    found = []
    few = {"max_steps": 1, "progress": False, "evaluation_every": 0}
    thread = threading.Thread(target=lambda: found.append(synco_fast.pretrain(tiny(), out=tmp_path / "run", **few)))
    thread.start()
    thread.join()
    assert found[0].checkpoint.name == "step-00000001.pt"
    assert found[0].config.training.max_steps is None, "the limit is of this start, not the run's"
    assert not found[0].finished
    assert found[0].knn is None
    with pytest.raises(ConfigError, match="out: found a run in"):
        synco_fast.pretrain(tiny(), out=tmp_path / "run", progress=False)


def test_modes_of_the_process_do_not_reach_a_run(tiny, tmp_path, request):
    request.addfinalizer(lambda: setattr(torch.backends, "fp32_precision", "none"))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.backends.fp32_precision = "ieee"
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode(), torch.device("meta"):
        run = synco_fast.pretrain(tiny(), out=tmp_path / "run", max_steps=1, progress=False, evaluation_every=0)
        assert torch.tensor(0.5).dtype == torch.float64
    assert 0 < run.metrics[0]["loss"] < 10


def test_overrides():
    assert _overrides(
        {"training.epochs": 3}, {"method_name": "mochi", "model": {"dim": 16}, "seed": 1, "model_batch_norm_groups": 2}
    ) == {
        "training.epochs": 3,
        "method.name": "mochi",
        "model.dim": 16,
        "seed": 1,
        "model.batch_norm_groups": 2,
    }


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("dem", {}, "config: found no preset 'dem'; did you mean demo?"),
        (3, {}, "config: found int, expected a preset's name"),
        ("demo", {"epochs": 3}, "epochs: found an unknown key; did you mean training.epochs?"),
        ("demo", {"training_epoch": 3}, "training.epoch: found an unknown key; did you mean training.epochs?"),
        ("demo", {"training_epochs": 0}, "training.epochs: found 0, expected 1 to 100,000"),
        ("demo", {"method": "mochi"}, "method: found 'mochi', expected the section's keys, or method_KEY=value"),
        ("demo", {"data": {"workers": 0}}, "data: found a mapping, expected a folder or a source"),
        ("demo", {"data": "here", "data_source": "there"}, "data.source: found there with data=here"),
        ("demo", {"settings": {"seed": 1}, "seed": 2}, "seed: found it given twice, expected once"),
        ("demo", {"max_steps": -1}, "training.max_steps: found -1, expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(config, words, said):
    with pytest.raises(ConfigError) as error:
        synco_fast.pretrain(config, **words)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ConfigError, match="run: found no run in"):
        synco_fast.Run.open(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint: found none in"):
        _ = synco_fast.Run(tmp_path).checkpoint
    with pytest.raises(DataError):
        synco_fast.pretrain("demo", tmp_path / "nowhere", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_package_completes_its_public_names():
    assert set(synco_fast.__all__) <= set(dir(synco_fast))
    with pytest.raises(AttributeError, match="pretrian"):
        _ = synco_fast.pretrian
