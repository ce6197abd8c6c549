"""Stage one of the generated method: a generator learns the unlabelled images against a discriminator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.splits import share_of
from synco_fast.generated.adversary import Adversary, CollapseMonitor, Player, diversity
from synco_fast.generated.config import GeneratorConfig
from synco_fast.generated.discriminator import Discriminator, generator_loss
from synco_fast.generated.generator import Generator, average_momentum
from synco_fast.generated.kid import Quality
from synco_fast.generated.plots import draw_generator_curves, draw_samples
from synco_fast.generated.real_images import ResidentImages
from synco_fast.models.ema import follow, key_encoder_of
from synco_fast.runtime.checkpoint import checkpoints_in, find_checkpoint, load_weights, save_checkpoint
from synco_fast.runtime.distributed import Control, Place
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DivergedError
from synco_fast.runtime.files import write_json
from synco_fast.runtime.optim_step import SkippedSteps
from synco_fast.runtime.precision import Precision, memory_format, resolve_device
from synco_fast.training.bad_images import BrokenImages
from synco_fast.training.means import RunningMeans
from synco_fast.training.metrics import Lines, MetricLog, TensorBoard, read_metrics
from synco_fast.training.progress import Reporter
from synco_fast.training.run_folder import describe_run
from synco_fast.training.stopping import Stopping
from synco_fast.training.throughput import Throughput

__all__ = ["GeneratorTrainer"]

_SHEET = 64
_SETTLING_STEPS = 3
#: Apart from the numbers of steps, which seed everything else.
_SHEET_SEED, _QUALITY_SEED = 1 << 40, 1 << 41


class GeneratorTrainer:
    """One run of stage one, in one process.

    A step depends on seed and step number alone, so a run that was stopped goes on as if it had not been.

    Args:
        config: What to do.
        folder: The run folder; made when the run begins.
        resume: A checkpoint or run folder to go on from.
        console: Where progress is shown.

    Raises:
        UserError: Anything in the configuration, the images or the checkpoint that cannot work.
    """

    def __init__(
        self, config: GeneratorConfig, folder: Path, *, resume: Path | None = None, console: Console | None = None
    ) -> None:
        self.config, self.folder, self.console = config, folder, console or Console()
        self.device = resolve_device(config.device)
        self.precision = Precision(config.precision, self.device, key="precision")
        self.quality = Quality(config.encoder, config.size, self.device) if config.quality_every else None
        self._notes: list[str] = []
        train = share_of(open_source(config.source).train, config.share)
        if len(train) < config.batch:
            raise ConfigError(f"batch: found {config.batch}, expected up to {len(train)}, the number of images")
        self.images = ResidentImages(train, config.size, workers=config.workers, device=self.device)
        BrokenImages(len(self.images), config.max_broken, self._notes.append).replaced(self.images.broken)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.generator = Generator(config.size, latent=config.latent, width=config.width).to(self.device)
            discriminator = Discriminator(config.size, width=config.width).to(self.device)
        for network in (self.generator, discriminator):
            memory_format(network, config.channels_last)
        self.average = key_encoder_of(self.generator)
        self.adversary = Adversary(
            discriminator,
            lr=config.lr,
            betas=config.betas,
            penalty=config.r1,
            penalty_every=config.r1_every,
            augmented=config.augment,
            device=self.device,
            autocast=self.precision.autocast,
        )
        self.player = Player(self.generator.parameters(), lr=config.lr, betas=config.betas, device=self.device)
        self.means, self.skipped = RunningMeans(), SkippedSteps(self.device)
        self.throughput = Throughput(config.batch, _SETTLING_STEPS)
        self.stopping = Stopping(Control(Place()), config.max_time)
        self.collapse = CollapseMonitor(config.collapse, config.steps // 5)
        self.step = 0
        self._save_due = False
        self._order: tuple[int, Tensor] | None = None
        if resume is not None:
            self._load(resume)

    def run(self) -> dict[str, Any]:
        """Train to the end, or until a signal or the budget asks to stop; the figures of ``summary.json``.

        Raises:
            DivergedError: A loss of either player stopped being a number; the last good checkpoint is kept.
        """
        config = self.config
        describe_run(self.folder, config)
        self.log = MetricLog(Lines(self.folder, self.step), TensorBoard(self.folder, self.step))
        self.reporter = Reporter(self.console, config.steps, self.step)
        for note in self._notes:
            self.reporter.note(note, "yellow")
        try:
            with self.stopping.on_signals():
                self.throughput.begin()
                while self.step < config.steps and not self.stopping.agreed:
                    self._train_step()
                    self.stopping.after_step(self.step)
                    self._after_step()
        finally:
            self.reporter.close()
            self.log.close()
        return self._finish()

    def _train_step(self) -> None:
        config, step = self.config, self.step
        torch.manual_seed(derive_seed(config.seed, step))
        real = self.images.take(self._numbers(step))
        with self.precision.autocast():
            generated = self.generator(torch.randn(config.batch, config.latent, device=self.device))
        learned, metrics = self.adversary.learn(real, generated, step)
        loss = generator_loss(self.adversary.judge(generated))
        accept = self.player.learn(loss) & learned
        follow(self.average, self.generator, average_momentum(step, config.average))
        metrics |= {"generator/loss": loss.detach(), "generator/diversity": diversity(generated, real)}
        self.means.add(metrics, accept)
        self.skipped.add(accept, step)
        self.step += 1
        self.throughput.step(0.0)

    def _numbers(self, step: int) -> Tensor:
        """Which images a step takes: epochs without repetition, the last images of each left out."""
        epoch, place = divmod(step, len(self.images) // self.config.batch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.images), seed=self.config.seed, epoch=epoch)
        return self._order[1][place * self.config.batch : (place + 1) * self.config.batch]

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.steps or self.stopping.agreed
        self.reporter.step(self.step, "generator")
        log_due = self.step % config.log_every == 0 or self.step == config.steps
        if log_due or self.device.type == "cpu":
            self._check_skipped()
        if log_due:
            self._write_figures()
        began = time.perf_counter()
        if self.step % config.sample_every == 0 or self.step == config.steps:
            draw_samples(self.samples(_SHEET, _SHEET_SEED), self.folder / "plots" / f"samples-{self.step:08d}.png")
        every = config.quality_every
        if self.quality is not None and (self.step % every == 0 or self.step == config.steps):
            kid = self._measure()
            self.log.write("evaluation", self.step, {"generator/kid": kid})
            self.reporter.note(f"step {self.step}: KID {kid:.4f} on {self.quality.network}")
        if last or self._save_due or self.step % config.checkpoint_every == 0:
            self._save()
        self.throughput.pause(time.perf_counter() - began)

    def _write_figures(self) -> None:
        values = {**self.means.take(), **self.throughput.take(), "skipped": float(self.skipped.read()[0])}
        del values["data_wait"]
        self.log.write("train", self.step, values)
        if "generator/loss" in values:
            text = f"G {values['generator/loss']:.3f}  D {values['discriminator/loss']:.3f}"
            text += f"  diversity {values['generator/diversity']:.2f}"
            if "images_per_second" in values:
                text += f"  {values['images_per_second']:,.0f} img/s"
            self.reporter.line(self.step, "generator", text)
            warning = self.collapse.look(values["generator/diversity"], self.step)
            if warning:
                self.reporter.note(warning, "yellow")

    @torch.no_grad()
    def samples(self, count: int, purpose: int) -> Tensor:
        """Images (count, 3, size, size) of the moving average, the same latent vectors every time."""
        draws = torch.Generator().manual_seed(derive_seed(self.config.seed, purpose))
        images: Tensor = self.average(torch.randn(count, self.config.latent, generator=draws).to(self.device))
        return images

    def _measure(self) -> float:
        assert self.quality is not None
        count = min(self.config.quality_images, len(self.images))
        numbers = torch.arange(count) * len(self.images) // count
        parts = [min(self.config.batch, count - begin) for begin in range(0, count, self.config.batch)]
        real = (self.images.take(part) for part in numbers.split(self.config.batch))
        generated = (self.samples(part, _QUALITY_SEED + number) for number, part in enumerate(parts))
        return self.quality.measure(real, generated, count)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _check_skipped(self) -> int:
        """How many steps in a row were left out up to now.

        Raises:
            DivergedError: They are more than allowed, a weight is no number, or the run ends with them.
        """
        _, row, first = self.skipped.read()
        weights = [*self.generator.parameters(), *self.adversary.discriminator.parameters()]
        allowed = row <= self.config.max_skipped and self.step < self.config.steps
        if not row or (allowed and all(bool(torch.isfinite(weight).all()) for weight in weights)):
            return row
        newest = checkpoints_in(self.folder / "checkpoints")
        kept = f"the last good checkpoint is {newest[0]}" if newest else "no checkpoint had been written"
        raise DivergedError(
            f"generator: found a gradient that is not finite at step {first + 1} and {row - 1} more after it, expected "
            f"{self.config.max_skipped} in a row (max_skipped), and none at the end; {kept}; try a lower lr or more r1"
        )

    def _save(self) -> None:
        self._save_due = self._check_skipped() > 0
        if self._save_due:
            return
        state = {
            "generator_config": self.config.model_dump(mode="json"),
            "images": len(self.images),
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.adversary.discriminator.state_dict(),
            "players": {"generator": self.player.optimizer.state_dict(), "discriminator": self.adversary.state_dict()},
            "means": self.means.state_dict(),
            "skipped": self.skipped.state_dict(),
            **self.throughput.state_dict(),
        }
        save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.config.keep)

    def _load(self, resume: Path) -> None:
        if resume.is_dir() and (resume / "config.yaml").exists() and not checkpoints_in(resume / "checkpoints"):
            self._notes.append(f"{resume} holds no checkpoint yet: starting at the first step")
            return
        state, path, problems = find_checkpoint(resume)
        self._notes += [f"{problem}; going on from an older one" for problem in problems]
        if "generator_config" not in state:
            raise ConfigError(f"resume: found no generator in {path}, expected a run of pretrain-generator")
        if state["images"] != len(self.images):
            raise ConfigError(
                f"source: found {len(self.images)} images, expected {state['images']} to go on with {path}"
            )
        load_weights(self.generator, state["generator"], path)
        load_weights(self.average, state["average"], path)
        load_weights(self.adversary.discriminator, state["discriminator"], path)
        self.player.optimizer.load_state_dict(state["players"]["generator"])
        self.adversary.load_state_dict(state["players"]["discriminator"])
        self.means.load_state_dict(state["means"], self.device)
        self.skipped.load_state_dict(state["skipped"])
        self.throughput.load_state_dict(state)
        self.step = state["step"]
        self._notes.append(f"resumed from {path} at step {self.step} of {self.config.steps}")

    def _finish(self) -> dict[str, Any]:
        lines = read_metrics(self.folder)
        network = self.quality.network if self.quality else None
        title = f"generator of {self.config.size} pixels on {self.config.source}, seed {self.config.seed}"
        curves = self.folder / "plots" / "curves.png"
        draw_generator_curves(lines, curves, title=title, network=network)
        kid = [line["generator/kid"] for line in lines if "generator/kid" in line]
        sheets = sorted((self.folder / "plots").glob("samples-*.png"))
        spread = [line["generator/diversity"] for line in lines if "generator/diversity" in line]
        newest = checkpoints_in(self.folder / "checkpoints")
        summary = {
            "source": self.config.source,
            "images": len(self.images),
            "steps": self.step,
            "finished": self.step >= self.config.steps,
            "kid": kid[-1] if kid else None,
            "kid_network": network,
            "diversity": spread[-1] if spread else None,
            "images_per_second": self.throughput.images_per_second,
            "training_seconds": self.throughput.training,
            "run": str(self.folder),
            "checkpoint": str(newest[0]) if newest else "",
            "samples": str(sheets[-1]) if sheets else "",
            "curves": str(curves),
            "environment": describe_environment(),
        }
        write_json(self.folder / "summary.json", summary)
        return summary
