"""The loss of quality of a pack: its views compared with the source's, and crops smaller than a view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.data.augment.draw import draw_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError
from synco_fast.data.sources.pack_index import PackIndex
from synco_fast.data.sources.splits import Split

__all__ = ["PackQuality", "measure_quality"]

#: Images whose crops are drawn to count small ones.
_COUNTED = 20_000


@dataclass(frozen=True)
class PackQuality:
    """The measured quality of a pack.

    Attributes:
        views: How many views were compared.
        mean: Mean pixel difference between views of pack and source, in levels of 255.
        worst: The mean difference of the worst view.
        largest: The largest pixel difference.
        small: Fraction of crops in the pack that are smaller than a view and are enlarged.
        small_source: The same in the source.
    """

    views: int
    mean: float
    worst: float
    largest: float
    small: float
    small_source: float


def measure_quality(split: Split, packed: Split, index: PackIndex, recipe: Recipe, views: int = 128) -> PackQuality:
    """Compare the crops of a pack with the same crops of its source, before any other operation.

    Args:
        split: The source.
        packed: The pack as it is read.
        index: Index of the pack.
        recipe: The recipe of the crops, drawn for epoch 0 and seed 0.
        views: Images to compare, evenly spaced.
    """
    chosen = np.unique(np.linspace(0, len(index) - 1, min(views, len(index))).round().astype(np.int64))
    means, largest = [], 0.0
    for row, crop in zip(chosen.tolist(), _crops(index, recipe, chosen), strict=True):
        try:
            original, copy = split.read(int(index.numbers[row])), packed.read(row)
        except CorruptImageError:  # changed since it was packed
            continue
        scale = index.sizes[row] / index.source_sizes[row]
        one = _view(original, crop.astype(np.float64), recipe.size)
        other = _view(copy, crop * np.tile(scale, 2), recipe.size)
        difference = np.abs(one - other)
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    counted = np.unique(np.linspace(0, len(index) - 1, min(_COUNTED, len(index))).round().astype(np.int64))
    sides = _crops(index, recipe, counted)[:, 2:]
    scales = index.sizes[counted] / index.source_sizes[counted]
    return PackQuality(
        views=len(means),
        mean=float(np.mean(means)) if means else 0.0,
        worst=max(means, default=0.0),
        largest=largest,
        small=float(((sides * scales).min(axis=1) < recipe.size).mean()),
        small_source=float((sides.min(axis=1) < recipe.size).mean()),
    )


def _crops(index: PackIndex, recipe: Recipe, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Crops in the source's pixels, (n, 4)."""
    numbers, views = index.numbers[rows], np.zeros(len(rows), dtype=np.int64)
    return draw_views(recipe, seed=0, epoch=0, images=numbers, views=views, sizes=index.source_sizes[rows]).crop


def _view(image: Image.Image, crop: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The crop resized by Pillow, whose box may start between two pixels."""
    top, left, height, width = crop.tolist()
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box), dtype=np.float64)
