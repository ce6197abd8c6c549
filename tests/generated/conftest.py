"""A small run of stage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from synco_fast.generated.config import GeneratorConfig, build_generator_config
from synco_fast.generated.stage_one import GeneratorTraining
from synco_fast.training.run.loop import Trainer

SMALL = {
    "workers": 0,
    "latent": 8,
    "width": 4,
    "steps": 6,
    "batch": 8,
    "r1_every": 2,
    "log_every": 1,
    "sample_every": 3,
    "kid_every": 0,
    "checkpoint_every": 3,
    "device": "cpu",
}


@pytest.fixture
def small(image_folder):
    def make(**changes):
        return build_generator_config({"source": str(image_folder), **SMALL, **changes})

    return make


def generator_trainer(config: GeneratorConfig, folder: Path, **settings: Any) -> Trainer[dict[str, Any]]:
    settings.setdefault("console", Console(quiet=True))
    return Trainer(GeneratorTraining(config), folder, **settings)
