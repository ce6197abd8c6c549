"""The residual block that generator and discriminator are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

__all__ = ["ResidualBlock", "activate"]

#: Keeps the blocks close to the identity at first, as in Mescheder et al.
_BRANCH = 0.1


def activate(features: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2."""
    return leaky_relu(features, 0.2)


class ResidualBlock(nn.Module):
    """shortcut(x) + 0.1 f(x), f of two 3 x 3 convolutions behind leaky ReLUs, without normalisation.

    From Mescheder et al., "Which training methods for GANs do actually converge?" (arXiv 1801.04406, appendix on
    architectures): no sample's output depends on the others of its batch.

    Args:
        into: Channels of the input.
        out: Channels of the output.
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        inner = min(into, out)
        self.first = nn.Conv2d(into, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, out, 3, padding=1)
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, into, H, W) to (B, out, H, W)."""
        branch = self.second(activate(self.first(activate(features))))
        out: Tensor = self.shortcut(features) + _BRANCH * branch
        return out
