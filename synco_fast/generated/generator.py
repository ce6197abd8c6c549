"""An unconditional generator of images of 32 x 32 or 64 x 64 pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from synco_fast.generated.residual import ResidualBlock, activate
from synco_fast.runtime.errors import ConfigError

__all__ = ["SIZES", "Generator", "average_momentum", "check_size", "stage_channels"]

SIZES = (32, 64)
#: Side of the first feature map.
_FIRST = 4
_MOST_CHANNELS = 512


def check_size(size: int, name: str) -> None:
    """Raise unless there is a generator for this image size.

    Raises:
        ConfigError: ``size`` is not in `SIZES`; ``name`` is its name in the message.
    """
    if size not in SIZES:
        raise ConfigError(f"{name}: found {size}, expected {' or '.join(map(str, SIZES))} for generated images")


def stage_channels(size: int, width: int) -> list[int]:
    """Channels of the feature maps from 4 x 4 up to ``size``, halved at every doubling of the side, down to ``width``.

    Args:
        size: Side of the image, of `SIZES`.
        width: Channels at full size.
    """
    stages = int(math.log2(size // _FIRST))
    return [min(_MOST_CHANNELS, width << (stages - stage)) for stage in range(stages + 1)]


class Generator(nn.Module):
    """Latent vectors to images: residual blocks with nearest-neighbour upsampling between (arXiv 1801.04406).

    Args:
        size: Image size, 32 or 64.
        latent: Length of a latent vector.
        width: Channels at full size.

    Raises:
        ConfigError: Any other size.
    """

    def __init__(self, size: int = 32, *, latent: int = 128, width: int = 32) -> None:
        super().__init__()
        check_size(size, "size")
        self.size, self.latent = size, latent
        channels = stage_channels(size, width)
        self.enter = nn.Linear(latent, channels[0] * _FIRST * _FIRST)
        self.blocks = nn.ModuleList(
            ResidualBlock(into, out) for into, out in zip(channels, [*channels[1:], channels[-1]], strict=True)
        )
        self.leave = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, latent), scaled to length sqrt(latent), to images (B, 3, size, size) in [0, 1]."""
        scaled = normalize(latents, dim=1) * math.sqrt(self.latent)
        features = self.enter(scaled).view(len(latents), -1, _FIRST, _FIRST)
        for number, block in enumerate(self.blocks):
            if number:
                features = interpolate(features, scale_factor=2.0, mode="nearest")
            features = block(features)
        return torch.sigmoid(self.leave(activate(features)).float())


def average_momentum(step: int, momentum: float) -> float:
    """Momentum of a generator's moving average, smaller at the start: min(momentum, (1 + s) / (10 + s)).

    So the average of a short run is not dominated by the initial random weights.

    Args:
        step: Completed steps.
        momentum: Its limit, in [0, 1].
    """
    return min(momentum, (1 + step) / (10 + step))
