"""One draw for every pipeline: the random parameters of a view as a pure function of seed, epoch, image and view.

A pipeline only carries out what is drawn here, so all of them make the same views, whatever their workers, batches and
ranks are, and a run that goes on in the middle of an epoch needs no state but the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.seeding import uniforms

__all__ = ["JITTER", "ViewParameters", "draw_views"]

#: The parts of the colour jitter; a number in `ViewParameters.order` and a column of `ViewParameters.factors`.
JITTER = ("brightness", "contrast", "saturation", "hue")
#: The factor that changes nothing.
_IDENTITY = np.array([1, 1, 1, 0], dtype=np.float32)
_ORDERS = np.array(list(permutations(range(len(JITTER)))), dtype=np.int64)
#: How often a crop is drawn before the central one is taken, as in torchvision.
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 12


@dataclass(frozen=True)
class ViewParameters:
    """The parameters of n views.

    Attributes:
        crop: Top, left, height and width in pixels of the upright image, (n, 4) int64.
        order: The parts of the jitter in the order in which they are applied, (n, 4) int64, numbers of `JITTER`.
        factors: (n, 4) float32: the factors of brightness, contrast and saturation, and the hue shift in turns; the
            identity where a view has no jitter.
        grey: (n,) bool.
        sigma: Of the blur in pixels, (n,) float32; 0 where there is none.
        flip: (n,) bool.
    """

    crop: NDArray[np.int64]
    order: NDArray[np.int64]
    factors: NDArray[np.float32]
    grey: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    flip: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.crop)

    def __getitem__(self, rows: slice) -> ViewParameters:
        return ViewParameters(
            self.crop[rows], self.order[rows], self.factors[rows], self.grey[rows], self.sigma[rows], self.flip[rows]
        )

    def steps(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The jitter as a sequence of (part, rows), in which every row meets its parts in its own order."""
        changes = self.factors != _IDENTITY
        for place in range(len(JITTER)):
            parts = self.order[:, place]
            for part in range(len(JITTER)):
                rows = np.flatnonzero((parts == part) & changes[:, part])
                if rows.size:
                    yield part, rows


def draw_views(
    recipe: Recipe,
    *,
    seed: int,
    epoch: int,
    images: NDArray[np.int64],
    views: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> ViewParameters:
    """Draw the parameters of n views.

    Args:
        recipe: What they are drawn from.
        seed, epoch: Whole numbers from 0.
        images: Number of each view's image, (n,).
        views: Which view of it, 0 or 1, (n,).
        sizes: Height and width of each image in pixels, (n, 2).
    """
    u = uniforms(seed, epoch, images, views, count=_DRAWS)
    jittered, *factors, order, grey, blurred, sigma, flip = u[:, 2 * _ATTEMPTS + 2 :].T
    amounts = np.array([getattr(recipe, name) for name in JITTER])
    low, high = np.maximum(_IDENTITY - amounts, [0, 0, 0, -0.5]), _IDENTITY + amounts
    drawn = low + (high - low) * np.stack(factors, axis=1)
    sigmas = recipe.blur_sigma[0] + (recipe.blur_sigma[1] - recipe.blur_sigma[0]) * sigma
    return ViewParameters(
        crop=_crops(recipe, u[:, : 2 * _ATTEMPTS + 2], sizes),
        order=_ORDERS[(order * len(_ORDERS)).astype(np.int64)],
        factors=np.where((jittered < recipe.jitter_probability)[:, None], drawn, _IDENTITY).astype(np.float32),
        grey=grey < recipe.greyscale_probability,
        sigma=np.where(blurred < recipe.blur_probability, sigmas, 0).astype(np.float32),
        flip=flip < recipe.flip_probability,
    )


def _crops(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Windows as torchvision's RandomResizedCrop draws them: the first of ten that fits, else the central one."""
    height, width = sizes[:, 0], sizes[:, 1]
    area = (recipe.area[0] + (recipe.area[1] - recipe.area[0]) * u[:, :_ATTEMPTS]) * (height * width)[:, None]
    low, high = np.log(recipe.ratio)
    ratio = np.exp(low + (high - low) * u[:, _ATTEMPTS : 2 * _ATTEMPTS])
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    w, h = widths[rows, first], heights[rows, first]
    top = (u[:, -2] * (height - h + 1)).astype(np.int64)
    left = (u[:, -1] * (width - w + 1)).astype(np.int64)
    unfit = ~fits.any(axis=1)
    if unfit.any():
        narrow, wide = width < recipe.ratio[0] * height, width > recipe.ratio[1] * height
        h = np.where(unfit, np.where(narrow, np.rint(width / recipe.ratio[0]), height), h).astype(np.int64)
        w = np.where(unfit, np.where(wide, np.rint(height * recipe.ratio[1]), width), w).astype(np.int64)
        top, left = np.where(unfit, (height - h) // 2, top), np.where(unfit, (width - w) // 2, left)
    return np.stack([top, left, h, w], axis=1)
