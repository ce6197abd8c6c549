"""Adversarial training, shared by both stages: optimizer, discriminator trainer, diversity and its monitor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synco_fast.generated.augment import augment_for_discriminator, draw_discriminator
from synco_fast.generated.discriminator import Discriminator, discriminator_loss, gradient_penalty
from synco_fast.generated.generator import Generator
from synco_fast.runtime.checkpoint import load_optimizer
from synco_fast.runtime.memory import check_memory
from synco_fast.runtime.optim_step import OptimStep

__all__ = ["AdversarialOptimizer", "CollapseMonitor", "DiscriminatorTrainer", "check_networks", "diversity"]


#: What Adam needs of each weight: itself, its gradient and two moments.
_COPIES = 4


def check_networks(size: int, latent: int, width: int, device: torch.device, section: str = "") -> None:
    """Refuse a generator and a discriminator that cannot fit, before they are made.

    Args:
        size: Side of the images in pixels.
        latent: Length of a latent vector.
        width: Channels at full size.
        device: Where they learn.
        section: What the keys begin with in the message.

    Raises:
        ConfigError: They need more memory than the device has.
    """
    with torch.device("meta"):
        networks = (Generator(size, latent=latent, width=width), Discriminator(size, width=width))
    weights = sum(weight.numel() for network in networks for weight in network.parameters())
    found = f"{section}width: found {width} with {section}latent {latent} for a generator and a discriminator"
    check_memory(_COPIES * 4 * weights, device, found)


class AdversarialOptimizer:
    """Adam over one network's parameters; a step with a non-finite gradient is skipped.

    Args:
        parameters: The parameters to train.
        lr: Learning rate, constant over the run.
        betas: Betas of Adam.
        device: Where the parameters are.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], device: torch.device
    ) -> None:
        self._parameters = list(parameters)
        self.optimizer = torch.optim.Adam(self._parameters, lr=lr, betas=betas, fused=device.type == "cuda")
        self._update = OptimStep(self.optimizer, scaled=False, clip=None, device=device)

    def learn(self, loss: Tensor) -> Tensor:
        """Take one step on ``loss``; no other parameter gets a gradient.

        Returns:
            Whether the step was taken, bool of no dimensions on the device.
        """
        gradients = torch.autograd.grad(loss, self._parameters)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        step_ok, _ = self._update.step()
        self.optimizer.zero_grad(set_to_none=True)
        return step_ok


class DiscriminatorTrainer:
    """Trains and applies the discriminator, always behind the same augmentation.

    Args:
        discriminator: The network, on ``device``.
        lr, betas: Settings of Adam.
        penalty: Weight of the R1 penalty.
        penalty_every: R1 is computed every so many steps, with as many times the weight (arXiv 1912.04958 section 3.1).
        augmented: Whether real and generated images are augmented first.
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
        self.optimizer = AdversarialOptimizer(discriminator.parameters(), lr=lr, betas=betas, device=device)

    def judge(self, images: Tensor, *, in_float32: bool = False) -> Tensor:
        """Float32 logits (n,) of images (n, 3, H, W) in [0, 1]; the only path of images to the discriminator."""
        if self._augmented:
            draws = draw_discriminator(len(images), images.shape[-1], images.device)
            images = augment_for_discriminator(images, draws)
        with nullcontext() if in_float32 else self._autocast():
            logits: Tensor = self.discriminator(images)
        return logits.float()

    def learn(self, real: Tensor, generated: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step on ``real``, uint8 (n, 3, H, W), against ``generated``, (m, 3, H, W) in [0, 1].

        Returns:
            Whether the step was taken; the loss without R1, and the accuracy on real and on generated images.
        """
        images = real.float() / 255
        penalised = bool(self._penalty) and step % self._every == 0
        images.requires_grad_(penalised)
        on_real, on_generated = (self.judge(x, in_float32=penalised) for x in (images, generated.detach()))
        loss = discriminator_loss(on_real, on_generated)
        whole = loss
        if penalised:
            whole = loss + self._penalty * self._every * gradient_penalty(on_real, images)
        step_ok = self.optimizer.learn(whole)
        return step_ok, {
            "discriminator/loss": loss.detach(),
            "discriminator/real": (on_real > 0).float().mean(),
            "discriminator/generated": (on_generated < 0).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the weights are in the modules' state."""
        return self.optimizer.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], file: Path) -> None:
        """Load from the checkpoint ``file``."""
        load_optimizer(self.optimizer.optimizer, state, file)


def diversity(generated: Tensor, real: Tensor) -> Tensor:
    """Diversity of generated images, relative to that of real ones.

    Args:
        generated: (n, 3, H, W) in [0, 1].
        real: uint8, (m, 3, H, W).

    Returns:
        The mean absolute difference of neighbours in the batch, generated divided by real; a scalar.
    """
    real = real.float() / 255
    between = [(images - images.roll(1, 0)).abs().mean() for images in (generated.detach(), real)]
    return between[0] / between[1].clamp(min=1e-6)


class CollapseMonitor:
    """Warns once of mode collapse, and again only after the diversity has recovered.

    Args:
        threshold: The diversity below which it warns.
        grace: Steps without a warning for a generator that has never been above the threshold.
    """

    def __init__(self, threshold: float, grace: int) -> None:
        self._threshold, self._grace = threshold, grace
        self._was_above = self._warned = False

    def look(self, value: float, step: int) -> str | None:
        """A warning, if one is due."""
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
