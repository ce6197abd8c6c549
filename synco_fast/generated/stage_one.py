"""Stage one of generated pairs: a generator is trained on the unlabelled images against a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.splits import share_of
from synco_fast.generated.adversarial import (
    AdversarialOptimizer,
    CollapseMonitor,
    DiscriminatorTrainer,
    check_networks,
    diversity,
)
from synco_fast.generated.config import GeneratorConfig
from synco_fast.generated.discriminator import Discriminator, generator_loss
from synco_fast.generated.generator import Generator, average_momentum
from synco_fast.generated.kid import KID, Features
from synco_fast.generated.plots import draw_generator_curves, draw_samples
from synco_fast.generated.real_images import ResidentImages
from synco_fast.models.ema import ema_update, make_ema_copy
from synco_fast.runtime.checkpoint import load_optimizer, load_weights, newest_checkpoint
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import write_json
from synco_fast.runtime.finite import not_finite
from synco_fast.runtime.optim_step import SkippedSteps
from synco_fast.runtime.precision import Precision, memory_format, resolve_device
from synco_fast.training.bad_images import CorruptImages
from synco_fast.training.changes import explain_changes
from synco_fast.training.run.metrics import RunningMeans, read_metrics
from synco_fast.training.run.task import Notes, TrainerSettings
from synco_fast.training.run.throughput import Throughput
from synco_fast.training.run.writers import MetricLog

__all__ = ["GeneratorTraining"]

_SHEET = 64
#: Outside the range of step numbers, which seed everything else.
_SHEET_SEED, _KID_SEED = 1 << 40, 1 << 41


class GeneratorTraining:
    """Stage one as a task of the `Trainer`, in one process.

    A step depends only on seed and step number, so a stopped run resumes bit for bit.

    Args:
        config: What to do.
        features: KID's feature network; a ResNet-18 with random weights by default.

    Raises:
        UserError: The configuration or the images do not work.
    """

    def __init__(self, config: GeneratorConfig, features: Features | None = None) -> None:
        processes = DistEnv.detect().world
        if processes > 1:
            raise ConfigError(f"processes: found {processes}, expected 1 to train a generator")
        self.config, self.control, self.note = config, HostGroup(DistEnv()), Notes()
        self.device = resolve_device(config.device)
        self.precision = Precision(config.precision, self.device, key="precision")
        self.kid = KID(features, config.size, self.device) if config.kid_every else None
        train = share_of(open_source(config.source).train, config.fraction)
        if len(train) < config.batch:
            raise ConfigError(f"batch: found {config.batch}, expected up to {len(train)}, the number of images")
        self.images = ResidentImages(train, config.size, workers=config.workers, device=self.device)
        CorruptImages(len(self.images), config.max_corrupt, self.note, key="max_corrupt").replaced(self.images.corrupt)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            check_networks(config.size, config.latent, config.width, self.device)
            self.generator = Generator(config.size, latent=config.latent, width=config.width).to(self.device)
            discriminator = Discriminator(config.size, width=config.width).to(self.device)
        for network in (self.generator, discriminator):
            memory_format(network, config.channels_last)
        self.average = make_ema_copy(self.generator)
        self.discriminator_trainer = DiscriminatorTrainer(
            discriminator,
            lr=config.lr,
            betas=config.betas,
            penalty=config.r1,
            penalty_every=config.r1_every,
            augmented=config.augment,
            device=self.device,
            autocast=self.precision.autocast,
        )
        self.generator_optimizer = AdversarialOptimizer(
            self.generator.parameters(), lr=config.lr, betas=config.betas, device=self.device
        )
        self.means, self.skipped = RunningMeans(), SkippedSteps(self.device)
        self.collapse = CollapseMonitor(config.collapse, config.steps // 5)
        self.settings = TrainerSettings(
            steps=config.steps,
            batch=config.batch,
            log_every=config.log_every,
            keep=config.keep,
            max_skipped=config.max_skipped,
            max_skipped_key="max_skipped",
            max_time=config.max_time,
        )
        self._order: tuple[int, Tensor] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """No further entries."""
        return {}

    # -- the steps ----------------------------------------------------------------------------------------------

    def begin(self, folder: Path, *, fresh: bool) -> None:
        """Remember the run folder."""
        self._folder = folder

    def view_size(self, step: int) -> None:
        """None: the images have one size."""

    def round_end(self, step: int) -> int:
        """The next step at which a sheet, KID or a checkpoint is due."""
        return min(
            (step // every + 1) * every
            for every in (self.config.sample_every, self.config.kid_every, self.config.checkpoint_every)
            if every
        )

    def batches(self, step: int) -> Iterator[Tensor]:
        """Real images, uint8 (batch, 3, size, size), without end."""
        while True:
            yield self.images.take(self._numbers(step))
            step += 1

    def _numbers(self, step: int) -> Tensor:
        """The images of a step: epochs without repetition, dropping an incomplete last batch."""
        epoch, place = divmod(step, len(self.images) // self.config.batch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.images), seed=self.config.seed, epoch=epoch)
        return self._order[1][place * self.config.batch : (place + 1) * self.config.batch]

    def train_step(self, batch: Tensor, step: int) -> None:
        """One step of the discriminator and one of the generator."""
        config = self.config
        torch.manual_seed(derive_seed(config.seed, step))
        with self.precision.autocast():
            generated = self.generator(torch.randn(config.batch, config.latent, device=self.device))
        learned, metrics = self.discriminator_trainer.learn(batch, generated, step)
        loss = generator_loss(self.discriminator_trainer.judge(generated))
        step_ok = self.generator_optimizer.learn(loss) & learned
        ema_update(self.average, self.generator, average_momentum(step, config.average))
        metrics |= {"generator/loss": loss.detach(), "generator/diversity": diversity(generated, batch)}
        self.means.add(metrics, step_ok)
        self.skipped.add(step_ok, step)

    def not_finite(self) -> str | None:
        """The first weight that holds NaN or infinity."""
        networks = {
            "generator": self.generator,
            "average": self.average,
            "discriminator": self.discriminator_trainer.discriminator,
        }
        return not_finite(
            (f"{name}.{key}", value)
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        )

    def replica_hash(self) -> int:
        """0: there is one process."""
        return 0

    # -- what is shown and logged -------------------------------------------------------------------------------

    def title(self, step: int) -> str:
        """What is trained."""
        return "generator"

    def figures(self, step: int, speed: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Means of the losses and diversity, speed, skipped steps; warns of mode collapse."""
        values = {**self.means.pop(), **speed, "skipped": float(self.skipped.read()[0])}
        del values["data_wait"]
        if "generator/loss" not in values:
            return values, []
        words = [
            f"G {values['generator/loss']:.3f}",
            f"D {values['discriminator/loss']:.3f}",
            f"diversity {values['generator/diversity']:.2f}",
        ]
        if "images_per_second" in values:
            words.append(f"{values['images_per_second']:,.0f} img/s")
        warning = self.collapse.look(values["generator/diversity"], step)
        if warning:
            self.note(warning)
        return values, words

    def artifacts(self, step: int) -> None:
        """A sheet of samples, every ``sample_every`` steps and at the end."""
        if step and (step % self.config.sample_every == 0 or step == self.config.steps):
            draw_samples(self.samples(_SHEET, _SHEET_SEED), self._folder / "plots" / f"samples-{step:08d}.png")

    def evaluation_due(self, step: int) -> bool:
        """Every ``kid_every`` steps and at the end."""
        every = self.config.kid_every
        return self.kid is not None and step > 0 and (step % every == 0 or step == self.config.steps)

    def evaluate(self, step: int, log: MetricLog) -> None:
        """Measure KID and log it."""
        assert self.kid is not None
        kid = self._measure(self.kid)
        log.write("evaluation", step, {"generator/kid": kid})
        self.note(f"step {step}: KID {kid:.4f} on {self.kid.network}", None)

    def _measure(self, kid: KID) -> float:
        count = min(self.config.kid_images, len(self.images))
        numbers = torch.arange(count) * len(self.images) // count
        parts = [min(self.config.batch, count - begin) for begin in range(0, count, self.config.batch)]
        real = (self.images.take(part) for part in numbers.split(self.config.batch))
        generated = (self.samples(part, _KID_SEED + number) for number, part in enumerate(parts))
        return kid.measure(real, generated, count)

    @torch.no_grad()
    def samples(self, count: int, purpose: int) -> Tensor:
        """Images (count, 3, size, size) of the moving average, from fixed latent vectors."""
        draws = torch.Generator().manual_seed(derive_seed(self.config.seed, purpose))
        images: Tensor = self.average(torch.randn(count, self.config.latent, generator=draws).to(self.device))
        return images

    def describe_step(self, step: int) -> str:
        """The number, counted from 1."""
        return str(step + 1)

    def advice(self) -> str:
        """What to try if training diverges."""
        return "a lower lr or more r1"

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        """Every ``checkpoint_every`` steps."""
        return step % self.config.checkpoint_every == 0

    def state_dict(self) -> dict[str, Any]:
        """Configuration, networks, their optimizers and the metrics since the last line."""
        return {
            "generator_config": self.config.model_dump(mode="json"),
            "images": len(self.images),
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator_trainer.discriminator.state_dict(),
            "optimizers": {
                "generator": self.generator_optimizer.optimizer.state_dict(),
                "discriminator": self.discriminator_trainer.state_dict(),
            },
            "means": self.means.state_dict(),
            "skipped": self.skipped.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Load from a checkpoint.

        Raises:
            ConfigError: It has no generator, or was trained on other images or with settings that cannot change.
            CheckpointError: It is damaged, or its architecture differs.
        """
        if "generator_config" not in state:
            raise ConfigError(f"resume: found no generator in {path}, expected a run of pretrain-generator")
        own = self.config.model_dump(mode="json")
        changes = explain_changes(state["generator_config"], own, path, fixed=("seed", "size", "latent", "width"))
        if state["images"] != len(self.images):
            raise ConfigError(f"source: found {len(self.images)} images, expected {state['images']} to resume {path}")
        load_weights(self.generator, state["generator"], path)
        load_weights(self.average, state["average"], path)
        load_weights(self.discriminator_trainer.discriminator, state["discriminator"], path)
        load_optimizer(self.generator_optimizer.optimizer, state["optimizers"]["generator"], path)
        self.discriminator_trainer.load_state_dict(state["optimizers"]["discriminator"], path)
        self.means.load_state_dict(state["means"], self.device)
        self.skipped.load_state_dict(state["skipped"])
        if changes:
            self.note(changes)

    def close(self) -> None:
        """Nothing to close."""

    def summary(
        self, step: int, *, finished: bool, throughput: Throughput, best: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Draw the curves and write ``summary.json``."""
        folder, config = self._folder, self.config
        lines = read_metrics(folder)
        network = self.kid.network if self.kid else None
        title = f"generator of {config.size} pixels on {config.source}, seed {config.seed}"
        curves = folder / "plots" / "curves.png"
        draw_generator_curves(lines, curves, title=title, network=network)
        kid = [line["generator/kid"] for line in lines if "generator/kid" in line]
        sheets = sorted((folder / "plots").glob("samples-*.png"))
        spread = [line["generator/diversity"] for line in lines if "generator/diversity" in line]
        summary = {
            "source": config.source,
            "images": len(self.images),
            "steps": step,
            "finished": step >= config.steps,
            "kid": kid[-1] if kid else None,
            "kid_network": network,
            "diversity": spread[-1] if spread else None,
            "images_per_second": throughput.images_per_second,
            "training_seconds": throughput.training,
            "run": str(folder),
            "checkpoint": str(newest_checkpoint(folder) or ""),
            "samples": str(sheets[-1]) if sheets else "",
            "curves": str(curves),
            "environment": describe_environment(self.device),
        }
        write_json(folder / "summary.json", summary)
        return summary
