"""Checkpoints as a run leaves them, without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.methods.build import build_method
from synco_fast.runtime.checkpoint import save_checkpoint
from synco_fast.runtime.files import write_json
from synco_fast.training.run_folder import describe_run

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
