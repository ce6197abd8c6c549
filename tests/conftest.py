"""A small image set and a configuration that trains on it in a second."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from synco_fast.config import Config, build_config
from tests.support.plots import render_nothing, savefig
from tests.support.rotation import keep_the_day

pytest_plugins = ("tests.support.runs", "tests.support.detection")

matplotlib.use("Agg")
# One test process a core (pytest-xdist), one thread a process, in the programs that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
keep_the_day()
render_nothing()

TINY: dict[str, Any] = {
    "preset": "tiny",
    "data": {"workers": 0},
    "augment": {"size": 32, "evaluation_resize": 32},
    "model": {
        "backbone": "timm/resnet18",
        "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        "batch_norm_groups": 2,
        "dim": 16,
    },
    "method": {
        "name": "synco",
        "queue": 32,
        "count_scale": 1 / 64,
        "warmup_epochs": 1,
    },
    "optimizer": {"lr": 1.0},
    "training": {"epochs": 2, "batch": 8, "precision": "fp32", "log_every": 1, "device": "cpu"},
    "evaluation": {"every": 1, "k": 3},
}


def write_images(folder: Path, classes: int, each: int, seed: int) -> None:
    """Class folders of noise around a class's own brightness."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        inside = folder / f"class{label}"
        inside.mkdir(parents=True)
        for number in range(each):
            pixels = rng.normal(60 + 60 * label, 40, (40, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(inside / f"{number}.jpg")


@pytest.fixture(scope="session")
def _images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", classes=3, each=11, seed=0)
    write_images(root / "val", classes=3, each=4, seed=1)
    return root


@pytest.fixture
def image_folder(_images: Path, tmp_path: Path) -> Path:
    """A copy of the small set, 33 training and 12 held-out images, that a test may damage."""
    return Path(shutil.copytree(_images, tmp_path / "images"))


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are rendered, as they are outside of the tests."""
    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def tiny(image_folder: Path):
    """Make a configuration for the small set, with overrides by dotted name."""

    def make(overrides: dict[str, Any] | None = None) -> Config:
        return build_config(TINY, {"data.source": str(image_folder), **(overrides or {})})

    return make
