"""The generators' and the discriminator's steps beside the encoder's, in stage two of the generated method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.config import Config
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources.open import Split
from synco_fast.generated.adversary import Adversary, CollapseMonitor, Player, diversity
from synco_fast.generated.discriminator import generator_loss
from synco_fast.generated.method import Generated, pairs_objective
from synco_fast.generated.plots import draw_pair_curves, draw_samples
from synco_fast.generated.real_images import ResidentImages
from synco_fast.methods.base import Arranged
from synco_fast.runtime.checkpoint import find_checkpoint, load_weights
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.training.metrics import read_metrics

__all__ = ["Clock", "Game", "load_stage_one"]

_SHEET_PAIRS = 32
_SHEET_SEED = 1 << 40


class Clock:
    """Adds up the time of some parts of the steps, on a GPU by events, so that no step waits.

    Args:
        device: Whose time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Count what happens inside."""
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        began = time.perf_counter()
        yield
        self._spent += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            self._spent += sum(first.elapsed_time(last) for first, last in self._events) / 1000
        spent, self._spent, self._events = self._spent, 0.0, []
        return spent


class Game:
    """Both generators and the discriminator as they learn; with frozen generators nothing moves.

    Args:
        config: What to do.
        method: With the networks.
        device: Where they are.
        steps_per_epoch: Turns the ramp's epochs into steps.
        processes: Of the job.
        autocast: The context of a forward pass.

    Attributes:
        images: The real images without augmentation; the loop puts them in.

    Raises:
        ConfigError: There are several processes.
    """

    def __init__(
        self,
        config: Config,
        method: Generated,
        device: torch.device,
        *,
        steps_per_epoch: int,
        processes: int = 1,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if processes > 1:
            raise ConfigError(f"processes: found {processes}, expected 1 beside generated pairs")
        self.settings, self.seed, self.device, self._method = config.generated, config.seed, device, method
        self._batch, self._recipe_size, self._steps_per_epoch = (
            config.training.batch,
            config.augment.size,
            steps_per_epoch,
        )
        settings = self.settings
        self.learns = settings.pair == "joint"
        self.images: ResidentImages | None = None
        self.adversary = Adversary(
            method.discriminator,
            lr=settings.lr,
            betas=settings.betas,
            penalty=settings.r1,
            penalty_every=settings.r1_every,
            augmented=True,
            device=device,
            autocast=autocast,
        )
        self._autocast = autocast
        self.player = Player(method.generators.parameters(), lr=settings.lr, betas=settings.betas, device=device)
        self.collapse = CollapseMonitor(settings.collapse, grace=0)
        self.clock = Clock(device)
        self._played = 0
        method.timed = self.clock

    def hardness(self, step: int) -> float:
        """w_hard at a step: rises linearly from 0 over ``ramp_epochs``."""
        ramp = self.settings.ramp_epochs * self._steps_per_epoch
        return self.settings.hardness * min(1.0, step / ramp if ramp else 1.0)

    def step(self, arranged: Arranged, step: int, epoch: int, accept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Let the generators make their pairs harder, and the discriminator judge them.

        Args:
            arranged: The step's input, whose images the discriminator sees whole.
            step, epoch: Counted from 0.
            accept: Whether the encoder moved.

        Returns:
            Whether all of them moved, and what is logged.
        """
        self._played += 1
        if not self.learns:
            return accept, {}
        assert self.images is not None
        settings = self.settings
        with self.clock():
            real = self.images.take(arranged.images[: 2 * self._method.pairs])
            with self._autocast():
                played = self._method.play(self._method.latents(self.device), arranged, step=step, epoch=epoch)
            generated = played.images.flatten(0, 1)
            adversarial = generator_loss(self.adversary.judge(generated))
            added = pairs_objective(
                played.loss,
                played.similarity,
                hardness=self.hardness(step),
                floor=settings.floor,
                floor_weight=settings.floor_weight,
            )
            moved = self.player.learn(adversarial + added)
            judged, metrics = self.adversary.learn(real, generated, step)
        metrics |= {
            "generator/loss": adversarial.detach(),
            "generator/contrastive": played.loss.detach().mean(),
            "generator/hardness": torch.full((), self.hardness(step), device=self.device),
            "generator/diversity": diversity(played.images[0], real),
            "similarity/pair": played.similarity.detach().mean(),
            "similarity/pair_lowest": played.similarity.detach().min(),
            "similarity/below_floor": (played.similarity < settings.floor).float().mean(),
        }
        return accept & moved & judged, metrics

    # -- around the steps ---------------------------------------------------------------------------------------

    def prepare(self, split: Split, workers: int | None, *, fresh: bool) -> list[str]:
        """Load stage one into a run that begins, and read the real images.

        Returns:
            Lines to show.

        Raises:
            ConfigError, CheckpointError: There is no stage one, or it is of another size or architecture.
            DataError: No image can be read.
        """
        notes = [load_stage_one(self._method, self.settings.checkpoint, self._recipe_size)] if fresh else []
        if self.learns:
            self.images = ResidentImages(split, self._recipe_size, workers=workers, device=self.device)
        return notes

    def figures(self, values: dict[str, float], step: int) -> str | None:
        """Add ``generators_time``, the generators' share of a step's time; a line where the pairs have collapsed.

        Args:
            values: A line of the log, to which the share is added.
            step: Steps that are done.
        """
        spent, played, self._played = self.clock.take(), self._played, 0
        if played and "images_per_second" in values:
            values["generators_time"] = min(1.0, spent / played * values["images_per_second"] / self._batch)
        found = values.get("generator/diversity")
        return None if found is None else self.collapse.look(found, step)

    @torch.no_grad()
    def draw(self, folder: Path, step: int) -> Path:
        """A sheet of pairs side by side, from the same latent vectors every time: ``generated-STEP.png``."""
        draws = torch.Generator().manual_seed(derive_seed(self.seed, _SHEET_SEED))
        latents = torch.randn(_SHEET_PAIRS, self._method.latent, generator=draws).to(self.device)
        pairs = self._method.generate(latents).transpose(0, 1).flatten(0, 1)
        path = folder / f"generated-{step:08d}.png"
        draw_samples(pairs, path)
        return path

    def draw_curves(self, folder: Path) -> None:
        """``plots/generated.png`` of the run in ``folder``: similarity, losses, diversity and cost over steps."""
        title = f"generated pairs, {self.settings.pair}, seed {self.seed}"
        path = folder / "plots" / "generated.png"
        draw_pair_curves(read_metrics(folder), path, title=title, floor=self.settings.floor)

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' state; weights are kept with the method."""
        return {"generators": self.player.optimizer.state_dict(), "discriminator": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from a checkpoint."""
        self.player.optimizer.load_state_dict(state["generators"])
        self.adversary.load_state_dict(state["discriminator"])


def load_stage_one(method: Generated, checkpoint: str | None, size: int) -> str:
    """Start both generators from the moving average of a run of stage one, and the discriminator from that run's.

    The second starts a little off the first; see `Generated.part`.

    Returns:
        A line that says from which.

    Raises:
        ConfigError: No checkpoint is named, or its images have another size.
        CheckpointError: It cannot be read, is none of stage one, or is of another architecture.
    """
    if checkpoint is None:
        raise ConfigError(
            "generated.checkpoint: found none, expected a run of 'synco-fast pretrain-generator', or "
            "generated.pair none"
        )
    state, path, _ = find_checkpoint(Path(checkpoint))
    if "generator_config" not in state:
        raise CheckpointError(f"{path}: found no generator in it, expected a checkpoint of pretrain-generator")
    found = state["generator_config"]["size"]
    if found != size:
        raise ConfigError(f"generated.checkpoint: found a generator of {found} pixels, expected {size} (augment.size)")
    for generator in method.generators:
        load_weights(generator, state["average"], path)
    load_weights(method.discriminator, state["discriminator"], path)
    method.part(method.seed)
    return f"generators from {path}, step {state['step']}, which learned from {state['images']:,} images"
