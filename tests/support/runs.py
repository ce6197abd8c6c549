"""Run folders and checkpoints as a run leaves them, without the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.linear import PUBLISHED, evaluate_linear_fast
from synco_fast.methods.build import build_method
from synco_fast.runtime.checkpoint import save_checkpoint
from synco_fast.runtime.files import write_json
from synco_fast.training.run.run_folder import describe_run

#: Models that the libraries have under that name, small enough for a test.
STOCK = {"model.backbone": "resnet18", "model.backbone_args": {}, "augment.size": 64, "augment.evaluation_resize": 64}


@pytest.fixture
def make_run(tiny, tmp_path):
    """A run folder with one checkpoint of untrained but not untouched weights."""

    def make(overrides: dict[str, Any] | None = None, name: str = "run") -> Path:
        config = tiny(overrides)
        method = build_method(config)
        generator = torch.Generator().manual_seed(1)
        for key, value in method.state_dict().items():
            if "running_" in key:
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
        method.queue.pointer.fill_(8)
        folder = tmp_path / name
        describe_run(folder, config)
        state = {"config": config.model_dump(mode="json"), "method": method.state_dict(), "steps_per_epoch": 4}
        save_checkpoint(folder / "checkpoints", 8, state, keep=2)
        write_json(folder / "summary.json", {"knn_after": 0.75, "chance": 1 / 3})
        return folder

    return make


@pytest.fixture
def told_run(make_run):
    """A run folder as a whole run leaves it, with made-up curves."""

    def tell(
        overrides: dict[str, Any] | None = None, name: str = "run", knn: float = 0.75, probe: bool = False
    ) -> Path:
        folder = make_run(overrides, name)
        lines = []
        for step in range(1, 9):
            values = {"epoch": step / 4, "loss": 5 - step / 4, "queue_top1": step / 10, "top1": 0.0, "data_wait": 0.1}
            values |= {"images_per_second": 300.0, "similarity/positive": 0.5 + step / 20, "similarity/noisy": 0.6}
            lines.append({"kind": "train", "step": step, **values})
        lines += [{"kind": "evaluation", "step": 4 * e, "epoch": e, "knn": knn - 0.1 * (2 - e)} for e in (0, 1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"knn_before": knn - 0.2, "knn_after": knn, "chance": 1 / 3, "epochs": 2.0, "data_wait": 0.1}
        write_json(folder / "summary.json", {**summary, "images_per_second": 300.0, "source": "images"})
        if probe:
            evaluate_linear_fast(folder, EvalOptions(workers=0), protocol=replace(PUBLISHED, epochs=5))
        return folder

    return tell


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def published(*, mlp: bool, keys_first: bool = False) -> dict:
    """A checkpoint as the authors' programs write it; SynCo's queue has a key in each row, MoCo's in each column."""

    def encoder() -> dict:
        model = torchvision.models.resnet18(num_classes=16)
        if mlp:
            model.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), model.fc)
        return model.state_dict()

    state = {f"module.encoder_q.{name}": value for name, value in encoder().items()}
    state |= {f"module.encoder_k.{name}": value for name, value in encoder().items()}
    shape = (64, 16) if keys_first else (16, 64)
    state |= {"module.queue": torch.randn(shape), "module.queue_ptr": torch.tensor([32])}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.03).state_dict()
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}
