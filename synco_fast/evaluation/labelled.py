"""Labelled batches with the crops of the published protocols, and labelled subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.transforms import v2

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.loader import Loader
from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.pipelines.epochs import replace_corrupt
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources.open import Split
from synco_fast.runtime.errors import DataError

__all__ = ["LabelledBatches", "balanced_subset", "images_sha256", "listed_subset"]


class _Crops(Dataset[tuple[Tensor, Tensor]]):
    """Batches of random resized crops (area 0.08 to 1) and flips, the standard of linear evaluation and fine-tuning."""

    def __init__(self, split: Split, recipe: Recipe, seed: int, numbers: list[int]) -> None:
        assert split.labels is not None
        self.split, self.labels, self.seed, self.numbers = split, split.labels, seed, numbers
        self.transform = v2.Compose([v2.RandomResizedCrop(recipe.size), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __getitem__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self._crop(epoch, place) for epoch, place in keys), strict=True)
        return default_collate(list(images)), torch.tensor(labels)

    def _crop(self, epoch: int, place: int) -> tuple[Tensor, int]:
        image, place, _ = replace_corrupt(len(self.numbers), place, lambda found: self.split.read(self.numbers[found]))
        number = self.numbers[place]
        with nullcontext() if get_worker_info() else torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, epoch, number))
            return self.transform(image), int(self.labels[number])


class LabelledBatches:
    """Batches of labelled crops; order and crops depend only on seed and epoch.

    The ranks of a job take equal parts of each batch. The last batch of an epoch is filled up from its beginning to a
    multiple of their number. A last batch of one image per rank, useless for batch statistics, is merged with the one
    before.

    Args:
        split: The images.
        recipe: Gives the crop size.
        numbers: Which images.
        batch: Images per step, over all ranks; a multiple of their number.
        seed: Seed of order and crops.
        workers: Decoding processes.
        rank, world: This process and how many there are.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        numbers: list[int],
        *,
        batch: int,
        seed: int,
        workers: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        # Apart from this object: a cycle with the loader would keep its workers until the garbage is collected.
        self._order = _Order(len(numbers), batch, seed, rank, world)
        self._loader = Loader(_Crops(split, recipe, seed, numbers), self._order, workers=workers, seed=seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order.starts())

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, 3, size, size) uint8 and labels (b,) int64 of an epoch."""
        self._order.epoch = number
        yield from self._loader


@dataclass
class _Order:
    """Epoch and place of every image in this rank's part of each batch."""

    length: int
    batch: int
    seed: int
    rank: int
    world: int
    epoch: int = 0

    def starts(self) -> range:
        """Where the batches begin in the order of an epoch."""
        length = self.length + -self.length % self.world
        starts = range(0, length, self.batch)
        return starts[:-1] if len(starts) > 1 and length - starts[-1] <= self.world else starts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.length, seed=self.seed, epoch=self.epoch).tolist()
        order = (order * self.world)[: len(order) + -len(order) % self.world]
        starts = self.starts()
        for start in starts:
            end = len(order) if start == starts[-1] else start + self.batch
            yield [(self.epoch, place) for place in order[start:end][self.rank :: self.world]]


def balanced_subset(split: Split, share: float, *, seed: int) -> list[int]:
    """The sorted numbers of a fraction of each class's images, at least one of each.

    Args:
        split: Labelled images.
        share: In (0, 1].
        seed: Chooses them.
    """
    assert split.labels is not None
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(split.labels):
        inside = np.flatnonzero(split.labels == label)
        chosen.append(rng.permutation(inside)[: max(1, round(share * len(inside)))])
    return sorted(int(number) for number in np.concatenate(chosen))


def listed_subset(split: Split, file: Path) -> list[int]:
    """The numbers of the images that a file lists, one name per line, as in SimCLR's ``1percent.txt``.

    A line is a file's name, the end of its path, or the image's number.

    Raises:
        DataError: The file cannot be read, is empty, or names an image that the split does not have or several that it
            has.
    """
    try:
        wanted = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list: cannot read {file} ({error})") from error
    if not wanted:
        raise DataError(f"list: found no names in {file}, expected one image per line")
    by_name: dict[str, int] = {}
    other: dict[str, int] = {}
    for number in range(len(split)):
        parts = split.name(number).split("/")
        for length in range(1, min(4, len(parts) + 1)):
            end = "/".join(parts[-length:])
            first = by_name.setdefault(end, number)
            if first != number and split.name(first) != split.name(number):
                other[end] = number
    chosen = []
    for name in wanted:
        number = int(name) if name.isdigit() else by_name.get(name, -1)
        if name in other and not name.isdigit():
            raise DataError(
                f"list: found {name!r} in {file}, the name of several images such as {split.name(number)} and "
                f"{split.name(other[name])}, expected more of the path, or the image's number"
            )
        if not 0 <= number < len(split):
            raise DataError(f"list: found {name!r} in {file}, expected the name of a training image")
        chosen.append(number)
    return sorted(set(chosen))


def images_sha256(split: Split, numbers: Sequence[int] | None = None) -> str:
    """SHA-256 over number, name and label of a split's images: all of them, or those with the given numbers.

    It tells sets of images apart without reading them; a file that is overwritten under its name is not noticed.
    """
    assert split.labels is not None
    chosen = np.arange(len(split)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    digest = hashlib.sha256(chosen.tobytes())
    digest.update(split.labels[chosen].tobytes())
    for number in chosen.tolist():
        digest.update(split.name(number).encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()
