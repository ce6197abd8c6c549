"""The adversarial update of stage two: both generators and the discriminator are trained beside the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from synco_fast.config import GeneratedConfig
from synco_fast.generated.adversarial import AdversarialOptimizer, CollapseMonitor, DiscriminatorTrainer, diversity
from synco_fast.generated.discriminator import Discriminator, generator_loss
from synco_fast.methods.base import RunInfo
from synco_fast.runtime.checkpoint import load_optimizer
from synco_fast.runtime.phases import Mark, mark, seconds_between, wait_for

__all__ = ["AdversarialUpdate", "Clock", "GeneratedBatch", "pairs_objective"]


class GeneratedBatch(NamedTuple):
    """The inputs of the generators' loss.

    Attributes:
        images: Both images of each pair, (2, n, 3, H, W) in [0, 1].
        loss: The contrastive loss across each pair, (n,): the mean over each image's query against the other's key.
        similarity: Cosine of the embeddings of both images of a pair under the same augmentation, (n,).
    """

    images: Tensor
    loss: Tensor
    similarity: Tensor


def pairs_objective(loss: Tensor, similarity: Tensor, *, hardness: float, floor: float, floor_weight: float) -> Tensor:
    """The generators' term beside the adversarial loss: harder pairs above a floor of similarity, easier ones below it.

    The mean of -hardness * L_i over pairs at or above the floor, plus floor_weight * mean of max(0, floor - s_i).

    Args:
        loss: L, (n,).
        similarity: s, (n,).
        hardness: w_hard at this step.
        floor, floor_weight: Below the floor a pair no longer counts as a positive, so it is not made harder.
    """
    harder = torch.where(similarity >= floor, loss, 0.0).mean()
    return floor_weight * relu(floor - similarity).mean() - hardness * harder


class Clock:
    """Adds up the time of parts of the steps; on a GPU by events, so that no step waits.

    Args:
        device: The device to time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[tuple[Mark, Mark]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Time the block."""
        begin = mark(cuda=self._device.type == "cuda")
        yield
        self._times.append((begin, mark(cuda=self._device.type == "cuda")))

    def pop(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self._times:
            wait_for(self._device)
        spent = sum(seconds_between(begin, end) for begin, end in self._times)
        self._times.clear()
        return spent


class AdversarialUpdate:
    """The optimizers of the generators and the discriminator, and their step.

    Args:
        settings: The section ``generated`` of the configuration.
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
        self.discriminator_trainer = DiscriminatorTrainer(
            discriminator,
            lr=settings.lr,
            betas=settings.betas,
            penalty=settings.r1,
            penalty_every=settings.r1_every,
            augmented=True,
            device=run.device,
            autocast=run.autocast,
        )
        self.generator_optimizer = AdversarialOptimizer(
            generators.parameters(), lr=settings.lr, betas=settings.betas, device=run.device
        )
        self.collapse = CollapseMonitor(settings.collapse, grace=0)

    def hardness(self, step: int) -> float:
        """w_hard at a step: rises linearly from 0 over ``ramp_epochs``."""
        ramp = self.settings.ramp_epochs * self._run.steps_per_epoch
        return self.settings.hardness * min(1.0, step / ramp if ramp else 1.0)

    def step(
        self, make_batch: Callable[[], GeneratedBatch], real_images: Callable[[], Tensor], step: int, step_ok: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the generators towards harder pairs, and the discriminator.

        Args:
            make_batch: Generates the pairs of the step.
            real_images: Returns the discriminator's real images, uint8 (n, 3, H, W).
            step: Counted from 0.
            step_ok: Whether the encoder's step was taken.

        Returns:
            Whether all steps were taken, and metrics.
        """
        settings = self.settings
        with self._clock():
            real = real_images()
            with self._run.autocast():
                batch = make_batch()
            generated = batch.images.flatten(0, 1)
            adversarial = generator_loss(self.discriminator_trainer.judge(generated))
            added = pairs_objective(
                batch.loss,
                batch.similarity,
                hardness=self.hardness(step),
                floor=settings.floor,
                floor_weight=settings.floor_weight,
            )
            moved = self.generator_optimizer.learn(adversarial + added)
            judged, metrics = self.discriminator_trainer.learn(real, generated, step)
        metrics |= {
            "generator/loss": adversarial.detach(),
            "generator/contrastive": batch.loss.detach().mean(),
            "generator/hardness": torch.full((), self.hardness(step), device=self._run.device),
            "generator/diversity": diversity(batch.images[0], real),
            "similarity/pair": batch.similarity.detach().mean(),
            "similarity/pair_lowest": batch.similarity.detach().min(),
            "similarity/below_floor": (batch.similarity < settings.floor).float().mean(),
        }
        return step_ok & moved & judged, metrics

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state; the weights are in the method's state."""
        return {
            "generators": self.generator_optimizer.optimizer.state_dict(),
            "discriminator": self.discriminator_trainer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], file: Path) -> None:
        """Load from the checkpoint ``file``."""
        load_optimizer(self.generator_optimizer.optimizer, state["generators"], file)
        self.discriminator_trainer.load_state_dict(state["discriminator"], file)
