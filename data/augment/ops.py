"""Augmentation on tensors with drawn parameters, for the torchvision and resident pipelines.

Each operation equals torchvision's up to rounding, but takes whole batches with parameters per image. Pixels are floats
from 0 to 255; they are clamped after each operation, as in torchvision, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from synco_fast.data.augment.draw import OPERATIONS, ViewParameters
from synco_fast.data.transfer import to_device

__all__ = [
    "APPLY",
    "BLUR_SIGMAS",
    "LUMA",
    "blur",
    "crop_and_resize",
    "finish_views",
    "grayscale",
    "jitter",
    "round_views",
    "solarize",
]

#: Weights of red, green and blue in an image's luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)
#: Half the width of the blur's window, in sigmas.
BLUR_SIGMAS = 3


def crop_and_resize(image: Tensor, crop: NDArray[np.int64], size: int) -> Tensor:
    """A window of a uint8 image (3, H, W), resized to (1, 3, size, size) uint8: bilinear, antialiased."""
    top, left, height, width = crop.tolist()
    window = image[None, :, top : top + height, left : left + width]
    return interpolate(window, (size, size), mode="bilinear", antialias=True)


def finish_views(views: Tensor, parameters: ViewParameters) -> Tensor:
    """All operations after the crop, on (n, 3, H, W) crops, uint8 or float from 0 to 255; uint8 of the same shape."""
    views = views.to(torch.float32)
    for operation in OPERATIONS:
        if operation.name != "crop":
            views = APPLY[operation.name](views, parameters)
    return round_views(views)


def round_views(views: Tensor) -> Tensor:
    """Float views from 0 to 255 rounded to uint8, of any shape; modifies them in place."""
    views.add_(0.5)
    # On a CPU two conversions cost a third of one: PyTorch converts floats to uint8 one by one.
    return (views.to(torch.int16) if views.device.type == "cpu" else views).to(torch.uint8)


def jitter(views: Tensor, parameters: ViewParameters) -> Tensor:
    """The colour jitter of float views (n, 3, H, W), each in its own order; may modify them in place."""
    for part, rows in parameters.steps():
        factor = _column(parameters.factors[rows, part], views)
        views = _on_rows(views, rows, _PARTS[part](_rows(views, rows), factor))
    return views


def _rows(views: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return views if len(rows) == len(views) else views[to_device(rows, views.device)]


def _on_rows(views: Tensor, rows: NDArray[np.int64], changed: Tensor) -> Tensor:
    if len(rows) == len(views):
        return changed
    return views.index_copy_(0, to_device(rows, views.device), changed)


def _where(views: Tensor, drawn: NDArray[np.bool_], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an operation to the views that it was drawn for."""
    rows = np.flatnonzero(drawn)
    return _on_rows(views, rows, change(_rows(views, rows))) if rows.size else views


def _column(values: NDArray[np.float32], like: Tensor) -> Tensor:
    """One number per image, (n, 1, 1, 1), on the device of ``like``."""
    return to_device(values, like.device).view(-1, 1, 1, 1)


def _luma(views: Tensor) -> Tensor:
    red, green, blue = views.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def grayscale(views: Tensor) -> Tensor:
    """Three equal channels of the luma of (n, 3, H, W)."""
    return _luma(views).expand_as(views).contiguous()


def solarize(views: Tensor) -> Tensor:
    """Pixels of half the range or more inverted, as in BYOL (arXiv 2006.07733, appendix B); any shape, 0 to 255."""
    return torch.minimum(views, 255 - views)


def _brightness(views: Tensor, factor: Tensor) -> Tensor:
    return (views * factor).clamp_(0, 255)


def _contrast(views: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = views.mean((2, 3), keepdim=True).split(1, dim=1)
    mean = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    offset = (1 - factor) * mean
    if len(views) == 1 and views.device.type == "cpu":  # the same sum, which PyTorch then computes in vectors
        return torch.add(offset, views, alpha=factor.item()).clamp_(0, 255)
    return torch.addcmul(offset, views, factor).clamp_(0, 255)


def _saturation(views: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(views), views, factor).clamp_(0, 255)


def _hue(views: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of (n, 3, H, W) by ``shift`` turns in HSV; value and chroma are kept."""
    red, green, blue = views.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    inverse = chroma.clamp_min(1e-6).reciprocal_()
    corner = torch.where(
        top == red,
        (green - blue).mul_(inverse),
        torch.where(top == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )
    corner.div_(6).add_(shift.squeeze(1))
    corner.sub_(corner.floor()).mul_(6)
    turned = torch.empty_like(views)
    # Around the hexagon a channel is full on two sides of six and empty on two.
    for channel, middle in enumerate((3, 2, 4)):
        share = (corner - middle).abs_()
        share = (share.sub_(1) if channel == 0 else 2 - share).clamp_(0, 1)
        turned[:, channel] = share.mul_(chroma).add_(low)
    return turned


#: By index in `JITTER`.
_PARTS = (_brightness, _contrast, _saturation, _hue)


def blur(views: Tensor, sigma: NDArray[np.float32]) -> Tensor:
    """Gaussian blur of float views (n, 3, H, W), reflected at the edges, window cut at `BLUR_SIGMAS` sigmas.

    Args:
        views: Any range.
        sigma: Of each view in pixels, (n,), above 0.
    """
    radius = math.ceil(BLUR_SIGMAS * float(sigma.max()))
    offsets = np.arange(radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma[:, None].astype(np.float64)) ** 2)
    weights[offsets > np.ceil(BLUR_SIGMAS * sigma)[:, None]] = 0
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(axis=1, keepdims=True)
    column = to_device(weights.astype(np.float32), views.device)
    return _blur_along(_blur_along(views, column, 2), column, 3)


def _blur_along(views: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Blur along one axis by adding shifted copies: for few taps much faster than a grouped convolution."""
    length, radius = views.shape[axis], weights.shape[1] - 1
    wide = _reflect(views, radius, axis)
    scale = weights.view(len(weights), -1, 1, 1, 1)
    blurred = wide.narrow(axis, radius, length) * scale[:, 0]
    for tap in range(1, radius + 1):
        pair = wide.narrow(axis, radius - tap, length) + wide.narrow(axis, radius + tap, length)
        blurred.addcmul_(pair, scale[:, tap])
    return blurred


def _reflect(views: Tensor, radius: int, axis: int) -> Tensor:
    """Reflection padding, repeated if the radius exceeds the size of a view."""
    while radius > 0:
        step = min(radius, views.shape[axis] - 1)
        views = pad(views, (0, 0, step, step) if axis == 2 else (step, step, 0, 0), mode="reflect")
        radius -= step
    return views


def _blur_drawn(views: Tensor, parameters: ViewParameters) -> Tensor:
    rows = np.flatnonzero(parameters.sigma)
    return _on_rows(views, rows, blur(_rows(views, rows), parameters.sigma[rows])) if rows.size else views


#: The function of each operation after the crop, on float views (n, 3, H, W); may modify them in place.
APPLY: dict[str, Callable[[Tensor, ViewParameters], Tensor]] = {
    "jitter": jitter,
    "grayscale": lambda views, parameters: _where(views, parameters.grayscale, grayscale),
    "blur": _blur_drawn,
    "solarize": lambda views, parameters: _where(views, parameters.solarize, solarize),
    "flip": lambda views, parameters: _where(views, parameters.flip, lambda flipped: flipped.flip(3)),
}
