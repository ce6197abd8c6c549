"""Differentiable augmentation on the device, for the discriminator's images and for generated views.

Random numbers are drawn first, apart from the images, so that several batches can share them. That is how both images
of a generated pair get the same augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from synco_fast.data.augment.draw import operations_of
from synco_fast.data.augment.recipe import Recipe

__all__ = ["DiscriminatorDraws", "ViewDraws", "augment_for_discriminator", "draw_discriminator", "draw_views", "view"]

#: ITU-R 601, as in Pillow's grayscale.
_LUMA = (0.299, 0.587, 0.114)
#: The YIQ colour space, where a hue shift is a rotation of the last two axes.
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class _Colours(NamedTuple):
    """Weights of the grayscale, (1, 3, 1, 1), and matrices between RGB and YIQ, (3, 3)."""

    luma: Tensor
    to_yiq: Tensor
    from_yiq: Tensor


@cache
def _colours(device: torch.device) -> _Colours:
    """Cached per device: a copy to a GPU and an inverse there would make every step wait."""
    luma, to_yiq = torch.tensor(_LUMA).view(1, 3, 1, 1), torch.tensor(_YIQ)
    return _Colours(*(part.to(device) for part in (luma, to_yiq, torch.linalg.inv(to_yiq))))


class DiscriminatorDraws(NamedTuple):
    """Per image: offsets of brightness, factors of saturation and contrast, shift and cutout place in pixels; (B,)."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shift_y: Tensor
    shift_x: Tensor
    cut_y: Tensor
    cut_x: Tensor


def draw_discriminator(count: int, size: int, device: torch.device) -> DiscriminatorDraws:
    """Draws of DiffAugment's policy "color, translation, cutout" (arXiv 2006.10738) from the global generator.

    Args:
        count: Images.
        size: Their side in pixels; images move by up to an eighth of it, and a square of half of it is cut out.
        device: Where the draws are made.
    """

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), device=device)

    reach, brightness, saturation, contrast = round(size / 8), *torch.rand(3, count, device=device)
    return DiscriminatorDraws(
        brightness - 0.5,
        2 * saturation,
        contrast + 0.5,
        whole(-reach, reach),
        whole(-reach, reach),
        whole(0, size),
        whole(0, size),
    )


def augment_for_discriminator(images: Tensor, draws: DiscriminatorDraws) -> Tensor:
    """Apply draws to images (B, 3, H, H) in [0, 1]; the result may leave that range, as in DiffAugment."""
    size, device = images.shape[-1], images.device
    images = images + _each(draws.brightness)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * _each(draws.saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * _each(draws.contrast)
    reach = round(size / 8)
    padded = pad(images, (reach, reach, reach, reach))
    pixels = torch.arange(size, device=device)
    rows = (pixels + reach + draws.shift_y[:, None])[:, None, :, None]
    columns = (pixels + reach + draws.shift_x[:, None])[:, None, None, :]
    number = torch.arange(len(images), device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[None, :, None, None]
    moved = padded[number, channel, rows, columns]
    half = size // 4
    cut_rows = (pixels - draws.cut_y[:, None]).abs() < half
    cut_columns = (pixels - draws.cut_x[:, None]).abs() < half
    return moved * ~(cut_rows[:, None, :, None] & cut_columns[:, None, None, :])


class ViewDraws(NamedTuple):
    """The parameters of B views.

    Attributes:
        crop: Affine map from the view's coordinates to the image's, with the flip in it, (B, 2, 3).
        brightness, contrast, saturation: Factors, (B,); 1 where the jitter is off.
        hue: Turn of the colour circle in radians, (B,).
        grayscale: 1 for a grayscale view, else 0, (B,).
        sigma: Of the blur in pixels, (B,); near 0 where it is off.
        solarize: 1 where bright pixels are inverted, else 0, (B,).
    """

    crop: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor


def draw_views(count: int, recipe: Recipe, device: torch.device) -> ViewDraws:
    """Draws of the contrastive recipe from the global generator, all on the device.

    A crop that does not fit is shrunk to the image's side; torchvision draws again.

    Args:
        count: B.
        recipe: The recipe of the real images' views.
        device: Where the draws are made.
    """
    uniform = torch.rand(14, count, device=device)

    def between(row: int, low: float, high: float) -> Tensor:
        return low + (high - low) * uniform[row]

    area = between(0, *recipe.area)
    ratio = torch.exp(between(1, math.log(recipe.ratio[0]), math.log(recipe.ratio[1])))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform[2] * (1 - width), uniform[3] * (1 - height)
    turned = torch.where(uniform[4] < recipe.flip_probability, -1.0, 1.0)
    zero = torch.zeros_like(width)
    crop = torch.stack([width * turned, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], dim=1)
    jittered = (uniform[5] < recipe.jitter_probability).float()

    def factor(row: int, reach: float) -> Tensor:
        return 1 + jittered * (between(row, max(0.0, 1 - reach), 1 + reach) - 1)

    blurred = uniform[11] < recipe.blur_probability
    return ViewDraws(
        crop.view(count, 2, 3),
        factor(6, recipe.brightness),
        factor(7, recipe.contrast),
        factor(8, recipe.saturation),
        jittered * between(9, -recipe.hue, recipe.hue) * (2 * math.pi),
        (uniform[10] < recipe.grayscale_probability).float(),
        torch.where(blurred, between(12, *recipe.blur_sigma), 0.0),
        (uniform[13] < recipe.solarize_probability).float(),
    )


def view(images: Tensor, draws: ViewDraws, recipe: Recipe) -> Tensor:
    """Views (B, 3, size, size) of images (B, 3, H, H), both in [0, 1]; differentiable with respect to the images.

    The recipe's operations in its order, with bilinear sampling, the parts of the colour jitter in one fixed order,
    and hue as a rotation in YIQ, where torchvision goes through HSV.
    """
    out = images.float()
    for operation in operations_of(recipe, "differentiable"):
        out = APPLY[operation.name](out, draws, recipe)
    return out


def _crop_and_flip(images: Tensor, draws: ViewDraws, recipe: Recipe) -> Tensor:
    grid = affine_grid(draws.crop, [len(images), 3, recipe.size, recipe.size], align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter(out: Tensor, draws: ViewDraws, recipe: Recipe) -> Tensor:
    luma = _colours(out.device).luma
    out = (out * _each(draws.brightness)).clamp(0, 1)
    mean = (out * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    out = (mean + (out - mean) * _each(draws.contrast)).clamp(0, 1)
    gray = (out * luma).sum(dim=1, keepdim=True)
    out = (gray + (out - gray) * _each(draws.saturation)).clamp(0, 1)
    return torch.einsum("bij,bjhw->bihw", _hue_turn(draws.hue), out).clamp(0, 1) if recipe.hue else out


def _grayscale(out: Tensor, draws: ViewDraws, recipe: Recipe) -> Tensor:
    gray = (out * _colours(out.device).luma).sum(dim=1, keepdim=True)
    return out + _each(draws.grayscale) * (gray - out)


def _solarize(out: Tensor, draws: ViewDraws, recipe: Recipe) -> Tensor:
    return out + _each(draws.solarize) * (torch.minimum(out, 1 - out) - out)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _hue_turn(angle: Tensor) -> Tensor:
    """Matrices on RGB, (B, 3, 3)."""
    colours = _colours(angle.device)
    cosine, sine, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=1).view(-1, 3, 3)
    matrices: Tensor = colours.from_yiq @ turn @ colours.to_yiq
    return matrices


def _blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """A Gaussian blur with a sigma per image, one axis after the other."""
    count, channels = images.shape[:2]
    reach = max(1, min(math.ceil(3 * largest), images.shape[-1] - 1))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = images.reshape(1, count * channels, *images.shape[2:])
    flat = conv2d(pad(flat, (reach, reach, 0, 0), "reflect"), kernel[:, None, None, :], groups=count * channels)
    flat = conv2d(pad(flat, (0, 0, reach, reach), "reflect"), kernel[:, None, :, None], groups=count * channels)
    return flat.view_as(images)


#: The function of each operation; the flip is part of the crop's affine map.
APPLY: dict[str, Callable[[Tensor, ViewDraws, Recipe], Tensor]] = {
    "crop": _crop_and_flip,
    "jitter": _jitter,
    "grayscale": _grayscale,
    "blur": lambda out, draws, recipe: _blur(out, draws.sigma, recipe.blur_sigma[1]),
    "solarize": _solarize,
    "flip": lambda out, draws, recipe: out,
}
