"""Resident pipeline: a small dataset is kept on the device as uint8 and augmented there in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from synco_fast.data.augment.draw import ViewParameters, draw_views
from synco_fast.data.augment.ops import finish_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.loader import Loader
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.epochs import EpochBatches, EpochPipeline, Position, replace_corrupt
from synco_fast.data.pipelines.fused import MakeViews, make_pair, packed
from synco_fast.data.sources.splits import ArraySplit, Split
from synco_fast.data.transfer import to_device

__all__ = ["ResidentPipeline", "crop_and_resize_batch", "load_pixels", "room_on"]

#: Fraction of the device's free memory that a dataset may take.
_SHARE_OF_MEMORY = 0.5
#: Images of a file set that are decoded into one tensor, and those of an array that are copied at a time.
_TOGETHER, _COPIED = 64, 2048
#: Batches whose parameters a thread draws ahead, where a GPU would wait for them.
_AHEAD = 2
#: A batch: its epoch, the images that are due, and the parameters of all first views before those of the second ones.
_Drawn = tuple[int, NDArray[np.int64], ViewParameters]


class ResidentPipeline(EpochPipeline):
    """Batches of two views, made on the device from a dataset kept there; see `Pipeline` for the contract.

    Args:
        split: Images of one size.
        recipe: How views are made.
        batch: B, images in a batch, over all ranks.
        seed: Seed of order and views, together with the epoch.
        device: Device of dataset and views.
        dtype: Of the views that fused kernels make; PyTorch's operations make uint8.
        workers: Processes that decode the files once, at the start; by default one for each core.
        ahead: Batches whose parameters a thread draws ahead; by default two on a GPU and none on a CPU, where the
            training itself has all cores.
        rank, world: Rank of this process, and number of processes; each holds the whole dataset and yields its part of
            every batch.

    Raises:
        DataError: The images differ in size, are too many for the device, or are fewer than a step takes.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.uint8,
        workers: int | None = None,
        ahead: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._dtype = dtype
        self._make: MakeViews | None = None
        self._batches = EpochBatches(len(split), batch, seed, rank, world)
        self._recipe, self._seed, self._device = recipe, seed, device or torch.device("cpu")
        self._ahead = ahead if ahead is not None else _AHEAD if self._device.type == "cuda" else 0
        self._pixels, self._replacements, self._corrupt = load_pixels(split, self._device, workers)

    def __iter__(self) -> Iterator[Batch]:
        for epoch, wanted, parameters in self._drawn():
            # A corrupt image counts where it is due, not where it is tried as a replacement.
            corrupt = {number: self._corrupt[number] for number in wanted.tolist() if number in self._corrupt}
            rows = to_device(self._replacements[wanted], self._device)
            first, second = self._views(rows, epoch, parameters)
            yield Batch(first, second, rows, corrupt)

    def _drawn(self) -> Iterator[_Drawn]:
        """The batches of the epoch, drawn ahead by a thread."""
        if not self._ahead:
            yield from map(self._draw, self._batches)
            return
        waiting: deque[Future[_Drawn]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="draws") as pool:
            for places in self._batches:
                waiting.append(pool.submit(self._draw, places))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()

    def _draw(self, places: list[Position]) -> _Drawn:
        epoch, wanted = places[0][0], np.array([number for _, number in places], dtype=np.int64)
        count, (height, width) = len(wanted), self._pixels.shape[2:]
        parameters = draw_views(
            self._recipe,
            seed=self._seed,
            epoch=epoch,
            images=np.tile(wanted, 2),
            views=np.repeat(np.arange(2), count),
            sizes=np.tile(np.array([height, width]), (2 * count, 1)),
        )
        return epoch, wanted, parameters

    def close(self) -> None:
        """Free the memory; the pipeline yields nothing afterwards."""
        for name in ("_pixels", "_flat"):
            self.__dict__.pop(name, None)

    @property
    def kernel_input(self) -> dict[str, Any]:
        """See `FusedViews`."""
        channels, height, width = self._pixels.shape[1:]
        return {
            "sides": self._recipe.sides,
            "views": 2 * self._batches.share,
            "dtype": self._dtype,
            "image": (height, width),
            "channels": channels,
            "planar": self._pixels.is_contiguous(),
            "sigma": self._recipe.blur_sigma[1],
        }

    def use_kernels(self, make: MakeViews) -> None:
        """See `FusedViews`."""
        count, channels, height, width = self._pixels.shape
        pixels = self._pixels if self._pixels.is_contiguous() else self._pixels.permute(0, 2, 3, 1)
        self._make = make
        given = self.kernel_input
        self._given = {name: given[name] for name in ("channels", "planar", "dtype")}
        self._flat = pixels.reshape(-1)  # a view: the images lie one after the other
        self._offsets = torch.arange(count, device=self._device) * (channels * height * width)
        self._sizes = (
            torch.tensor([height, width], dtype=torch.int32, device=self._device).expand(count, 2).contiguous()
        )

    def _views(self, rows: Tensor, epoch: int, parameters: ViewParameters) -> tuple[Tensor, Tensor]:
        """First and second views, (B, 3, size, size) each: uint8, or as the kernels make them."""
        size = self._recipe.size_at(epoch)
        if self._make is not None:
            words = to_device(packed(parameters), self._device)
            buffer = self._flat, self._offsets, self._sizes
            return make_pair(self._make, self._recipe, *buffer, rows, words, size=size, **self._given)
        pixels = self._pixels[rows].to(torch.float32)
        crops = crop_and_resize_batch(pixels.repeat(2, 1, 1, 1), parameters.crop, size)
        first, second = finish_views(crops.expand(-1, 3, -1, -1).contiguous(), parameters).chunk(2)
        return first, second


def crop_and_resize_batch(images: Tensor, crops: NDArray[np.int64], size: int) -> Tensor:
    """A window of each image, resized: bilinear and antialiased as in `torch.nn.functional.interpolate`.

    A resize is linear along each axis, so it is one matrix product per axis, which includes the crop.

    Args:
        images: (n, C, H, W) float.
        crops: Top, left, height and width in pixels, (n, 4).
        size: Size of the result.

    Returns:
        (n, C, size, size), rounded to whole numbers.
    """
    windows = to_device(crops, images.device).to(torch.float32)
    rows = _resize_matrix(windows[:, 0], windows[:, 2], images.shape[2], size)
    columns = _resize_matrix(windows[:, 1], windows[:, 3], images.shape[3], size)
    return torch.matmul(torch.matmul(rows[:, None], images), columns[:, None].mT).round_()


def _resize_matrix(start: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Weights (n, size, length) of an axis's pixels in the pixels of its resized window."""
    scale = (extent / size)[:, None, None]
    inside = torch.arange(length, device=start.device) - start[:, None, None]
    middle = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    weights = (1 - ((inside + 0.5 - middle) / scale.clamp_min(1)).abs()).clamp_min(0)
    weights = weights * ((inside >= 0) & (inside < extent[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def load_pixels(
    split: Split, device: torch.device, workers: int | None
) -> tuple[Tensor, NDArray[np.int64], dict[int, str]]:
    """A split's pixels on the device.

    Returns:
        Pixels (n, C, H, W) uint8 with C of 1 or 3; the image that each row holds, (n,) int64: itself unless it is
        corrupt; and the reason by number, for corrupt images.

    Raises:
        DataError: As in `ResidentPipeline`.
    """
    if isinstance(split, ArraySplit):
        _check_room(split.images.nbytes, device)
        pixels = torch.empty(split.images.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(split), _COPIED):  # they may lie in files larger than the host's memory
            pixels[first : first + _COPIED] = torch.tensor(np.asarray(split.images[first : first + _COPIED]))
        return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2), np.arange(len(split)), {}
    height, width = sizes = np.asarray(replace_corrupt(len(split), 0, split.read)[0]).shape[:2]
    _check_room(len(split) * 3 * height * width, device)
    pixels = torch.empty((len(split), 3, height, width), dtype=torch.uint8, device=device)
    replacements = np.arange(len(split))
    corrupt: dict[int, str] = {}
    parts = [range(first, min(first + _TOGETHER, len(split))) for first in range(0, len(split), _TOGETHER)]
    for part, (images, numbers, reasons) in zip(
        parts, Loader(_Pixels(split, sizes), parts, workers=workers, keep=False), strict=True
    ):
        pixels[part.start : part.stop], replacements[part.start : part.stop] = images, numbers
        corrupt |= reasons
    return pixels, replacements, corrupt


class _Pixels(Dataset[tuple[Tensor, list[int], dict[int, str]]]):
    """Images of a split in one tensor, which takes one file descriptor on its way from a worker.

    Args:
        split: The images.
        size: Height and width of all.
    """

    def __init__(self, split: Split, size: tuple[int, int]) -> None:
        self.split, self.size = split, size

    def __getitem__(self, part: range) -> tuple[Tensor, list[int], dict[int, str]]:
        images = np.empty((len(part), *self.size, 3), dtype=np.uint8)
        numbers = []
        corrupt: dict[int, str] = {}
        for row, wanted in enumerate(part):
            image, index, reasons = replace_corrupt(len(self.split), wanted, self.split.read)
            if image.size != self.size[::-1]:
                raise DataError(
                    f"data.pipeline: found {self.split.name(index)} of {image.height} x {image.width} pixels among "
                    f"images of {self.size[0]} x {self.size[1]}, expected one size for resident; use another pipeline"
                )
            images[row] = np.asarray(image)
            numbers.append(index)
            corrupt |= reasons
        return torch.from_numpy(images).permute(0, 3, 1, 2), numbers, corrupt


def room_on(device: torch.device) -> float:
    """Bytes that a dataset may take on a device; no limit on the CPU."""
    return _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _check_room(size: int, device: torch.device) -> None:
    room = room_on(device)
    if size > room:
        raise DataError(
            f"data.pipeline: found a set of {size / 2**30:.1f} GiB, expected up to {room / 2**30:.1f} GiB for "
            "resident on this device; use another pipeline"
        )
