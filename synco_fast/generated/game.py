"""The adversarial update of stage two: both generators and the discriminator learn beside the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from synco_fast.config import GeneratedConfig
from synco_fast.generated.adversary import AdversarialOptimizer, CollapseMonitor, DiscriminatorTrainer, diversity
from synco_fast.generated.discriminator import Discriminator, generator_loss
from synco_fast.methods.base import RunInfo
from synco_fast.runtime.checkpoint import load_optimizer

__all__ = ["AdversarialUpdate", "Clock", "GeneratedBatch", "pairs_objective"]


class GeneratedBatch(NamedTuple):
    """What the generators' loss is computed from.

    Attributes:
        images: Both images of each pair, (2, n, 3, H, W) in [0, 1].
        loss: The contrastive loss of each pair across it, (n,): the mean of each image's query against the other's key.
        similarity: Cosine of the embeddings of both images of a pair under the same augmentation, (n,).
    """

    images: Tensor
    loss: Tensor
    similarity: Tensor


def pairs_objective(loss: Tensor, similarity: Tensor, *, hardness: float, floor: float, floor_weight: float) -> Tensor:
    """What generators add to their adversarial loss: hardness down to a floor, and a push back below it.

    mean of -hardness * L_i over pairs at or above the floor, plus floor_weight * mean of max(0, floor - s_i).

    Args:
        loss: L, (n,).
        similarity: s, (n,).
        hardness: w_hard at this step.
        floor, floor_weight: A pair below the floor is no positive any more: nothing makes it harder.
    """
    harder = torch.where(similarity >= floor, loss, 0.0).mean()
    return floor_weight * relu(floor - similarity).mean() - hardness * harder


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

    def pop(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            self._spent += sum(first.elapsed_time(last) for first, last in self._events) / 1000
        spent, self._spent, self._events = self._spent, 0.0, []
        return spent


class AdversarialUpdate:
    """The optimizers of the generators and the discriminator, and their step.

    Args:
        settings: The section ``generated``.
        generators, discriminator: On the run's device.
        run: Device, length of an epoch, number format.
        clock: Counts the time of the step.
    """

    def __init__(
        self,
        settings: GeneratedConfig,
        generators: nn.Module,
        discriminator: Discriminator,
        run: RunInfo,
        clock: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.settings, self._run, self._clock = settings, run, clock
        self.adversary = DiscriminatorTrainer(
            discriminator,
            lr=settings.lr,
            betas=settings.betas,
            penalty=settings.r1,
            penalty_every=settings.r1_every,
            augmented=True,
            device=run.device,
            autocast=run.autocast,
        )
        self.player = AdversarialOptimizer(
            generators.parameters(), lr=settings.lr, betas=settings.betas, device=run.device
        )
        self.collapse = CollapseMonitor(settings.collapse, grace=0)

    def hardness(self, step: int) -> float:
        """w_hard at a step: rises linearly from 0 over ``ramp_epochs``."""
        ramp = self.settings.ramp_epochs * self._run.steps_per_epoch
        return self.settings.hardness * min(1.0, step / ramp if ramp else 1.0)

    def step(
        self, play: Callable[[], GeneratedBatch], real_images: Callable[[], Tensor], step: int, step_ok: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Let the generators make their pairs harder, and the discriminator judge them.

        Args:
            play: Makes the pairs of the step.
            real_images: Gives the discriminator's real images, uint8 (n, 3, H, W).
            step: Counted from 0.
            step_ok: Whether the encoder's step was taken.

        Returns:
            Whether all steps were taken, and what is logged.
        """
        settings = self.settings
        with self._clock():
            real = real_images()
            with self._run.autocast():
                played = play()
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
            "generator/hardness": torch.full((), self.hardness(step), device=self._run.device),
            "generator/diversity": diversity(played.images[0], real),
            "similarity/pair": played.similarity.detach().mean(),
            "similarity/pair_lowest": played.similarity.detach().min(),
            "similarity/below_floor": (played.similarity < settings.floor).float().mean(),
        }
        return step_ok & moved & judged, metrics

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state; weights are kept with the method."""
        return {"generators": self.player.optimizer.state_dict(), "discriminator": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any], file: Path) -> None:
        """Take over from a checkpoint."""
        load_optimizer(self.player.optimizer, state["generators"], file)
        self.adversary.load_state_dict(state["discriminator"], file)
