"""Run folders whose files are not what was written: one line, and an older good checkpoint where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from synco_fast.cli import main
from synco_fast.config import build_config
from synco_fast.export.load import read_weights
from synco_fast.runtime.errors import CheckpointError, DataError, UserError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.writers import JsonlWriter

from ..conftest import TINY
from ..support.training import screen, trainer


@pytest.fixture(scope="module")
def finished(_images, tmp_path_factory):
    """A task, and the folder of a whole run of it with two checkpoints."""
    config = build_config(TINY, {"data.source": str(_images), "evaluation.every": 0})
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(config, folder).run()
    return Pretraining(config), folder


@pytest.fixture
def run(finished, tmp_path):
    task, folder = finished
    return task, Path(shutil.copytree(folder, tmp_path / "run"))


def change(folder: Path, how) -> Path:
    """Change what the newest checkpoint holds; its own checksums fit again."""
    newest = folder / "checkpoints" / "step-00000008.pt"
    state = torch.load(newest, weights_only=True)
    how(state)
    torch.save(state, newest)
    return newest


def in_method(name, value):
    def how(state):
        state["method"][name] = value(state["method"][name])

    return how


def in_optimizer(value):
    def how(state):
        kept = state["optimizer"]["state"][0]
        kept["momentum_buffer"] = value(kept["momentum_buffer"])

    return how


def only_one_group(state):
    state["optimizer"]["param_groups"][0]["params"].pop()


WEIGHT = "encoder.backbone.conv1.weight"
VARIANCE = "key_encoder.backbone.bn1.running_var"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda state: state.update(step=-8), "found '-8' as its step, expected 8"),
        (lambda state: state.update(step="8"), "found '8' as its step, expected 8"),
        (lambda state: state.update(step=7), "found '7' as its step, expected 8"),
        (lambda state: state.pop("step"), "found 'None' as its step"),
        (lambda state: state.update(format=torch.ones(2)), "found no synco-fast checkpoint of format 1"),
        (lambda state: state.update(method=[1, 2]), "found list for the weights, expected tensors by name"),
        (lambda state: state.pop("method"), "found no encoder in it"),
        (in_method(WEIGHT, lambda value: "text"), f"it holds str instead of a tensor in {WEIGHT}"),
        (in_method(WEIGHT, torch.Tensor.half), "has other dtypes in"),
        (in_method(WEIGHT, lambda value: value * torch.nan), f"found NaN in method.{WEIGHT}, expected numbers"),
        (in_method(VARIANCE, lambda value: value + torch.inf), f"found NaN or infinity in {VARIANCE}, expected"),
        (in_method("queue.pointer", lambda value: value - 99), "as queue.pointer, expected 0 to 31"),
        (in_method("queue.pointer", lambda value: value + 32), "as queue.pointer, expected 0 to 31"),
        (lambda state: state.pop("optimizer"), "found a damaged part (KeyError: 'optimizer')"),
        (lambda state: state.update(optimizer=[]), "optimizer: found none that can be read (TypeError("),
        (in_optimizer(lambda value: value[:1]), "optimizer: found momentum_buffer of shape (1, "),
        (in_optimizer(torch.Tensor.double), "in torch.float64, expected ("),
        (in_optimizer(lambda value: value / 0), "infinity in momentum_buffer, expected numbers"),
        (only_one_group, "optimizer: found the state of "),
        (lambda state: state.update(config="text"), "found settings in it that cannot be read"),
        (lambda state: state.update(seconds=None), "found a damaged part (TypeError: "),
        (lambda state: state.update(skipped={"counts": "many"}), "found a damaged part ("),
        (lambda state: state.update(broken=3), "found a damaged part (TypeError: "),
        (lambda state: state.update(chosen=3), "found a damaged part (TypeError: "),
        (
            lambda state: state.update(chosen={"engine": "?"}),
            "found a damaged part (ValueError: chosen: found engine '?')",
        ),
    ],
)
def test_a_changed_checkpoint_gives_way_and_without_another_one_is_an_error(run, tmp_path, how, says):
    task, folder = run
    newest = change(folder, how)
    alone = Path(shutil.copytree(folder, tmp_path / "alone"))
    console, text = screen(1000)
    resumed = Trainer(task, folder, resume=folder, console=console)
    assert resumed.step == 4
    task.note.show_by(lambda line, _: text.write(f"{line}\n"))
    task.note._show = None
    said = text.getvalue()
    assert f"{newest}: " in said
    assert says in said
    assert "; resuming from an older one\n" in said
    assert f"renamed {newest.name} to {newest.name}.damaged: later resumes do not try it" in said
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000004.pt", f"{newest.name}.damaged"]
    (alone / "checkpoints" / "step-00000004.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        Trainer(task, alone, resume=alone)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{alone / 'checkpoints' / newest.name}: ")
    assert str(caught.value).endswith(": restore it from a copy, or start a new run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [DataError("data: gone"), torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error")],
)
def test_what_the_machine_lacks_is_no_damage(run, monkeypatch, fault):
    task, folder = run

    def fail(state, path):
        raise fault

    monkeypatch.setattr(task, "load_state_dict", fail)
    with pytest.raises(type(fault)) as caught:
        Trainer(task, folder, resume=folder)
    assert caught.value is fault
    task.note._show = None


def test_evaluations_and_exports_take_the_older_one_too(run):
    _, folder = run
    for how, says in (
        (lambda state: state.update(config={"seed": -1}), "found settings in it that cannot be read .seed: found -1"),
        (lambda state: state.update(config=3), "found no encoder in it"),
        (in_method(WEIGHT, lambda value: value * torch.nan), "found NaN in method.encoder"),
    ):
        newest = change(folder, how)
        assert read_weights(folder).step == 4
        with pytest.raises(CheckpointError, match=says):
            read_weights(newest)


def test_settings_of_an_optimizer_are_those_of_the_run_that_resumes(run):
    task, folder = run
    group = task.engine.optimizer.param_groups[0]
    before = group["weight_decay"]
    change(folder, lambda state: state["optimizer"]["param_groups"][0].update(weight_decay=7.0, momentum="text"))
    assert Trainer(task, folder, resume=folder).step == 8
    group = task.engine.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (before, 0.9)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("config.yaml", cut_in_half, "config.yaml"),
        ("config.yaml", lambda file: file.write_text(""), "config: found nothing in"),
        ("config.yaml", lambda file: file.write_text("latent: 3\nkeep: 2\n"), "found one of another command"),
        ("metrics.jsonl", lambda file: file.write_text('{"kind": "train", "step": 1}\n[1]\n'), "line 2: found list"),
        ("checkpoints/step-00000008.pt", cut_in_half, "cut short or damaged"),
    ],
)
def test_on_the_command_line_it_is_one_line_and_code_2(run, capsys, monkeypatch, name, damage, says):
    monkeypatch.setenv("COLUMNS", "400")
    _, folder = run
    (folder / "checkpoints" / "step-00000004.pt").unlink()
    damage(folder / name)
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[1, 2]", "found list, expected an object"),
        (b"3", "found int, expected an object"),
        (b"null", "found NoneType, expected an object"),
        (b"\xff\xfe", "found no JSON, expected an object"),
        (b'{"kind": "train", "st', "found no JSON, expected an object"),
        (b"[" * 100_000, "found no JSON, expected an object"),
        (b'{"kind": "train"}', "found None as its step, expected a whole number from 0 up"),
        (b'{"kind": "train", "step": "8"}', "found '8' as its step"),
        (b'{"kind": "train", "step": -1}', "found -1 as its step"),
        (b'{"kind": "train", "step": true}', "found True as its step"),
        (b'{"kind": "train", "step": 1.5}', "found 1.5 as its step"),
        (b'{"kind": 3, "step": 1}', "found 3 as its kind"),
        (b'{"kind": "train", "step": 1, "loss": "low"}', "found 'low' as its 'loss', expected a number"),
        (b'{"kind": "train", "step": 1, "loss": null}', "found None as its 'loss', expected a number"),
        (b'{"kind": "train", "step": 1, "loss": 1' + b"0" * 400 + b"}", "as its 'loss', expected a number"),
    ],
)
def test_a_line_of_metrics_that_is_none(tmp_path, line, says):
    good = b'{"kind": "train", "step": 1, "loss": NaN}\n'
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError) as caught:
        JsonlWriter(tmp_path, step=3)
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert says in str(caught.value)
    assert str(caught.value).endswith("; delete that line, or the file")
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == good + line + b"\n" + good, "it stays as it was"


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n\n{"kind": "evaluation", "st')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]
