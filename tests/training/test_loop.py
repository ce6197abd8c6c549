"""Whole runs: what they leave, how they end, how they resume."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synco_fast.api import Run
from synco_fast.config import Config, build_config, read_mapping
from synco_fast.data.pipelines.base import Batch
from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.knn import PeriodicKnn, evaluate_knn
from synco_fast.evaluation.monitor import HealthMonitor
from synco_fast.methods import with_queue
from synco_fast.runtime.checkpoint import checkpoints_in
from synco_fast.runtime.errors import ConfigError, DataError, DivergedError, UserError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.run_folder import describe_run
from synco_fast.training.run.writers import JsonlWriter
from tests.support.rotation import todays

from ..support.training import assert_identical, figures, newest, pretrain, screen, stop_after, trainer


@pytest.mark.usefixtures("rendered")
def test_a_run_folder_describes_itself(tiny, tmp_path):
    config = tiny()
    summary = pretrain(config, tmp_path / "run")
    run = tmp_path / "run"
    assert build_config(read_mapping(run / "config.yaml")) == config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0]
    chosen = {part: form["name"] for part, form in environment["forms"].items()}
    assert (chosen["views"], chosen["precision"]) == ("torchvision", "fp32"), "what auto became"
    lines = read_metrics(run)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 9))
    assert {"loss", "top1", "queue_top1", "lr", "epoch", "data_wait", "similarity/positive"} <= train[-1].keys()
    assert "similarity/adversarial" not in train[0], "warm-up has no synthetic negatives"
    assert "similarity/adversarial" in train[-1]
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [0, 1, 2]
    for name in ("curves.png", "pairs.png"):
        with Image.open(run / "plots" / name) as picture:
            assert picture.width > 500
            assert np.asarray(picture).std() > 10, "not an empty picture"
    assert list((run / "tensorboard").iterdir())
    assert summary.as_dict() == json.loads((run / "summary.json").read_text())
    assert summary.finished
    assert summary.chance == pytest.approx(1 / 3)
    assert summary.knn_after == lines[-1]["knn"]
    assert summary.feature_rank == lines[-1]["feature_rank"] > 1
    assert Path(summary.checkpoint).is_file()
    assert summary.best is None
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000008.pt"]
    screen = (run / "screen.txt").read_text()
    assert "epoch 2: kNN" in screen
    assert "data wait" in screen
    log = [line[21:] for line in (run / "train.log").read_text().splitlines()]
    assert log[0] == "starting: 0 of 8 steps done"
    assert sum(line.startswith("epoch 2/2: step 8 of 8  loss ") for line in log) == 1
    assert any(line.startswith("epoch 2: kNN") for line in log)
    assert log[-1] == "finished"


def test_evaluate_knn_repeats_the_accuracy_of_training(tiny, tmp_path):
    """Both compute in float32 whatever the encoder was trained in."""
    summary = pretrain(tiny({"training.precision": "bf16", "training.epochs": 1}), tmp_path / "run")
    found = evaluate_knn(tmp_path / "run", EvalOptions(workers=0))
    assert (found["precision"], found["knn"]) == ("fp32", summary.knn_after)


@pytest.mark.slow
def test_training_raises_knn_above_the_untrained_encoder(tiny, tmp_path):
    """Brightness tells the classes apart; random filters see most of it, and a trained encoder all."""
    longer = {"training.batch": 16, "training.epochs": 12, "evaluation.every": 12, "method.mask_same_image": True}
    summary = pretrain(tiny({**longer, "model.momentum": 0.9}), tmp_path / "run")
    assert summary.knn_after > summary.knn_before
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    settled = losses[3:]  # the queue holds random rows at first, which are easy to tell
    assert sum(settled[-4:]) < sum(settled[:4])


@pytest.mark.parametrize("name", sorted(with_queue()))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_method_trains(tiny, tmp_path, name, symmetric):
    changes = {"method.name": name, "method.symmetric": symmetric, "evaluation.every": 0}
    summary = pretrain(tiny(changes), tmp_path / "run")
    assert summary.steps == 8
    assert summary.knn_before is None


def test_seed_decides_everything(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tiny({"seed": seed}), tmp_path / name)
    assert_identical(newest(tmp_path / "a"), newest(tmp_path / "b"))
    assert not torch.equal(
        newest(tmp_path / "a")["method"]["queue.rows"], newest(tmp_path / "c")["method"]["queue.rows"]
    )


@pytest.mark.parametrize("stop", todays([1, 3, 4, 6], 2))
def test_stopped_and_resumed_is_never_stopped(tiny, tmp_path, stop):
    """A stop at any step, also in the middle of an epoch and of a line of figures, changes no bit of the future.

    First by a signal, then by the limit of one start.
    """
    config = tiny({"training.log_every": 3})
    whole = pretrain(config, tmp_path / "whole")
    summary = trainer(config, tmp_path / "parts", after_step=stop_after(stop)).run()
    assert not summary.finished
    assert newest(tmp_path / "parts")["step"] == stop
    limits = tiny({"training.max_steps": stop + 1}).training
    task = Pretraining(config, evaluate=PeriodicKnn(), monitor=HealthMonitor(), limits=limits)
    limited = Trainer(task, tmp_path / "parts", resume=tmp_path / "parts", console=Console(quiet=True)).run()
    assert (limited.finished, limited.steps) == (False, stop + 1)
    resumed = pretrain(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert resumed.finished
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert resumed.knn_before == whole.knn_before


class Killed(BaseException):
    """Stands for SIGKILL: what a run has written by then stays, and nothing else is."""


def killed_after_the_evaluation_at(
    config: Config, run: Path, step: int, monkeypatch: pytest.MonkeyPatch, **settings
) -> None:
    """Train until the checkpoint of ``step`` would be written that holds its evaluation."""

    def save(trainer: Trainer) -> None:
        if trainer.evaluated_at == step:
            raise Killed
        whole(trainer)

    whole = Trainer._save
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", save)
        with pytest.raises(Killed):
            trainer(config, run, **settings).run()


def evaluated_once(run: Path) -> list[int]:
    """The steps of a run's evaluations, which TensorBoard shows as well."""
    steps = [line["step"] for line in read_metrics(run) if line["kind"] == "evaluation"]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("evaluation/knn")] == steps
    assert len(board.Scalars("train/lr")) == len(read_metrics(run)) - len(steps)
    return steps


def test_a_kill_between_an_evaluation_and_its_checkpoint_leaves_no_trace(tiny, tmp_path, monkeypatch):
    config, run = tiny(), tmp_path / "parts"
    pretrain(config, tmp_path / "whole")
    # The epoch is saved before its evaluation, which may take minutes. Then a stop has written such a checkpoint.
    killed_after_the_evaluation_at(config, run, 4, monkeypatch)
    assert evaluated_once(run) == [0, 4]
    assert (newest(run)["step"], newest(run)["evaluated_at"]) == (4, 0)
    killed_after_the_evaluation_at(config, run, 4, monkeypatch, resume=run)
    assert evaluated_once(run) == [0, 4]
    trainer(config, run, resume=run, after_step=stop_after(8)).run()
    assert evaluated_once(run) == [0, 4]
    killed_after_the_evaluation_at(config, run, 8, monkeypatch, resume=run)
    for _ in range(2):
        pretrain(config, run, resume=run)
        assert_identical(newest(tmp_path / "whole"), newest(run))
        assert figures(tmp_path / "whole") == figures(run)
        assert evaluated_once(run) == evaluated_once(tmp_path / "whole") == [0, 4, 8]


def test_notes_of_the_start_are_on_the_screen_and_in_the_log(tiny, tmp_path):
    """Here the one about synthetic negatives that the configured run does not reach; the limit of a start is none."""
    config = tiny({"method.warmup_epochs": 2, "evaluation.every": 0, "training.max_steps": 1})
    pretrain(config, tmp_path / "run")
    for file in ("screen.txt", "train.log"):
        assert (tmp_path / "run" / file).read_text().count("synco: no synthetic negatives in the whole run of 1 ") == 1
    console, text = screen()
    limits = tiny({"training.max_steps": 1}).training
    Trainer(Pretraining(tiny({"evaluation.every": 0}), limits=limits), tmp_path / "part", console=console).run()
    assert "no synthetic negatives" not in text.getvalue()


def test_a_run_of_no_steps_saves_the_untrained_encoder(tiny, tmp_path):
    none, run = tiny({"training.max_steps": 0}), tmp_path / "run"
    summary = pretrain(none, run)
    assert (summary.finished, summary.steps, summary.knn_after) == (True, 0, None)
    assert Run(run).finished
    assert Run(run).knn == summary.knn_before
    assert evaluate_knn(run, EvalOptions(workers=0))["knn"] == summary.knn_before
    pretrain(none, run, resume=run)
    assert [(line["kind"], line["step"]) for line in read_metrics(run)] == [("evaluation", 0)]
    pretrain(tiny(), run, resume=run)
    pretrain(tiny(), tmp_path / "whole")
    assert_identical(newest(tmp_path / "whole"), newest(run))


@pytest.mark.usefixtures("rendered")
def test_what_an_early_kill_left_out_is_written_by_the_resume(tiny, tmp_path):
    config, run = tiny({"training.max_steps": 2, "evaluation.every": 0}), tmp_path / "run"
    pretrain(config, run)
    (run / "environment.json").unlink()
    pairs = run / "plots" / "pairs.png"
    whole = pairs.read_bytes()
    pairs.write_bytes(whole[: len(whole) // 2])
    pretrain(tiny({"training.max_steps": 3, "evaluation.every": 0}), run, resume=run)
    assert json.loads((run / "environment.json").read_text())["torch"]
    with Image.open(pairs) as picture:
        assert np.asarray(picture).std() > 10


def test_a_kill_while_a_picture_is_drawn_leaves_none(tiny, tmp_path, monkeypatch):
    def draw(figure, file, **settings):
        Path(file).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(Figure, "savefig", draw)
    with pytest.raises(Killed):
        pretrain(tiny({"training.max_steps": 1, "evaluation.every": 0}), tmp_path / "run")
    assert not (tmp_path / "run" / "plots" / "pairs.png").exists()


def test_a_batch_that_is_not_this_ranks_share_is_one_line(tiny, tmp_path):
    """Collectives of other sizes on other ranks abort the process inside of gloo."""

    def drop_a_row(run):
        step = run.task.train_step
        cut = slice(0, 7)
        run.task.train_step = lambda batch, number: step(
            Batch(batch.first[cut], batch.second[cut], batch.image_ids[cut]), number
        )

    with pytest.raises(DataError, match="batch: found 7 images on rank 0 at step 1, expected 8, as on every rank"):
        trainer(tiny({"evaluation.every": 0}), tmp_path / "run", before_step=drop_a_row).run()


COMMAND = [sys.executable, "-m", "synco_fast", "pretrain"]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen([*COMMAND, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def long_config(tiny, tmp_path: Path, **changes) -> tuple[Config, Path]:
    overrides = {"training.epochs": 9, "training.checkpoint_every": 3, "evaluation.every": 4, "data.workers": 2}
    config = tiny(overrides | changes)
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    return config, tmp_path / "tiny.yaml"


@pytest.mark.slow
def test_killed_at_an_arbitrary_step_and_resumed_to_the_bit(tiny, tmp_path):
    config, file = long_config(tiny, tmp_path)
    pretrain(config, tmp_path / "whole")
    run, log = tmp_path / "killed", tmp_path / "log.txt"
    process = start(["--config", str(file), "--out", str(run)], log)
    wait_for(lambda: len(read_metrics(run)) >= 13, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = newest(run)["step"]
    assert 0 < reached < 36, "killed in the middle"
    process = start(["--resume", str(run)], log)
    assert process.wait(timeout=300) == 0, log.read_text()
    assert f"resumed from {run}" in log.read_text().replace("\n", "")
    assert_identical(newest(tmp_path / "whole"), newest(run))


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_cleanly(tiny, tmp_path):
    _, file = long_config(tiny, tmp_path, **{"training.checkpoint_every": None, "training.epochs": 400})
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(["--config", str(file), "--out", str(run)], log)
    wait_for(lambda: len(read_metrics(run)) >= 7, process, log)
    before = len(read_metrics(run)) - 3
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does, to the workers too
    assert process.wait(timeout=120) == 0, log.read_text()
    assert newest(run)["step"] >= before
    assert "stopped on request" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (run / "plots" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [True, False])
def test_workers_end_with_the_program(image_folder, closed):
    """Workers ignore SIGTERM, so that a batch system's does not reach them; a program must end all the same."""
    program = f"""
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.sources.open import open_source
from synco_fast.data.pipelines.torchvision import TorchvisionPipeline
pipeline = TorchvisionPipeline(open_source({str(image_folder)!r}).train, Recipe(size=16), batch=8, seed=0, workers=2)
batches = iter(pipeline)
next(batches)
pipeline.itself = pipeline  # a cycle: nothing frees it before the end
if {closed}:
    del batches
    pipeline.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tiny, tmp_path):
    config = tiny({"training.max_steps": 3})
    describe_run(tmp_path / "run", config)
    assert pretrain(config, tmp_path / "run", resume=tmp_path / "run").steps == 3
    assert "holds no checkpoint yet" in (tmp_path / "run" / "screen.txt").read_text()


def test_a_damaged_checkpoint_on_resume_gives_way(tiny, tmp_path):
    config = tiny()
    pretrain(config, tmp_path / "run")
    last, before = checkpoints_in(tmp_path / "run" / "checkpoints")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    summary = pretrain(config, tmp_path / "run", resume=tmp_path / "run")
    assert summary.finished
    screen = (tmp_path / "run" / "screen.txt").read_text()
    assert "resuming from an older one" in screen
    assert before.name in screen


def test_epochs_of_another_length_on_resume(tiny, tmp_path):
    pretrain(tiny(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"found 4 steps an epoch, expected 2: resume with the training\.batch"):
        trainer(tiny({"training.batch": 16}), tmp_path / "run", resume=tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    def poison(run):
        if run.step == 6:
            with torch.no_grad():
                run.task.method.encoder.head[0].weight.fill_(torch.nan)

    config = tiny({"training.checkpoint_every": 1, "training.epochs": 3, "evaluation.every": 0})
    with pytest.raises(DivergedError) as caught:
        trainer(config, tmp_path / "run", before_step=poison).run()
    said = str(caught.value)
    assert said.startswith("training diverged: non-finite gradients from step 7 (epoch 2), 1 step skipped (limit ")
    assert "training.max_skipped=16); last good checkpoint: " in said
    assert said.endswith("step-00000006.pt; try a lower optimizer.lr, or optimizer.clip")
    kept = newest(tmp_path / "run")
    assert kept["step"] == 6
    assert all(torch.isfinite(value).all() for value in kept["method"].values())


def test_a_single_bad_step_is_skipped_and_counted(tiny, tmp_path):
    """A batch whose loss is NaN must leave no trace: not in the weights, the queue or the statistics."""
    before = {}

    def poison(run):
        method, engine = run.task.method, run.task.engine
        if run.step == 5:
            before.update({name: value.clone() for name, value in method.state_dict().items()})
            before["encode"] = engine.encode
            query = engine.encode.query
            engine.encode = engine.encode._replace(query=lambda views: query(views) * torch.nan)
        if run.step == 6:
            engine.encode = before.pop("encode")
            after = method.state_dict()
            key = {name for name in after if name.startswith("key_encoder") and "running" not in name}
            same = after.keys() - key - {name for name in after if name.endswith("num_batches_tracked")}
            assert all(torch.equal(before[name], after[name]) for name in same)

    config = tiny({"evaluation.every": 0, "training.max_skipped": 1, "training.checkpoint_every": 1})
    assert trainer(config, tmp_path / "run", before_step=poison).run().finished
    assert "encode" not in before, "the check above has run"
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"}
    assert [lines[number]["skipped"] for number in (5, 6, 7, 8)] == [0, 1, 1, 1]
    assert "loss" not in lines[6]
    assert not (tmp_path / "run" / "checkpoints" / "step-00000006.pt").exists()


def poisoned(*steps: int):
    """A ``before_step`` that makes the loss of those steps NaN."""
    true = []

    def poison(run):
        engine = run.task.engine
        true[:] = true or [engine.encode]
        bad = true[0]._replace(query=lambda views: true[0].query(views) * torch.nan)
        engine.encode = bad if run.step in steps else true[0]

    return poison


def test_a_bad_gradient_before_a_stop_or_at_the_very_end_costs_nothing(tiny, tmp_path):
    """A skipped step has changed nothing: what is written after it resumes to the bit."""
    config = tiny({"evaluation.every": 2})
    console, text = screen()
    assert trainer(config, tmp_path / "whole", before_step=poisoned(5, 7), console=console).run().finished
    assert text.getvalue().count("skipped steps at the end of the run: 1, with") == 1
    trainer(config, tmp_path / "parts", before_step=poisoned(5), after_step=stop_after(6)).run()
    assert newest(tmp_path / "parts")["step"] == 6
    parts = trainer(config, tmp_path / "parts", resume=tmp_path / "parts", before_step=poisoned(7)).run()
    assert parts.finished
    assert newest(tmp_path / "parts")["step"] == 8
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_nothing_that_is_not_finite_is_saved_as_good(tiny, tmp_path):
    """Batch statistics alone reach neither loss nor gradient: the run would end with an encoder at chance."""
    found = []

    def overflow(run):
        if run.step != 6:
            return
        buffers = dict(run.task.method.key_encoder.named_buffers())
        variance, mean = buffers["backbone.bn1.running_var"], buffers["backbone.bn1.running_mean"]
        momentum = next(iter(run.task.engine.optimizer.state.values()))["momentum_buffer"]
        for tensor, value in ((variance, torch.inf), (momentum, -torch.inf), (mean, torch.nan)):
            before = tensor.clone()
            tensor[(0,) * tensor.dim()] = value
            found.append(run.task.not_finite())
            if tensor is not mean:
                tensor.copy_(before)

    with pytest.raises(DivergedError, match="training diverged: found NaN or infinity in ") as caught:
        trainer(tiny({"evaluation.every": 0}), tmp_path / "run", after_step=overflow).run()
    assert found[0] == "key_encoder.backbone.bn1.running_var"
    assert found[1].startswith("momentum_buffer of ")
    assert found[2] == "key_encoder.backbone.bn1.running_mean"
    assert f"{found[2]} after step 8 (epoch 2); last good checkpoint: " in str(caught.value)
    assert newest(tmp_path / "run")["step"] == 4


def test_a_disk_that_is_full_ends_the_run_in_one_line(tiny, tmp_path, monkeypatch):
    write = JsonlWriter.write

    def full(self, kind, step, values):
        if step == 6:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(self, kind, step, values)

    monkeypatch.setattr(JsonlWriter, "write", full)
    with pytest.raises(UserError, match="found no way to write it at step 6") as caught:
        pretrain(tiny({"evaluation.every": 0}), tmp_path / "run")
    assert re.search(r"\(No space left on device\); a checkpoint takes 0\.\d MiB; ", str(caught.value))
    assert str(caught.value).endswith(f"step-00000004.pt: resume with --resume {tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("act", "log_every"),
    [(shutil.rmtree, 1), (lambda folder: folder.rename(folder.with_name("moved")), 1), (shutil.rmtree, 100)],
    ids=["removed", "moved", "noticed by the checkpoint"],
)
def test_a_folder_that_is_moved_or_removed_ends_the_run_in_one_line(tiny, tmp_path, capfd, act, log_every):
    def leave(run):
        if run.step == 5:
            act(run.folder)

    config, folder = tiny({"evaluation.every": 0, "training.log_every": log_every}), tmp_path / "run"
    with pytest.raises(UserError, match=r"moved or removed at step [58], expected it to stay to the end"):
        trainer(config, folder, after_step=leave).run()
    assert not folder.exists(), "a part of the run in another folder of its name would pass for the run"
    assert capfd.readouterr().err == "", "nor does a thread say it by a traceback"


def test_hooks_are_called_around_every_step_and_can_read_the_run(tiny, tmp_path):
    seen = []
    run = trainer(
        tiny({"evaluation.every": 0, "training.max_steps": 3}),
        tmp_path / "run",
        before_step=lambda run: seen.append(("before", run.step)),
        after_step=lambda run: seen.append(("after", run.step, int(run.task.method.queue.pointer))),
    )
    run.run()
    assert seen == [("before", 0), ("after", 1, 8), ("before", 1), ("after", 2, 16), ("before", 2), ("after", 3, 24)]


def test_without_an_evaluation_from_above_nothing_is_evaluated(tiny, tmp_path):
    """The trainer knows no kNN: what evaluates is given to it."""
    console, text = screen()
    config = tiny({"training.max_steps": 1})
    summary = Trainer(Pretraining(config), tmp_path / "run", console=console).run()
    assert summary.knn_after is None
    assert "kNN" not in text.getvalue()
    assert [line["kind"] for line in read_metrics(tmp_path / "run")] == ["train"]


def test_every_line_carries_what_a_long_run_is_watched_by(tiny, tmp_path):
    pretrain(tiny({"model.momentum_schedule": "cosine", "model.momentum": 0.9}), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert {"gradient_norm", "parameter_norm", "key_momentum", "skipped", "queue_age", "memory_mib"} <= lines[0].keys()
    assert [line["queue_age"] for line in lines] == [1, 2, 3, 4, 4, 4, 4, 4], "32 keys, eight a step"
    momenta = [line["key_momentum"] for line in lines]
    assert momenta[0] == 0.9
    assert momenta == sorted(momenta)


def test_a_budget_of_time_stops_with_a_checkpoint(tiny, tmp_path):
    config = tiny({"training.max_time": 1e-6, "evaluation.every": 0})
    summary = pretrain(config, tmp_path / "run")
    assert not summary.finished
    assert newest(tmp_path / "run")["step"] == summary.steps == 1


@pytest.mark.parametrize("changes", [{"optimizer.name": "lars"}, {"optimizer.name": "adamw", "training.accumulate": 2}])
def test_other_engines_resume_to_the_bit(tiny, tmp_path, changes):
    config = {"optimizer.lr": 0.1, "optimizer.clip": 1.0, "evaluation.every": 0, **changes}
    pretrain(tiny(config), tmp_path / "whole")
    pretrain(tiny({**config, "training.max_steps": 3}), tmp_path / "parts")
    pretrain(tiny(config), tmp_path / "parts", resume=tmp_path / "parts")
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert_identical({**one, "config": None}, {**other, "config": None})


def test_corrupt_images_are_counted_and_too_many_stop_the_run(tiny, image_folder, tmp_path):
    (image_folder / "train" / "class0" / "0.jpg").write_text("text named .jpg")
    (image_folder / "val" / "class1" / "2.jpg").write_bytes(b"")
    summary = pretrain(tiny(), tmp_path / "one")
    assert summary.corrupt_images <= 1
    screen = (tmp_path / "one" / "screen.txt").read_text()
    assert screen.count("class0/0.jpg") == screen.count("class1/2.jpg") == 1, "each is named once"
    assert "on 11 held-out images" in screen
    for number in range(1, 6):
        (image_folder / "train" / "class0" / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"corrupt images, .* expected at most 1\.0% \(data\.max_corrupt\)"):
        pretrain(tiny(), tmp_path / "many")
    assert pretrain(tiny({"data.max_corrupt": 0.5}), tmp_path / "allowed").corrupt_images == 6


def test_what_cannot_work_is_said_before_the_first_step(tiny, image_folder, tmp_path):
    import shutil

    def refused(error, says, **changes):
        with pytest.raises(error, match=says):
            trainer(tiny(changes), tmp_path)

    refused(DataError, "found 64, expected up to 33", **{"training.batch": 64, "method.queue": 64})
    refused(ConfigError, "evaluation.k: found 34, expected up to 33", **{"evaluation.k": 34})
    refused(ConfigError, "fp16", **{"training.precision": "fp16"})
    shutil.rmtree(image_folder / "val" / "class1")
    shutil.rmtree(image_folder / "val" / "class2")
    (image_folder / "val" / "class0").rename(image_folder / "val" / "moved")
    for file in (image_folder / "val" / "moved").iterdir():
        file.rename(image_folder / "val" / file.name)
    refused(DataError, "found no class folders")
    shutil.rmtree(image_folder / "val")
    refused(DataError, "found no held-out split")
    assert trainer(tiny({"evaluation.every": 0}), tmp_path).steps == 8
