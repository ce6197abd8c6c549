"""Torchvision pipeline: worker processes decode and make both views on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from synco_fast.data.augment.draw import ViewParameters, draw_views
from synco_fast.data.augment.ops import crop_and_resize, finish_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError
from synco_fast.data.loader import Loader
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.epochs import EpochBatches, EpochPipeline, Position, replace_corrupt
from synco_fast.data.pipelines.pixels import pixels_of, read_pixels
from synco_fast.data.sources.decode import central_part
from synco_fast.data.sources.splits import Split
from synco_fast.data.sources.stream import refuse_stream
from synco_fast.data.workers import machine_cores

__all__ = [
    "Decoded",
    "TorchvisionPipeline",
    "batch_of_views",
    "evaluation_loader",
    "evaluation_view",
    "make_view",
    "pixels_of",
]

#: Images decoded before the parameters of their views are drawn, and the bytes of pixels from which fewer suffice.
_TOGETHER, _BYTES_TOGETHER = 8, 64 << 20


def make_view(pixels: Tensor, parameters: ViewParameters, size: int) -> Tensor:
    """A view (3, size, size) uint8 of an image (3, H, W) uint8, by the parameters of one view."""
    return finish_views(crop_and_resize(pixels, parameters.crop[0], size), parameters)[0]


def evaluation_view(pixels: Tensor, recipe: Recipe) -> Tensor:
    """The central crop (3, size, size) uint8 of an image (3, H, W) uint8, its short side resized to `Recipe.resize`.

    If an image is more than 16 times as long as wide, only its middle is resized.
    """
    part = torch.from_numpy(central_part(pixels.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    small = v2.functional.resize(part, [recipe.resize], antialias=True)
    view: Tensor = v2.functional.center_crop(small, [recipe.size, recipe.size])
    return view


class Decoded(NamedTuple):
    """An image for two views of a batch.

    Attributes:
        wanted: Number of the image that was due; the draws depend on it.
        pixels: (3, H, W) uint8.
        image: Number of the image that was read; another one if that which was due is corrupt.
        corrupt: The corrupt images on the way, and why, by number.
        turn: How often the image that was due came in the epoch before.
    """

    wanted: int
    pixels: Tensor
    image: int
    corrupt: dict[int, str]
    turn: int = 0


def batch_of_views(images: Iterable[Decoded], recipe: Recipe, *, seed: int, epoch: int) -> Batch:
    """Both views of some images, (N, 3, size, size) uint8 each, in shared memory if a worker makes them.

    A view depends on seed, epoch, the number that was due, its turn and the pixels alone. Images are drawn for a few at
    a time, since this costs little more than for one.
    """
    first, second, numbers = list[Tensor](), list[Tensor](), list[int]()
    corrupt: dict[int, str] = {}
    size = recipe.size_at(epoch)
    for some in _groups(images):
        numbers += [one.image for one in some]
        corrupt |= {number: reason for one in some for number, reason in one.corrupt.items()}
        parameters = draw_views(
            recipe,
            seed=seed,
            epoch=epoch,
            images=np.repeat([one.wanted for one in some], 2),
            views=np.array([2 * one.turn + view for one in some for view in (0, 1)]),
            sizes=np.repeat([one.pixels.shape[1:] for one in some], 2, axis=0),
        )
        for row, one in enumerate(some):
            for views, view in ((first, 2 * row), (second, 2 * row + 1)):
                views.append(make_view(one.pixels, parameters[view : view + 1], size))
    return Batch(default_collate(first), default_collate(second), torch.tensor(numbers), corrupt)


def _groups(images: Iterable[Decoded]) -> Iterator[list[Decoded]]:
    some: list[Decoded] = []
    for one in images:
        some.append(one)
        if len(some) == _TOGETHER or sum(each.pixels.numel() for each in some) >= _BYTES_TOGETHER:
            yield some
            some = []
    if some:
        yield some


class _Views(Dataset[Batch]):
    """A batch of two views of images by (epoch, number); they depend on seed, epoch and number, not on the worker."""

    def __init__(self, split: Split, recipe: Recipe, seed: int) -> None:
        self.split, self.recipe, self.seed = split, recipe, seed

    def __getitem__(self, places: list[Position]) -> Batch:
        """The batch, in shared memory if a worker makes it."""
        return batch_of_views(map(self._read, places), self.recipe, seed=self.seed, epoch=places[0][0])

    def _read(self, place: Position) -> Decoded:
        _, wanted = place
        return Decoded(wanted, *replace_corrupt(len(self.split), wanted, partial(read_pixels, self.split)))


class TorchvisionPipeline(EpochPipeline):
    """Batches of two views from worker processes; see `Pipeline` for the contract.

    Args:
        split: The images.
        recipe: How views are made.
        batch: B, images in a batch, over all ranks.
        seed: Seed of order and views, together with the epoch.
        workers: Processes that decode; 0 decodes in the training process. By default one for each core
            of this rank.
        pin_memory: Whether batches lie in page-locked memory, for a GPU.
        rank, world: Rank of this process, and number of processes; each yields its part of every batch.

    Raises:
        DataError: The split holds fewer images than a step takes.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        workers: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._batches = EpochBatches(len(split), batch, seed, rank, world)
        views = _Views(split, recipe, seed)
        self._loader = Loader(views, self._batches, workers=workers, seed=seed, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def close(self) -> None:
        """End the workers; the pipeline yields nothing afterwards."""
        loader = self.__dict__.pop("_loader", None)
        if loader is not None:
            loader.close()


class _Whole(Dataset[tuple[Tensor, Tensor, dict[int, str]]]):
    """A batch of central crops by the numbers of its images."""

    def __init__(self, split: Split, recipe: Recipe) -> None:
        self.split, self.recipe = split, recipe

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, Tensor, dict[int, str]]:
        views, good = [], []
        corrupt: dict[int, str] = {}
        for number in numbers:
            try:
                views.append(evaluation_view(read_pixels(self.split, number), self.recipe))
                good.append(number)
            except CorruptImageError as error:
                corrupt[number] = str(error)
        empty = torch.empty(0, 3, self.recipe.size, self.recipe.size, dtype=torch.uint8)
        return torch.stack(views) if views else empty, torch.tensor(good, dtype=torch.int64), corrupt


def evaluation_loader(
    split: Split, recipe: Recipe, *, batch: int = 256, workers: int | None = None, numbers: list[int] | None = None
) -> Loader[tuple[Tensor, Tensor, dict[int, str]]]:
    """Central crops in order: uint8 images (b, 3, size, size), their numbers (b,) int64, and the corrupt ones.

    Args:
        split: The images.
        recipe: Gives the crop size and the resize before it.
        batch: Batch size.
        workers: Processes that decode, by default one for each core.
        numbers: Which images, by default all.

    Corrupt images are skipped, so b can be smaller than ``batch``.

    Raises:
        DataError: The split is a stream.
    """
    refuse_stream(split, "an evaluation")
    numbers = list(range(len(split))) if numbers is None else numbers
    batches = [numbers[first : first + batch] for first in range(0, len(numbers), batch)]
    workers = machine_cores() if workers is None else workers
    return Loader(_Whole(split, recipe), batches, workers=workers, keep=False)
