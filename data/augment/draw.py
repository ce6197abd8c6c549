"""Augmentation parameters: a pure function of seed, epoch, image and view, and the list of operations.

Pipelines only apply what is drawn here, so all of them make the same views for any number of workers and ranks and any
batch. A run that resumes in the middle of an epoch needs no state but its position.

`OPERATIONS` lists the augmentation. Every executor has a table with one entry per operation; a test fails if an
executor lacks one (tests/data/test_operations.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.seeding import uniforms

__all__ = ["EXECUTORS", "JITTER", "OPERATIONS", "Operation", "ViewParameters", "draw_views", "operations_of"]

#: The parts of the colour jitter: numbers in `ViewParameters.order` and columns of `ViewParameters.factors`.
JITTER = ("brightness", "contrast", "saturation", "hue")
#: The identity factors.
_IDENTITY = np.array([1, 1, 1, 0], dtype=np.float32)
_ORDERS = np.array(list(permutations(range(len(JITTER)))), dtype=np.int64)
#: Every order of three parts is contained in the first half and in the second, and every order of four in the whole.
_SCHEDULE = (0, 2, 0, 1, 0, 2, 0, 3, 0, 2, 0, 1, 0, 2, 0)
#: Draws of a crop before the central one is used, as in torchvision.
_ATTEMPTS = 10

#: The executors of the operations: `data.augment.ops` for the torchvision, the resident and the DALI pipeline, and the
#: differentiable operations of generated pairs.
EXECUTORS = ("torchvision", "resident", "dali", "differentiable")


@dataclass(frozen=True)
class ViewParameters:
    """The parameters of n views.

    Attributes:
        crop: Top, left, height and width in pixels of the upright image, (n, 4) int64.
        order: The parts of the jitter in the order in which they are applied, (n, 4) int64, numbers of `JITTER`.
        factors: (n, 4) float32: the factors of brightness, contrast and saturation, and the hue shift in turns; the
            identity where a view has no jitter.
        grayscale: (n,) bool.
        sigma: Sigma of the blur in pixels, (n,) float32; 0 for no blur.
        solarize: (n,) bool.
        flip: (n,) bool.
    """

    crop: NDArray[np.int64]
    order: NDArray[np.int64]
    factors: NDArray[np.float32]
    grayscale: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]
    flip: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.crop)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> ViewParameters:
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[ViewParameters]) -> ViewParameters:
        """The views of several, one after the other."""
        return cls(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )

    def steps(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The jitter as a sequence of (part, rows) that applies the parts to every row in its own order.

        The hue, which costs the most, comes once for all rows; the other parts come in `_SCHEDULE` around it.
        """
        changes = self.factors != _IDENTITY
        if len(self) == 1:
            yield from ((part, np.zeros(1, dtype=np.int64)) for part in self.order[0].tolist() if changes[0, part])
            return
        order = np.concatenate([self.order, np.full((len(self), 1), len(JITTER))], axis=1)
        place, rows = np.zeros(len(self), dtype=np.int64), np.arange(len(self))
        for part in _SCHEDULE:
            chosen = np.flatnonzero(order[rows, place] == part)
            place[chosen] += 1
            changed = chosen[changes[chosen, part]]
            if changed.size:
                yield part, changed


#: Takes a recipe, columns of uniform numbers (n, k) and image sizes (n, 2); returns fields of `ViewParameters`.
Draw = Callable[[Recipe, NDArray[np.float64], NDArray[np.int64]], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Operation:
    """One operation of the augmentation.

    Attributes:
        name: Its key in the executors' tables.
        recipe: The fields of `Recipe` that describe it.
        uniforms: Its columns in a view's row of uniform numbers. A new operation takes columns behind all others, so
            that the views of existing recipes do not change.
        draw: Computes its fields of `ViewParameters` from them.
        parameters: Those fields.
        probability: The field of `Recipe` with its probability; None for an operation of every view.
        executors: The `EXECUTORS` that apply it.
    """

    name: str
    recipe: tuple[str, ...]
    uniforms: slice
    draw: Draw
    parameters: tuple[str, ...]
    probability: str | None = None
    executors: tuple[str, ...] = EXECUTORS


def _draw_crop(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Crops as in torchvision's RandomResizedCrop: the first of ten draws that fits, else the central crop."""
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
        # Of a few pixels at least one: torchvision's own draw fails on ratios that leave none.
        h = np.where(unfit, np.where(narrow, np.rint(width / recipe.ratio[0]).clip(1), height), h).astype(np.int64)
        w = np.where(unfit, np.where(wide, np.rint(height * recipe.ratio[1]).clip(1), width), w).astype(np.int64)
        top, left = np.where(unfit, (height - h) // 2, top), np.where(unfit, (width - w) // 2, left)
    return {"crop": np.stack([top, left, h, w], axis=1)}


def _draw_jitter(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    amounts = np.array([getattr(recipe, name) for name in JITTER])
    low, high = np.maximum(_IDENTITY - amounts, [0, 0, 0, -0.5]), _IDENTITY + amounts
    drawn = low + (high - low) * u[:, 1:5]
    return {
        "order": _ORDERS[(u[:, 5] * len(_ORDERS)).astype(np.int64)],
        "factors": np.where(u[:, :1] < recipe.jitter_probability, drawn, _IDENTITY).astype(np.float32),
    }


def _draw_grayscale(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {"grayscale": u[:, 0] < recipe.grayscale_probability}


def _draw_blur(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    sigmas = recipe.blur_sigma[0] + (recipe.blur_sigma[1] - recipe.blur_sigma[0]) * u[:, 1]
    return {"sigma": np.where(u[:, 0] < recipe.blur_probability, sigmas, 0).astype(np.float32)}


def _draw_solarize(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {"solarize": u[:, 0] < recipe.solarize_probability}


def _draw_flip(recipe: Recipe, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {"flip": u[:, 0] < recipe.flip_probability}


_CROP = 2 * _ATTEMPTS + 2
_SIZE = ("size", "min_size", "start_ramp", "end_ramp", "size_step")
#: The operations in the order in which they are applied.
OPERATIONS = (
    Operation("crop", (*_SIZE, "area", "ratio"), slice(0, _CROP), _draw_crop, ("crop",)),
    Operation(
        "jitter",
        ("jitter_probability", *JITTER),
        slice(_CROP, _CROP + 6),
        _draw_jitter,
        ("order", "factors"),
        "jitter_probability",
    ),
    Operation(
        "grayscale",
        ("grayscale_probability",),
        slice(_CROP + 6, _CROP + 7),
        _draw_grayscale,
        ("grayscale",),
        "grayscale_probability",
    ),
    Operation(
        "blur",
        ("blur_probability", "blur_sigma"),
        slice(_CROP + 7, _CROP + 9),
        _draw_blur,
        ("sigma",),
        "blur_probability",
    ),
    Operation(
        "solarize",
        ("solarize_probability",),
        slice(_CROP + 10, _CROP + 11),
        _draw_solarize,
        ("solarize",),
        "solarize_probability",
    ),
    Operation("flip", ("flip_probability",), slice(_CROP + 9, _CROP + 10), _draw_flip, ("flip",), "flip_probability"),
)


def operations_of(recipe: Recipe, executor: str) -> list[Operation]:
    """The operations of an executor for a recipe, without those of probability 0."""
    return [
        operation
        for operation in OPERATIONS
        if executor in operation.executors
        and (operation.probability is None or getattr(recipe, operation.probability) > 0)
    ]


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
        recipe: The recipe.
        seed, epoch: Whole numbers from 0.
        images: Image number of each view, (n,).
        views: View of the image, (n,): 0 or 1, and 2 and 3 where the image comes again in the epoch, and so on.
        sizes: Height and width of each image in pixels, (n, 2).
    """
    count = max(operation.uniforms.stop for operation in OPERATIONS)
    u = uniforms(seed, epoch, images, views, count=count)
    drawn: dict[str, NDArray[Any]] = {}
    for operation in OPERATIONS:
        drawn |= operation.draw(recipe, u[:, operation.uniforms], sizes)
    return ViewParameters(**drawn)
