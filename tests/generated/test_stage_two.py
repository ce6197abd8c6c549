"""Stage two as whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.generated.plots import draw_pair_curves
from synco_fast.runtime.checkpoint import find_checkpoint
from synco_fast.runtime.errors import CheckpointError, ConfigError, DivergedError
from synco_fast.training.run.metrics import read_metrics

from ..support.training import assert_identical, pretrain, stop_after, trainer
from .conftest import generator_trainer

PAIRS = {
    "method.name": "moco",
    "generated.pair": "joint",
    "generated.latent": 8,
    "generated.width": 4,
    "generated.batch": 4,
    "generated.r1_every": 2,
    "evaluation.every": 0,
}


@pytest.fixture
def stage_one(small, tmp_path):
    generator_trainer(small(steps=3), tmp_path / "stage-one").run()
    return tmp_path / "stage-one"


@pytest.fixture
def paired(tiny, stage_one):
    def make(**changes):
        return tiny({**PAIRS, "generated.checkpoint": str(stage_one), **changes})

    return make


def test_stopped_and_resumed_is_never_stopped(paired, stage_one, tmp_path, request):
    config = paired(**{"method.name": "synco"})
    pretrain(config, tmp_path / "whole")
    trainer(config, tmp_path / "parts", after_step=stop_after(3)).run()
    assert find_checkpoint(tmp_path / "parts")[0]["step"] == 3
    for file in (stage_one / "checkpoints").iterdir():
        file.unlink()  # a resumed run does not need stage one
    pretrain(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert_identical(find_checkpoint(tmp_path / "whole")[0], find_checkpoint(tmp_path / "parts")[0])

    lines = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    wanted = {"similarity/pair", "similarity/below_floor", "generator/loss", "discriminator/loss", "generated/loss"}
    assert wanted | {"generator/hardness", "generator/diversity"} <= lines[0].keys()
    assert 0 < lines[-1]["generators_time"] < 1
    assert lines[0]["generator/hardness"] == 0
    assert lines[-1]["generator/hardness"] > 0
    assert (tmp_path / "whole" / "plots" / "generated.png").exists()
    request.getfixturevalue("rendered")
    draw_pair_curves(read_metrics(tmp_path / "whole"), tmp_path / "generated.png", title="run", floor=0.9)
    with Image.open(tmp_path / "generated.png") as picture:
        assert np.asarray(picture).std() > 10, "not an empty picture"
    sheets = sorted(path.name for path in (tmp_path / "whole" / "plots").glob("generated-*.png"))
    assert sheets == [f"generated-{step:08d}.png" for step in (0, 4, 8)]


def test_a_share_of_the_images_is_what_both_sides_learn_from(paired, tmp_path):
    """The encoder's steps, the discriminator's real images and the run's length; evaluation keeps them all."""
    run = trainer(paired(**{"data.fraction": 0.5}), tmp_path / "run")
    seen, images = [], run.task.method.images
    take = images.take
    images.take = lambda numbers: seen.append(numbers) or take(numbers)
    assert run.task.steps_per_epoch == 16 // run.task.config.training.batch
    assert len(images) == 16
    assert len(run.task.source.train) == 33
    run.run()
    assert int(torch.cat(seen).max()) < 16


def test_frozen_generators_come_out_as_they_went_in(paired, stage_one, tmp_path):
    pretrain(paired(**{"generated.pair": "frozen", "training.max_steps": 2}), tmp_path / "run")
    after, before = find_checkpoint(tmp_path / "run")[0]["method"], find_checkpoint(stage_one)[0]["average"]
    assert all(torch.equal(after[f"generators.0.{name}"], value) for name, value in before.items())


def test_what_does_not_fit_is_named(paired, tiny, small, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"generated.checkpoint: found none, expected a run of"):
        trainer(tiny(PAIRS), folder)
    with pytest.raises(CheckpointError, match="another architecture"):
        trainer(paired(**{"generated.width": 8}), folder)
    sizes = {"augment.size": 64, "augment.evaluation_resize": 64}
    with pytest.raises(ConfigError, match=r"found a generator of 32 pixels, expected 64 \(augment.size\)"):
        trainer(paired(**sizes), folder)
    pretrain(tiny({"training.max_steps": 1, "evaluation.every": 0}), tmp_path / "other")
    with pytest.raises(CheckpointError, match="found no generator in it"):
        trainer(paired(**{"generated.checkpoint": str(tmp_path / "other")}), folder)
    assert not folder.exists()


def test_an_update_that_is_not_finite_stops_with_the_last_good_checkpoint(paired, tmp_path):
    def poison(run):
        if run.step == 5:
            with torch.no_grad():
                run.task.method.discriminator.leave.weight.fill_(torch.nan)

    run = trainer(paired(**{"training.checkpoint_every": 2}), tmp_path / "run", before_step=poison)
    with pytest.raises(DivergedError) as caught:
        run.run()
    said = str(caught.value)
    assert "non-finite gradients from step 6 (epoch 2)" in said
    assert said.endswith("step-00000004.pt; try a lower optimizer.lr or generated.lr, or optimizer.clip")
    state = find_checkpoint(tmp_path / "run")[0]["method"]
    assert all(torch.isfinite(value).all() for value in state.values())
