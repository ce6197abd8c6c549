"""Augmented views in plain PyTorch, one after the other, as they are read: any device, sums in float64.

The arguments are those of `synco_fast.kernels.views.make_views`. A view is made in values from 0 to 255: rounded to
whole numbers after the crop and at the end, clamped after each part of the jitter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from synco_fast.kernels.views.words import as_parameters

__all__ = ["plain_views"]

_LUMA = (0.299, 0.587, 0.114)
#: Half the width of the blur's window, in sigmas.
_SIGMAS = 3


def plain_views(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    images: Tensor,
    parameters: Mapping[str, Tensor] | Tensor,
    *,
    size: int,
    channels: int = 3,
    planar: bool = False,
    dtype: torch.dtype = torch.uint8,
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Arguments and result as in `synco_fast.kernels.views.make_views`; floating dtypes also take float64."""
    if isinstance(parameters, Tensor):
        parameters = as_parameters(parameters)
    host = {name: values.tolist() for name, values in parameters.items()}
    starts, shapes, of = offsets.tolist(), sizes.tolist(), images.tolist()
    views = []
    for row in range(len(host["crop"])):
        image = of[row % len(of)]
        height, width = shapes[image]
        flat = pixels[starts[image] : starts[image] + height * width * channels].double()
        whole = flat.view(channels, height, width) if planar else flat.view(height, width, channels).permute(2, 0, 1)
        view = _crop(whole, host["crop"][row], size).expand(3, -1, -1)
        for part in host["order"][row]:
            view = _PARTS[part](view, host["factors"][row][part])
        if host["grayscale"][row]:
            view = _luma(view).expand(3, -1, -1)
        if host["sigma"][row] > 0:
            view = _blur(_blur(view, host["sigma"][row]).mT, host["sigma"][row]).mT
        if host["solarize"][row]:
            view = torch.minimum(view, 255 - view)
        if host["flip"][row]:
            view = view.flip(2)
        views.append((view.clamp(0, 255) + 0.5).floor())
    out = torch.stack(views) if views else pixels.new_empty((0, 3, size, size), dtype=torch.float64)
    if dtype != torch.uint8:
        middle, scale = (out.new_tensor(values).view(3, 1, 1) * 255 for values in (mean, std))
        out = (out - middle) / scale
    return out.to(dtype).contiguous(memory_format=torch.channels_last)


def _crop(image: Tensor, crop: list[int], size: int) -> Tensor:
    """A window, resized bilinearly with antialiasing: a matrix product along each axis, then rounded."""
    top, left, height, width = crop
    window = image[:, top : top + height, left : left + width]
    rows, columns = (_resize(length, size).to(image.device) for length in (height, width))
    return (rows @ window @ columns.mT + 0.5).floor()


def _resize(length: int, size: int) -> Tensor:
    """Weights (size, length) of the pixels of an axis: a triangle, as wide as a shrunk pixel."""
    scale = length / size
    middle = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    weights = (1 - (torch.arange(length) + 0.5 - middle).abs() / max(scale, 1)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def _luma(view: Tensor) -> Tensor:
    return (view * view.new_tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)


def _brightness(view: Tensor, factor: float) -> Tensor:
    return (view * factor).clamp(0, 255)


def _contrast(view: Tensor, factor: float) -> Tensor:
    return view if factor == 1 else ((1 - factor) * _luma(view).mean() + factor * view).clamp(0, 255)


def _saturation(view: Tensor, factor: float) -> Tensor:
    return ((1 - factor) * _luma(view) + factor * view).clamp(0, 255)


def _hue(view: Tensor, shift: float) -> Tensor:
    """Hue turned by ``shift`` turns in HSV, by the sextant formula of HSV and its inverse."""
    if shift == 0:
        return view
    red, green, blue = view
    value, low = view.amax(0), view.amin(0)
    chroma = value - low
    safe = chroma.clamp_min(1e-6)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = (sextant + 6 * shift) % 6
    # The channel n sextants from red: value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + sextant) mod 6.
    distances = [(number + sextant) % 6 for number in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in distances])


#: By number in the order of a view.
_PARTS = (_brightness, _contrast, _saturation, _hue)


def _blur(view: Tensor, sigma: float) -> Tensor:
    """A Gaussian along the rows, mirrored at the outermost pixels, cut at three sigmas."""
    reach, size = math.ceil(_SIGMAS * sigma), view.shape[2]
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = (torch.arange(size)[:, None] + offsets).abs() % (2 * (size - 1))
    places = torch.minimum(places, 2 * (size - 1) - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))
    return view @ matrix.to(view.device).mT
