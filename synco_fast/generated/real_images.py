"""The discriminator's real images: a whole set of small images in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.resident import room_on
from synco_fast.data.pipelines.torchvision import evaluation_loader
from synco_fast.data.sources.open import Split
from synco_fast.data.transfer import to_device
from synco_fast.runtime.errors import DataError

__all__ = ["ResidentImages"]


class ResidentImages:
    """The central crops of a split, 3 * size * size bytes each.

    Args:
        split: The images; labels are ignored.
        size: Side in pixels.
        workers: Decoding processes, by default one per core.
        device: Where batches are returned. The set is kept there too, so that no step waits for the host, or in host
            memory if it would take more than half of the device's free memory.

    Attributes:
        corrupt: Reason by number, for images that could not be read; another image replaces them.

    Raises:
        DataError: No image can be read.
    """

    def __init__(self, split: Split, size: int, *, workers: int | None, device: torch.device) -> None:
        self._device = device
        self._images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
        self._rows = torch.zeros(len(split), dtype=torch.int64)
        self.corrupt: dict[int, str] = {}
        recipe = Recipe(size=size, evaluation_resize=size)
        filled = 0
        for images, numbers, corrupt in evaluation_loader(split, recipe, workers=workers):
            self._images[filled : filled + len(images)] = images
            self._rows[numbers] = torch.arange(filled, filled + len(images))
            filled += len(images)
            self.corrupt |= corrupt
        if not filled:
            raise DataError(f"data: found no readable image besides {split.name(0)}")
        if self._images.nbytes <= room_on(device):
            self._images, self._rows = self._images.to(device), self._rows.to(device)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Tensor) -> Tensor:
        """Images by number, (n,) int64, as uint8 (n, 3, size, size) on the device."""
        rows = self._rows[to_device(numbers, self._rows.device)]
        return self._images[rows].to(self._device, non_blocking=True)
