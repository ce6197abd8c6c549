"""The views' kernels against plain PyTorch in float64, on any device and any shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synco_fast.kernels.views.launch import make_views
from synco_fast.kernels.views.reference import plain_views

__all__ = ["ViewsCase", "ViewsVerdict", "validate_views"]

#: Bounds in levels of 255 beside the rounding of a 16-bit result. A pixel of a crop may be rounded the other way, which
#: the jitter enlarges: by each factor, and in the hue of a pixel without colour by its whole chroma.
_LARGEST, _MEAN = 6.0, 1.0
_NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
#: Largest side of an image where a case leaves the shape open.
_SIDE = 400


@dataclass(frozen=True)
class ViewsCase:
    """One comparison.

    Attributes:
        size: Side of a view.
        views: How many.
        dtype: torch.uint8 for pixels, or a floating type for normalised values.
        image: Height and width of all images; None for images of any shape.
        channels, planar: As in `make_views`.
        sigma: Largest sigma of the blur.
    """

    size: int
    views: int
    dtype: torch.dtype
    image: tuple[int, int] | None = None
    channels: int = 3
    planar: bool = False
    sigma: float = 2.0

    @property
    def about(self) -> str:
        """The case in words."""
        shape = "any shape" if self.image is None else f"{self.image[0]} x {self.image[1]}"
        layout = "planar" if self.planar else "interleaved"
        return (
            f"{self.views} views of {self.size} pixels from images of {shape}, {self.channels} channels {layout}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class ViewsVerdict:
    """The result of a case: errors and bounds in levels of 255 by quantity, and what missed its bound."""

    case: ViewsCase
    errors: dict[str, float]
    bounds: dict[str, float]
    misses: tuple[str, ...]


def validate_views(
    case: ViewsCase, device: torch.device, make: Callable[..., Tensor] = make_views, *, seed: int = 0
) -> ViewsVerdict:
    """Compare views with `plain_views`, and with a repeat, bit for bit.

    Args:
        case: What is made.
        device: Where.
        make: What makes the views; the kernels.
        seed: Of images and parameters.
    """
    given = _inputs(case, device, seed)
    options: dict[str, Any] = {"size": case.size, "channels": case.channels, "planar": case.planar}
    if case.dtype != torch.uint8:
        options |= _NORMAL
    found, again = (make(*given, **options, dtype=case.dtype) for _ in range(2))
    exact = plain_views(*given, **options, dtype=torch.uint8 if case.dtype == torch.uint8 else torch.float64)
    error = (found.double() - exact.double()).abs()
    rounding = 0.0
    if case.dtype != torch.uint8:
        error *= 255 * error.new_tensor(_NORMAL["std"]).view(3, 1, 1)
        # Normalised values reach some 2.7.
        rounding = 2.7 * torch.finfo(case.dtype).eps * 255 * max(_NORMAL["std"])
    errors = {"pixel": error.max().item(), "mean of a view": error.mean(dim=(1, 2, 3)).max().item()}
    bounds = {"pixel": _LARGEST + rounding, "mean of a view": _MEAN + rounding}
    # Written so that NaN misses.
    misses = [name for name, value in errors.items() if not value <= bounds[name]]
    if not torch.equal(found, again):
        misses.append("a repeat gives other bits")
    return ViewsVerdict(case, errors, bounds, tuple(misses))


def _inputs(
    case: ViewsCase, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Images of coarse patches with noise, in one buffer with gaps, and parameters that use every operation."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def whole(low: Tensor | int, high: Tensor) -> Tensor:
        """Uniform whole numbers from low to high."""
        return (low + uniform(len(high)) * (high - low + 1)).long().minimum(high)

    count = max(1, case.views // 2)
    if case.image is None:
        sizes = (1 + uniform(count, 2) ** 2 * _SIDE).long()
    else:
        sizes = torch.tensor([case.image]).expand(count, 2).clone()
    images = torch.arange(case.views) % count
    parts, offsets, at = [], [], 0
    for height, width in sizes.tolist():
        gap, patch = 3, max(1, (height + width) // 16)
        coarse = uniform(case.channels, height // patch + 1, width // patch + 1) * 255
        image = coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
        image = (image + 20 * (uniform(*image.shape) - 0.5)).clamp(0, 255).to(torch.uint8)
        parts += [torch.full((gap,), 255, dtype=torch.uint8)]
        parts += [(image if case.planar else image.permute(1, 2, 0)).reshape(-1)]
        offsets.append(at + gap)
        at += gap + parts[-1].numel()
    height, width = sizes[images].unbind(1)
    rows, columns = whole(1, height), whole(1, width)
    rows[0], columns[0] = height[0], width[0]  # a whole image without any change comes first
    crop = torch.stack([whole(0, height - rows), whole(0, width - columns), rows, columns], dim=1)
    identity = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    spread = torch.tensor([0.4, 0.4, 0.4, 0.1], dtype=torch.float64)
    changed = uniform(case.views, 4) < 0.8
    changed[0] = False
    factors = torch.where(changed, identity + spread * (2 * uniform(case.views, 4) - 1), identity)
    drawn = {
        name: uniform(case.views) < share for name, share in (("grayscale", 0.2), ("solarize", 0.2), ("flip", 0.5))
    }
    sigma = torch.where(uniform(case.views) < 0.5, 0.1 + (case.sigma - 0.1) * uniform(case.views), torch.zeros(()))
    sigma[0] = 0
    parameters = {
        "crop": crop,
        "order": uniform(case.views, 4).argsort(dim=1),
        "factors": factors.float(),
        "grayscale": drawn["grayscale"],
        "sigma": sigma.float(),
        "solarize": drawn["solarize"],
        "flip": drawn["flip"],
    }
    moved = {name: values.to(device) for name, values in parameters.items()}
    return torch.cat(parts).to(device), torch.tensor(offsets).to(device), sizes.to(device), images.to(device), moved
