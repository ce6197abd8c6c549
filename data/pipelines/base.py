"""The pipeline protocol between data loading and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.names import Decode, PipelineName
from synco_fast.data.seeding import derive_seed

__all__ = ["Batch", "Decode", "Pipeline", "PipelineName", "epoch_order", "normalise"]


@dataclass
class Batch:
    """Two views of each image.

    Attributes:
        first, second: (B, 3, size, size): uint8 pixels, or normalised values in a floating type. `normalise` converts
            both for the encoder.
        image_ids: The image of each pair, (B,) int64.
        corrupt: Reason by number, for images that could not be decoded; another image replaces them.
    """

    first: Tensor
    second: Tensor
    image_ids: Tensor
    corrupt: dict[int, str] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; the copy is asynchronous if memory is pinned."""
        first, second, image_ids = (
            tensor.to(device, non_blocking=True) for tensor in (self.first, self.second, self.image_ids)
        )
        return Batch(first, second, image_ids, self.corrupt)

    def as_pixels(self, recipe: Recipe) -> Batch:
        """The same batch as uint8 on the CPU, for plots."""
        first, second = (_pixels(view, recipe).cpu() for view in (self.first, self.second))
        return Batch(first, second, self.image_ids.cpu(), self.corrupt)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return Batch(self.first.pin_memory(), self.second.pin_memory(), self.image_ids.pin_memory(), self.corrupt)


class Pipeline(Protocol):
    """Batches of two views; all epochs have the same length, and an incomplete last batch is dropped.

    What an epoch yields depends only on seed and epoch number. So the state of a pipeline is the epoch and the number
    of the next batch, which follow from the training step. A run that starts in the middle of an epoch
    (``set_epoch(epoch, start)``) gets the same batches.
    """

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        ...

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and its first batch."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """End worker processes and free memory; again is no error."""
        ...


def epoch_order(length: int, *, seed: int, epoch: int) -> Tensor:
    """The order of images in an epoch: a permutation that depends on seed and epoch, (length,) int64."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def normalise(
    views: Tensor,
    recipe: Recipe,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pixels 0 to 255, (B, 3, H, W) uint8, normalised by the recipe's mean and standard deviation.

    The arithmetic is float32; on a GPU one launch writes the result in ``dtype``. Views in a floating type are already
    normalised; only their memory layout is set.
    """
    if views.is_floating_point():
        return views.contiguous(memory_format=memory_format)
    if views.device.type == "cpu":
        # Mixed dtypes in one operation cost more here than a pass for each; and runs of before resume to the bit.
        mean, scale = _mean_and_scale(recipe)
        return views.to(torch.float32, memory_format=memory_format).sub_(mean).mul_(scale).to(dtype)
    scale, shift = _scale_and_shift(recipe, views.device)
    out = torch.empty(views.shape, dtype=dtype, device=views.device, memory_format=memory_format)
    return torch.addcmul(shift, views, scale, out=out)


def _pixels(views: Tensor, recipe: Recipe) -> Tensor:
    if not views.is_floating_point():
        return views
    scale, shift = _scale_and_shift(recipe, views.device)
    return views.float().sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _mean_and_scale(recipe: Recipe) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(recipe.mean).view(3, 1, 1) * 255
    return mean, 1 / (torch.tensor(recipe.std).view(3, 1, 1) * 255)


@lru_cache(maxsize=8)
def _scale_and_shift(recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cached per device: a copy in each step would make the host wait."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) * 255 for values in (recipe.mean, recipe.std))
    return (1 / std).float().to(device), (-mean / std).float().to(device)
