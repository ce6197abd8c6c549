"""Stage one: what a run leaves, how it resumes, how it ends."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.generated.adversarial import AdversarialOptimizer, CollapseMonitor, DiscriminatorTrainer, diversity
from synco_fast.generated.config import build_generator_config
from synco_fast.generated.discriminator import Discriminator
from synco_fast.generated.kid import KID, Features
from synco_fast.runtime import memory
from synco_fast.runtime.checkpoint import find_checkpoint
from synco_fast.runtime.errors import ConfigError, DivergedError
from synco_fast.training.run.metrics import read_metrics

from ..support.training import assert_identical, figures, pretrain, screen, stop_after
from .conftest import SMALL
from .conftest import generator_trainer as trainer

CPU = torch.device("cpu")


@pytest.mark.usefixtures("rendered")
def test_a_run_describes_itself(small, tmp_path):
    pytest.importorskip("torchmetrics")
    console, text = screen()
    summary = trainer(small(kid_every=3, kid_images=16), tmp_path / "run", console=console).run()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert {"generator/loss", "generator/diversity", "discriminator/loss", "discriminator/real"} <= lines[0].keys()
    assert [line["step"] for line in lines if "generator/kid" in line] == [3, 6]
    for name in ("samples-00000003.png", "samples-00000006.png", "curves.png"):
        with Image.open(tmp_path / "run" / "plots" / name) as picture:
            assert picture.width > 500
    assert summary["kid_network"] == "ResNet-18 with random weights (seed 0)"
    assert summary["finished"]
    assert summary["kid"] > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert "random weights" in text.getvalue()


def test_the_kid_tells_real_images_from_noise(small, tmp_path):
    pytest.importorskip("torchmetrics")
    found = trainer(small(), tmp_path / "run")
    real = found.task.images.take(torch.arange(32))
    kid = KID(None, 32, CPU)
    torch.manual_seed(0)
    noise = kid.measure([real], [torch.rand(32, 3, 32, 32)], 32)
    same = kid.measure([real], [real / 255], 32)
    assert noise > same + 0.01
    before = torch.get_rng_state()
    kid.measure([real], [real / 255], 32)
    assert torch.equal(before, torch.get_rng_state())


def test_kid_on_features_of_ones_own(small, tmp_path):
    """The command gives it the backbone of a checkpoint; here it is one that sees the mean colour."""
    pytest.importorskip("torchmetrics")
    real = trainer(small(), tmp_path / "run").task.images.take(torch.arange(32))
    means = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())
    kid = KID(Features(means, Recipe(size=32), "mean colours"), 32, CPU)
    assert kid.network == "mean colours"
    same = kid.measure([real], [real / 255], 32)
    assert kid.measure([real], [real / 1000], 32) > same + 0.01, "dark images"


def test_kid_gives_the_network_normalised_images():
    pytest.importorskip("torchmetrics")
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :8] + 1

    recipe = Recipe(size=32)
    kid = KID(Features(Watch(), recipe, "nothing"), 32, CPU)
    white = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)
    kid.measure([white], [white / 255], 4)
    expected = (1 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    assert len(seen) >= 2
    for x in seen[-2:]:
        assert torch.allclose(x[0, :, 0, 0], expected, atol=1e-5)


@pytest.mark.slow
def test_the_command_takes_an_encoder(small, tiny, tmp_path):
    pytest.importorskip("torchmetrics")
    pretrain(tiny({"training.max_steps": 1, "evaluation.every": 0}), tmp_path / "encoder")
    values = small(kid_every=3, kid_images=16, encoder=str(tmp_path / "encoder")).model_dump(mode="json")
    words = [word for key, value in values.items() if value is not None for word in (f"--{key}", json.dumps(value))]
    assert main(["pretrain-generator", "--out", str(tmp_path / "run"), *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["kid_network"].startswith("timm/resnet18 of ")
    assert summary["kid"] > 0


@pytest.mark.parametrize("stop", [2, 4])
def test_stopped_and_resumed_is_never_stopped(small, tmp_path, stop):
    config = small(log_every=4)
    trainer(config, tmp_path / "whole").run()
    assert not trainer(config, tmp_path / "parts", after_step=stop_after(stop)).run()["finished"]
    assert find_checkpoint(tmp_path / "parts")[0]["step"] == stop
    torch.manual_seed(99)
    trainer(config, tmp_path / "parts", resume=tmp_path / "parts").run()
    assert_identical(find_checkpoint(tmp_path / "whole")[0], find_checkpoint(tmp_path / "parts")[0])
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_what_is_not_finite_stops_with_the_last_good_checkpoint(small, tmp_path):
    def poison(run):
        if run.step == 4:
            with torch.no_grad():
                run.task.discriminator_trainer.discriminator.leave.weight.fill_(torch.nan)

    with pytest.raises(DivergedError) as caught:
        trainer(small(steps=9, max_skipped=1), tmp_path / "run", before_step=poison).run()
    said = str(caught.value)
    assert said.startswith("training diverged: non-finite gradients from step 5, 1 step skipped (limit max_skipped=1)")
    assert said.endswith("step-00000003.pt; try a lower lr or more r1")
    state = find_checkpoint(tmp_path / "run")[0]
    assert all(torch.isfinite(value).all() for value in state["discriminator"].values())


def test_another_architecture_is_named_and_other_changes_are_said(small, tmp_path):
    trainer(small(), tmp_path / "run").run()
    with pytest.raises(ConfigError, match="width: found 8, expected 4 as in "):
        trainer(small(width=8), tmp_path / "run", resume=tmp_path / "run")
    console, text = screen()
    run = trainer(small(r1=0.5), tmp_path / "run", resume=tmp_path / "run", console=console)
    run.task.note.show_by(lambda line, style: text.write(line))
    assert "changed since step-00000006.pt: r1 0.1 -> 0.5" in text.getvalue()
    with pytest.raises(ConfigError, match="batch: found 99, expected up to 33"):
        trainer(small(batch=99), tmp_path / "other")


def test_a_job_of_several_processes_is_refused(small, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="processes: found 2, expected 1 to train a generator"):
        trainer(small(), tmp_path / "run")


def test_networks_beyond_memory_are_refused_with_the_figure(small, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: 1 << 28)
    says = r"^width: found 256 with latent 16 for a generator and a discriminator, which takes [\d.]+ GiB or more, "
    with pytest.raises(ConfigError, match=says):
        trainer(small(width=256, latent=16), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 48}, "size: found 48, expected 32 or 64"),
        ({"lrate": 1}, "lrate: found an unknown key; did you mean "),
        ({"batch": 0}, "batch: found 0, expected 2 to 1,048,576"),
    ],
)
def test_bad_settings_are_one_line(values, says):
    with pytest.raises(ConfigError) as caught:
        build_generator_config(values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    run = tmp_path / "run"
    assert main(["pretrain-generator", "--data", str(image_folder), "--out", str(run), *words]) == 0
    assert "samples-00000006.png" in capsys.readouterr().out
    assert main(["pretrain-generator", "--resume", str(run), "--steps", "7"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert main(["pretrain-generator", "--data", str(image_folder), "--out", str(run)]) == 2
    assert f"--resume {run}" in capsys.readouterr().err
    assert main(["pretrain-generator"]) == 2
    assert "expected --data SOURCE" in capsys.readouterr().err


def discriminator_trainer(**changes):
    torch.manual_seed(0)
    settings = {"lr": 1e-3, "betas": (0.0, 0.99), "penalty": 0.0, "penalty_every": 1, "augmented": True}
    return DiscriminatorTrainer(Discriminator(width=4), **{**settings, **changes}, device=CPU)


def test_real_and_generated_images_meet_the_same_augmentation():
    """The discriminator must not be able to tell them by what was done to them."""
    found, seen = discriminator_trainer(), []
    found.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    real = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(5)
    found.judge(real / 255)
    torch.manual_seed(5)
    found.judge((real / 255).requires_grad_())
    assert torch.equal(*seen)
    seen.clear()
    found.learn(real, real / 255, 0)
    on_real, on_generated = seen
    assert not torch.equal(on_real, on_generated), "each with draws of its own"
    for measure in (lambda x: (x == 0).float().mean(), torch.mean, torch.std):
        assert float(measure(on_real)) == pytest.approx(float(measure(on_generated)), rel=0.15)


def test_fewer_bits_are_for_the_networks_alone(small, tmp_path):
    """Images, logits and losses come out in float32, and the gradient of R1 is computed in it."""
    run = trainer(
        small(precision="bf16", fraction=0.5, steps=2, sample_every=9, checkpoint_every=9), tmp_path / "run"
    ).task
    assert len(run.images) == 16
    formats = []
    discriminator = run.discriminator_trainer.discriminator
    discriminator.blocks[0].register_forward_hook(lambda module, inputs, out: formats.append(out.dtype))
    run.generator.register_forward_hook(lambda module, inputs, out: formats.append(out.dtype))
    for step, batch in zip(range(2), run.batches(0), strict=False):
        run.train_step(batch, step)
    real_and_generated, judged = [torch.float32] * 2, [torch.bfloat16]
    assert formats == [torch.float32, *real_and_generated, *judged, torch.float32, *[torch.bfloat16] * 2, *judged]
    assert run.discriminator_trainer.judge(torch.rand(2, 3, 32, 32)).dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in [*run.generator.parameters(), *discriminator.parameters()])
    with pytest.raises(ConfigError, match=r"^precision: found tf32, expected auto, fp32 or bf16 without a GPU"):
        trainer(small(precision="tf32"), tmp_path / "other")


def test_the_discriminator_learns_and_the_penalty_holds_it_back():
    real = torch.full((16, 3, 32, 32), 200, dtype=torch.uint8)
    generated = torch.full((16, 3, 32, 32), 0.1)
    losses = {}
    for penalty in (0.0, 1000.0):
        found = discriminator_trainer(penalty=penalty, augmented=False)
        losses[penalty] = [float(found.learn(real, generated, step)[1]["discriminator/loss"]) for step in range(15)]
    assert losses[0.0][-1] < losses[0.0][0] - 0.1
    assert losses[1000.0][-1] > losses[0.0][-1] + 0.05


def test_an_optimizer_moves_its_own_parameters_alone():
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(1, 1)
    before = [other.weight.clone(), one.weight.clone()]
    optimizer = AdversarialOptimizer(one.parameters(), lr=0.1, betas=(0.0, 0.99), device=CPU)
    assert optimizer.learn(other(one(torch.ones(3, 2))).sum())
    assert other.weight.grad is None
    assert one.weight.grad is None
    assert torch.equal(before[0], other.weight)
    assert not torch.equal(before[1], one.weight)
    moved = one.weight.clone()
    assert not optimizer.learn(one(torch.full((1, 2), torch.inf)).sum())
    assert torch.equal(moved, one.weight), "what is not finite moves nothing"


def test_collapse_is_warned_of_once():
    monitor = CollapseMonitor(0.2, grace=10)
    assert monitor.look(0.1, 5) is None, "it may still be learning"
    assert "found a diversity of 0.10 at step 11" in (monitor.look(0.1, 11) or "")
    assert monitor.look(0.1, 12) is None
    assert monitor.look(0.5, 13) is None
    assert monitor.look(0.1, 14) is not None
    real = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    assert float(diversity(real / 255, real)) == pytest.approx(1.0)
    assert float(diversity(real[:1].expand(8, -1, -1, -1) / 255, real)) == 0.0
