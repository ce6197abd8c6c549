"""DALI input: worker processes read encoded images and their headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from synco_fast.data.augment.draw import ViewParameters
from synco_fast.data.errors import CorruptImageError
from synco_fast.data.loader import Loader
from synco_fast.data.pipelines.epochs import Position, replace_corrupt
from synco_fast.data.sources.decode import LONGEST_RATIO, central_part, decode_image, encode_pixels, plain_jpeg_size
from synco_fast.data.sources.splits import Split

__all__ = ["EncodedBatch", "Reader"]

#: One row of a batch: bytes, height and width, image number, and corrupt images met on the way.
_Sample = tuple[bytes, tuple[int, int], int, dict[int, str]]


@dataclass
class EncodedBatch:
    """The files of one batch.

    Attributes:
        epoch: Epoch of the batch.
        wanted: The images that are due, (b,) int64.
        images: The images that were read, another where the due one is corrupt, (b,) int64.
        sizes: Height and width, (b, 2) int64.
        content: The bytes of all files, concatenated, uint8.
        ends: End of each file in ``content``, (b,) int64.
        corrupt: Reason by number, for corrupt images.
        views: The parameters of each of their views, b rows each; none for an evaluation.
    """

    epoch: int
    wanted: NDArray[np.int64]
    images: NDArray[np.int64]
    sizes: NDArray[np.int64]
    content: Tensor
    ends: NDArray[np.int64]
    corrupt: dict[int, str]
    views: tuple[ViewParameters, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def files(self) -> list[NDArray[np.uint8]]:
        """The bytes of each file, without a copy."""
        return np.split(self.content.numpy(), self.ends[:-1])


def _collate(epoch: int, wanted: Sequence[int], samples: Sequence[_Sample]) -> EncodedBatch:
    contents, sizes, images, corrupt = zip(*samples, strict=True)
    return EncodedBatch(
        epoch,
        np.array(wanted, dtype=np.int64),
        np.array(images, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        torch.frombuffer(bytearray().join(contents), dtype=torch.uint8),
        np.cumsum([len(content) for content in contents], dtype=np.int64),
        {index: reason for part in corrupt for index, reason in part.items()},
    )


class Reader(Dataset[EncodedBatch]):
    """Reads files for DALI, a whole batch at once.

    A JPEG file with a valid header is passed on unchanged. Everything else (PNG, CMYK, 16 bits, truncated files) is
    decoded here by Pillow and passed on as plain pixels. So all pipelines read special files alike, and corrupt files
    are found before they reach DALI, which fails the whole batch for one corrupt file.

    Args:
        split: The images.
        replace: Whether the next image takes a corrupt one's place; otherwise it is skipped.
        draw: Draws the parameters of a batch's views.
    """

    def __init__(
        self,
        split: Split,
        *,
        replace: bool,
        draw: Callable[[EncodedBatch], tuple[ViewParameters, ...]] = lambda batch: (),
    ) -> None:
        self.split, self.replace, self._draw = split, replace, draw

    def __getitem__(self, places: list[Position]) -> EncodedBatch:
        """A batch, without the images that are skipped.

        Raises:
            DataError: Too many consecutive images are corrupt.
        """
        return self.gather(places[0][0], [self._sample(wanted, by_pillow=False) for _, wanted in places])

    def again_by_pillow(self, batch: EncodedBatch, rows: Iterable[int]) -> EncodedBatch:
        """The same batch with these rows decoded by Pillow, or replaced if it cannot decode them."""
        chosen = set(rows)
        files = batch.files()
        gathered = []
        for row, wanted in enumerate(batch.wanted.tolist()):
            if row in chosen:
                gathered.append(self._sample(wanted, by_pillow=True))
            else:
                height, width = batch.sizes[row].tolist()
                gathered.append((wanted, (files[row].tobytes(), (height, width), int(batch.images[row]), {})))
        again = self.gather(batch.epoch, gathered)
        again.corrupt = {**batch.corrupt, **again.corrupt}
        return again

    def gather(self, epoch: int, gathered: list[tuple[int, _Sample | dict[int, str]]]) -> EncodedBatch:
        """A batch from the number that is due and what was read of it, or the reasons why nothing was."""
        found = [(wanted, sample) for wanted, sample in gathered if isinstance(sample, tuple)]
        excluded = {index: reason for _, part in gathered if isinstance(part, dict) for index, reason in part.items()}
        if not found:
            nothing = np.empty(0, np.int64)
            return EncodedBatch(
                epoch, nothing, nothing, nothing.reshape(0, 2), torch.empty(0, dtype=torch.uint8), nothing, excluded
            )
        batch = _collate(epoch, *zip(*found, strict=True))
        batch.corrupt |= excluded
        batch.views = self._draw(batch)
        return batch

    def _sample(self, wanted: int, *, by_pillow: bool) -> tuple[int, _Sample | dict[int, str]]:
        if self.replace:
            (content, size), index, corrupt = replace_corrupt(
                len(self.split), wanted, lambda index: self._read(index, by_pillow)
            )
            return wanted, (content, size, index, corrupt)
        try:
            content, size = self._read(wanted, by_pillow)
        except CorruptImageError as error:
            return wanted, {wanted: str(error)}
        return wanted, (content, size, wanted, {})

    def _read(self, index: int, by_pillow: bool) -> tuple[bytes, tuple[int, int]]:
        content, limits = self.split.read_bytes(index), self.split.limits
        size = None if by_pillow else plain_jpeg_size(content, limits)
        if size is not None and (self.replace or max(size) <= LONGEST_RATIO * min(size)):
            return content, size
        pixels = np.asarray(decode_image(content, self.split.name(index), limits))
        if not self.replace:  # for an evaluation, which resizes the whole image
            pixels = central_part(pixels)
        return encode_pixels(pixels), (pixels.shape[0], pixels.shape[1])

    def loader(self, batches: Iterable[list[Position]], workers: int | None, seed: int) -> Loader[EncodedBatch]:
        """The batches, read by ``workers`` processes (default: one per core of this rank; 0: this one)."""
        return Loader(self, batches, workers=workers, seed=seed)
