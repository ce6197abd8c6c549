"""The discriminator, the adversarial losses, and the R1 gradient penalty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, softplus

from synco_fast.generated.generator import check_size, stage_channels
from synco_fast.generated.residual import ResidualBlock, activate

__all__ = ["Discriminator", "discriminator_loss", "generator_loss", "gradient_penalty"]


class Discriminator(nn.Module):
    """Images to logits, above 0 for real images; mirrors the generator (arXiv 1801.04406).

    Args:
        size: Image size, 32 or 64.
        width: Channels at full size.

    Raises:
        ConfigError: Any other size.
    """

    def __init__(self, size: int = 32, *, width: int = 32) -> None:
        super().__init__()
        check_size(size, "size")
        self.size = size
        channels = stage_channels(size, width)[::-1]
        self.enter = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResidualBlock(into, out) for into, out in zip([channels[0], *channels[:-1]], channels, strict=True)
        )
        self.leave = nn.Linear(channels[-1] * 16, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, size, size) in [0, 1] to logits (B,)."""
        features = self.enter(2 * images - 1)
        for number, block in enumerate(self.blocks):
            if number:
                features = avg_pool2d(features, 2)
            features = block(features)
        logits: Tensor = self.leave(activate(features).flatten(1))
        return logits.squeeze(1)


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """-log sigmoid(D(real)) - log(1 - sigmoid(D(generated))), means over logits (n,), (m,) (arXiv 1406.2661 eq. 1)."""
    return softplus(-real).mean() + softplus(generated).mean()


def generator_loss(generated: Tensor) -> Tensor:
    """The non-saturating -log sigmoid(D(generated)), mean over logits (m,) (arXiv 1406.2661 section 3)."""
    return softplus(-generated).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 without its weight: E |grad_x D(x)|^2 / 2 over real images (arXiv 1801.04406 eq. 9).

    Args:
        logits: D(images), (n,), with their autograd graph.
        images: (n, 3, H, W), a leaf that requires a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2
