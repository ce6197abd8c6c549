"""``training.keep_best``: the checkpoint of the highest kNN stays, whatever is deleted, killed and resumed."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from synco_fast.export.load import read_weights
from synco_fast.runtime.checkpoint import BEST, keep_best, load_checkpoint
from synco_fast.runtime.errors import CheckpointError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run import loop
from synco_fast.training.run.loop import Trainer
from synco_fast.training.run.metrics import read_metrics

BESTS = {"training.keep_best": True, "training.keep": 1, "training.epochs": 4}


class Told:
    """An evaluation whose results are given, one a call."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def check(self, evaluation, source):
        pass

    def __call__(self, *_, **__):
        return SimpleNamespace(accuracy=self.scores.pop(0), queries=12, corrupt=(), figures={})


def run(config, folder, *scores, resume=None, **settings):
    task = Pretraining(config, evaluate=Told(*scores))
    return Trainer(task, folder, resume=resume, console=Console(quiet=True), **settings).run()


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_checkpoint_stays(tiny, tmp_path):
    # Checkpoints between evaluations have no score, and that of the untrained encoder is none of theirs.
    config = tiny(BESTS | {"training.checkpoint_every": 3})
    summary = run(config, tmp_path / "run", 0.9, 0.5, 0.8, 0.6, 0.8)
    steps = summary.steps // 4
    assert names(tmp_path / "run") == [BEST, f"step-{4 * steps:08d}.pt"]
    best = tmp_path / "run" / "checkpoints" / BEST
    assert load_checkpoint(best)["step"] == 2 * steps, "the first of equals; the untrained encoder has no checkpoint"
    assert summary.best == {"knn": 0.8, "epoch": 2.0, "step": 2 * steps, "checkpoint": str(best)}
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "evaluation"]
    assert [line.get("best_knn") for line in lines] == [None, 0.5, 0.8, 0.8, 0.8]
    weights = read_weights(best)
    assert (weights.step, weights.epochs, weights.run) == (2 * steps, 2.0, tmp_path / "run")
    before = names(tmp_path / "run")
    elsewhere = Trainer(
        Pretraining(config, evaluate=Told()), tmp_path / "other", resume=tmp_path / "run", console=Console(quiet=True)
    )
    elsewhere.task.close()
    elsewhere._lock.release()
    assert elsewhere.step == summary.steps
    assert elsewhere._best is None, "its folder has no best.pt"
    assert names(tmp_path / "run") == before


def test_a_run_killed_between_its_checkpoint_and_its_best_one_keeps_both(tiny, tmp_path, monkeypatch):
    config = tiny(BESTS | {"training.epochs": 3})

    def killed(checkpoint):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "keep_best", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", 0.1, 0.5)
    assert BEST not in names(tmp_path / "run")
    summary = run(config, tmp_path / "run", 0.4, 0.3, resume=tmp_path / "run")
    assert summary.best["knn"] == 0.5
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / BEST)
    assert (best["step"], best["best"]) == (4, {"score": 0.5, "step": 4})
    assert [line.get("best_knn") for line in read_metrics(tmp_path / "run") if line["kind"] == "evaluation"] == [
        None,
        0.5,
        0.5,
        0.5,
    ]


def test_a_file_system_without_links_holds_a_copy(tmp_path, monkeypatch):
    checkpoint = tmp_path / "step-00000004.pt"
    torch.save({"step": 4}, checkpoint)

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    assert keep_best(checkpoint).read_bytes() == checkpoint.read_bytes()
    assert not checkpoint.samefile(tmp_path / BEST)
    monkeypatch.setattr("shutil.copyfile", no_links)
    with pytest.raises(CheckpointError, match=r"best\.pt: found no way to write it \(Operation not supported\)"):
        keep_best(checkpoint)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [BEST, checkpoint.name]
