"""One side of the two-player game, and how a player learns: shared by both stages of the generated method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synco_fast.generated.augment import augment_for_discriminator, draw_discriminator
from synco_fast.generated.discriminator import Discriminator, discriminator_loss, gradient_penalty
from synco_fast.runtime.checkpoint import load_optimizer
from synco_fast.runtime.optim_step import OptimStep

__all__ = ["AdversarialOptimizer", "CollapseMonitor", "DiscriminatorTrainer", "diversity"]


class AdversarialOptimizer:
    """Parameters that learn by Adam, each step skipped where its gradient is not finite.

    Args:
        parameters: What learns.
        lr: Constant over the run.
        betas: Of Adam.
        device: Where the parameters are.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], device: torch.device
    ) -> None:
        self._parameters = list(parameters)
        self.optimizer = torch.optim.Adam(self._parameters, lr=lr, betas=betas, fused=device.type == "cuda")
        self._update = OptimStep(self.optimizer, scaled=False, clip=None, device=device)

    def learn(self, loss: Tensor) -> Tensor:
        """Take one step down ``loss``; no other parameter gets a gradient.

        Returns:
            Whether the step was taken, bool of no dimensions on the device.
        """
        gradients = torch.autograd.grad(loss, self._parameters)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        accept, _ = self._update.step()
        self.optimizer.zero_grad(set_to_none=True)
        return accept


class DiscriminatorTrainer:
    """The discriminator as it learns and as it judges, which is always behind the same augmentation.

    Args:
        discriminator: On ``device``.
        lr, betas: Of Adam.
        penalty: Weight of R1.
        penalty_every: R1 is computed every so many steps and weighted by as much (arXiv 1912.04958 section 3.1).
        augmented: Whether images are augmented before they are judged, real and generated ones alike.
        device: Where it computes.
        autocast: The context of a forward pass; R1, a gradient of a gradient, is computed in float32.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        *,
        lr: float,
        betas: tuple[float, float],
        penalty: float,
        penalty_every: int,
        augmented: bool,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.discriminator, self._penalty, self._every = discriminator, penalty, penalty_every
        self._augmented, self._autocast = augmented, autocast
        self.player = AdversarialOptimizer(discriminator.parameters(), lr=lr, betas=betas, device=device)

    def judge(self, images: Tensor, *, in_float32: bool = False) -> Tensor:
        """Float32 logits (n,) of images (n, 3, H, W) in [0, 1]: the only way by which they reach the discriminator."""
        if self._augmented:
            draws = draw_discriminator(len(images), images.shape[-1], images.device)
            images = augment_for_discriminator(images, draws)
        with nullcontext() if in_float32 else self._autocast():
            logits: Tensor = self.discriminator(images)
        return logits.float()

    def learn(self, real: Tensor, generated: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step towards telling ``real``, uint8 (n, 3, H, W), from ``generated``, (m, 3, H, W) in [0, 1].

        Returns:
            Whether the step was taken, and the loss without R1 and the share of either kind that is told rightly.
        """
        images = real.float() / 255
        penalised = bool(self._penalty) and step % self._every == 0
        images.requires_grad_(penalised)
        on_real, on_generated = (self.judge(x, in_float32=penalised) for x in (images, generated.detach()))
        loss = discriminator_loss(on_real, on_generated)
        whole = loss
        if penalised:
            whole = loss + self._penalty * self._every * gradient_penalty(on_real, images)
        accept = self.player.learn(whole)
        return accept, {
            "discriminator/loss": loss.detach(),
            "discriminator/real": (on_real > 0).float().mean(),
            "discriminator/generated": (on_generated < 0).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state; weights are kept with the modules."""
        return self.player.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], file: Path) -> None:
        """Take over from a checkpoint."""
        load_optimizer(self.player.optimizer, state, file)


def diversity(generated: Tensor, real: Tensor) -> Tensor:
    """How far generated images are from one another, as a share of how far real ones are.

    Args:
        generated: (n, 3, H, W) in [0, 1].
        real: uint8, (m, 3, H, W).

    Returns:
        The mean absolute difference between neighbours in the batch, generated over real; no dimensions.
    """
    real = real.float() / 255
    between = [(images - images.roll(1, 0)).abs().mean() for images in (generated.detach(), real)]
    return between[0] / between[1].clamp(min=1e-6)


class CollapseMonitor:
    """Warns once when generated images become alike, and again only after they have recovered.

    Args:
        threshold: The diversity below which they are.
        grace: Steps in which a generator that has never been above it may still be learning.
    """

    def __init__(self, threshold: float, grace: int) -> None:
        self._threshold, self._grace = threshold, grace
        self._was_above = self._warned = False

    def look(self, value: float, step: int) -> str | None:
        """A line where it is time for one."""
        if value >= self._threshold:
            self._was_above, self._warned = True, False
            return None
        if self._warned or not (self._was_above or step > self._grace):
            return None
        self._warned = True
        return (
            f"generator: found a diversity of {value:.2f} at step {step}, expected {self._threshold:g} or more of the "
            "real images': it makes nearly the same image every time (mode collapse); try more r1 or a lower lr"
        )
