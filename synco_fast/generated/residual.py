"""The residual block of generator and discriminator."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

__all__ = ["ResidualBlock", "activate"]

_SLOPE = 0.2


def activate(features: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2."""
    return leaky_relu(features, _SLOPE)


class ResidualBlock(nn.Module):
    """(shortcut(x) + f(x)) / sqrt(2), f of two 3 x 3 convolutions behind leaky ReLUs, without normalisation.

    The order is that of Mescheder et al. (arXiv 1801.04406, appendix on architectures); no output depends on other
    samples of the batch. Weights follow He et al. (arXiv 1502.01852), and the sum is scaled to unit variance as in
    StyleGAN2's residual networks (arXiv 1912.04958, section 4.1), which helps short runs.

    Args:
        into: Channels of the input.
        out: Channels of the output.
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        inner = min(into, out)
        self.first = _convolution(into, inner)
        self.second = _convolution(inner, out)
        self.shortcut: nn.Module = nn.Identity()
        if into != out:
            self.shortcut = nn.Conv2d(into, out, 1, bias=False)
            nn.init.kaiming_normal_(self.shortcut.weight, nonlinearity="linear")

    def forward(self, features: Tensor) -> Tensor:
        """(B, into, H, W) to (B, out, H, W)."""
        branch = self.second(activate(self.first(activate(features))))
        out: Tensor = (self.shortcut(features) + branch) * math.sqrt(0.5)
        return out


def _convolution(into: int, out: int) -> nn.Conv2d:
    made = nn.Conv2d(into, out, 3, padding=1)
    nn.init.kaiming_normal_(made.weight, a=_SLOPE)
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made
