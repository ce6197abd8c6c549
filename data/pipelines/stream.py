"""Stream pipeline: worker processes read shards from front to back, shuffle in a buffer, decode and make both views."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.loader import Loader
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.pixels import decode_pixels
from synco_fast.data.pipelines.stream_order import Piece, ShuffleBuffer, plan_epoch
from synco_fast.data.pipelines.torchvision import Decoded, batch_of_views
from synco_fast.data.sources.stream import StreamSplit
from synco_fast.data.sources.stream_reader import ShardError, read_images
from synco_fast.data.workers import available_cores

__all__ = ["StreamPipeline"]

#: Most readers that are chosen without a setting.
_READERS = 16
#: An id for a shard as a whole: no shard has so many images.
_WHOLE = 0xFFFFFFFF

#: An epoch, a step in it, and a worker's part of the step.
_Place = tuple[int, int, int]


@dataclass(frozen=True)
class _Sample:
    """An image as it was read: its id, its name, its bytes or why there are none, and how often it came before."""

    image: int
    name: str
    content: bytes | CorruptImageError
    turn: int


class StreamPipeline:
    """Batches of two views from shards that are read front to back; see `Pipeline` for the contract.

    The order depends on seed, epoch, shards, index, and the settings of the stream, but not on ranks and workers; see
    `synco_fast.data.pipelines.stream_order`. An epoch that begins in the middle reads what comes before in its shards,
    without decoding it. An image that cannot be decoded is replaced by another one of its reader's buffer. One that
    comes again in an epoch has other views.

    Args:
        split: The shards, and how they are read.
        recipe: How views are made.
        batch: B, images in a batch, over all ranks.
        seed: Seed of order and views, together with the epoch.
        workers: Processes that read and decode, at most one for each reader of this rank; 0 reads in the training
            process. By default one for each core of this rank.
        pin_memory: Whether batches lie in page-locked memory, for a GPU.
        rank, world: Rank of this process, and number of processes; each reads the shards of its own readers.

    Raises:
        DataError: The number of images is not known, or batch, readers, shards and processes do not fit.
    """

    def __init__(
        self,
        split: StreamSplit,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        workers: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        readers = _readers(split, batch, world)
        steps = len(split) // batch
        if not steps:
            raise DataError(f"training.batch: found {batch}, expected up to {len(split)}, the images of an epoch")
        own = range(rank * readers // world, (rank + 1) * readers // world)
        workers = min(available_cores() if workers is None else workers, len(own))
        self._parts = max(1, workers)
        self._places = _Places(steps, self._parts)
        shares = [
            own[part * len(own) // self._parts : (part + 1) * len(own) // self._parts] for part in range(self._parts)
        ]
        self._loader = Loader(
            _Parts(split, recipe, shares, readers=readers, each=batch // readers, steps=steps, seed=seed),
            self._places,
            workers=workers,
            seed=seed,
            pin_memory=pin_memory and self._parts == 1,
        )
        self._pinned = pin_memory and self._parts > 1

    def __len__(self) -> int:
        return self._places.steps

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and its first batch."""
        self._places.epoch, self._places.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Batch] = []
        for part in self._loader:
            parts.append(part)
            if len(parts) == self._parts:
                yield _joined(parts, pinned=self._pinned)
                parts = []

    def close(self) -> None:
        """End the workers; the pipeline yields nothing afterwards."""
        loader = self.__dict__.pop("_loader", None)
        if loader is not None:
            loader.close()


def _readers(split: StreamSplit, batch: int, world: int) -> int:
    """The number of readers; see `StreamSettings.readers`."""
    shards, readers = len(split.shards), split.settings.readers
    if readers is None:
        readers = next(each for each in range(min(_READERS, shards, batch), 0, -1) if batch % each == 0)
    if batch % readers:
        raise DataError(f"data.readers: found {readers}, expected a divisor of {batch} (training.batch)")
    if readers % world:
        raise DataError(f"data.readers: found {readers}, expected a multiple of {world}, the number of processes")
    if split.counts is None and readers > shards:
        raise DataError(
            f"data.readers: found {readers}, expected up to {shards}, the number of shards of {split.title}; with an "
            "index of the images in each, several readers can share one"
        )
    return readers


class _Places(Sampler[_Place]):
    """Every part of every step, in turn: the loader gives part n to worker n."""

    def __init__(self, steps: int, parts: int) -> None:
        self.steps, self.parts = steps, parts
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[_Place]:
        epoch = self.epoch
        return ((epoch, step, part) for step in range(self.start, self.steps) for part in range(self.parts))


class _Parts(Dataset[Batch]):
    """Parts of steps, each from some readers; reading goes on where the last part of the same readers ended."""

    def __init__(
        self,
        split: StreamSplit,
        recipe: Recipe,
        shares: list[range],
        *,
        readers: int,
        each: int,
        steps: int,
        seed: int,
    ) -> None:
        self.split, self.recipe, self.shares, self.seed = split, recipe, shares, seed
        self.readers, self.each, self.steps = readers, each, steps
        self._next: dict[int, tuple[int, int]] = {}
        self._open: dict[int, list[_Reader]] = {}

    def __getitem__(self, place: _Place) -> Batch:
        """The part's views."""
        epoch, step, part = place
        if self._next.get(part) != (epoch, step):
            self._begin(epoch, step, part)
        images = (image for reader in self._open[part] for image in self._of_step(reader))
        batch = batch_of_views(images, self.recipe, seed=self.seed, epoch=epoch)
        self._next[part] = epoch, step + 1
        return batch

    def _begin(self, epoch: int, step: int, part: int) -> None:
        for reader in self._open.pop(part, []):
            reader.close()
        share = self.steps * self.each
        plan = plan_epoch(
            len(self.split.shards),
            self.split.counts,
            readers=self.readers,
            share=share,
            seed=self.seed,
            epoch=epoch,
        )
        size = max(1, self.split.settings.buffer // self.readers)
        self._open[part] = [
            _Reader(
                self.split, plan[number], ShuffleBuffer(share, size, self.seed, epoch, number), start=step * self.each
            )
            for number in self.shares[part]
        ]

    def _of_step(self, reader: _Reader) -> Iterator[Decoded]:
        """A reader's share of a step."""
        done: list[_Sample] = []
        for _ in range(self.each):
            wanted = next(reader)
            yield self._decoded(wanted, done, reader.others)
            done.append(wanted)

    def _decoded(self, wanted: _Sample, before: list[_Sample], others: Callable[[], Iterator[_Sample]]) -> Decoded:
        """An image, or the first one that decodes among those in the buffer and those of the same step."""
        corrupt: dict[int, str] = {}

        def candidates() -> Iterator[_Sample]:
            yield wanted
            yield from others()
            yield from before

        for sample in candidates():
            if isinstance(sample.content, CorruptImageError):
                corrupt[sample.image] = str(sample.content)
                continue
            try:
                pixels = decode_pixels(sample.content, sample.name, self.split.limits)
            except CorruptImageError as error:
                corrupt[sample.image] = str(error)
                continue
            return Decoded(wanted.image, pixels, sample.image, corrupt, wanted.turn)
        raise DataError(
            f"data: found {len(corrupt)} corrupt images in a row, the first: {next(iter(corrupt.values()))}"
        )


class _Reader:
    """The images of one reader in an epoch, in the order of its shuffle buffer.

    Args:
        split: The shards.
        pieces: What it reads.
        order: The order of its positions, at the start of the epoch.
        start: Images that are given out already; they are skipped.
    """

    def __init__(self, split: StreamSplit, pieces: list[Piece], order: ShuffleBuffer, *, start: int) -> None:
        self._order = order
        for _ in range(start):
            next(order)
        pending, horizon = set(order.slots), order.taken
        self._samples = _positions(split, pieces, lambda position: position >= horizon or position in pending)
        self._held: dict[int, _Sample] = {}

    def __next__(self) -> _Sample:
        return self._take(next(self._order))

    def others(self) -> Iterator[_Sample]:
        """The images in the buffer, which stay there."""
        for position in [*self._order.slots]:
            sample = self._take(position)
            self._held[position] = sample
            yield sample

    def _take(self, position: int) -> _Sample:
        while position not in self._held:
            place, sample = next(self._samples)
            self._held[place] = sample
        return self._held.pop(position)

    def close(self) -> None:
        """Close the open shard."""
        self._samples.close()


def _positions(
    split: StreamSplit, pieces: list[Piece], keep: Callable[[int], bool]
) -> Generator[tuple[int, _Sample], None, None]:
    """The kept images of some pieces, over and over, with their positions.

    A piece of known length takes as many positions, whatever its shard holds: what is missing counts as corrupt images,
    so that positions are the same after a resume. Of a damaged shard of unknown length, one position is corrupt.
    """
    position, found = 0, False
    for place, piece in enumerate(cycle(pieces)):
        if place and place % len(pieces) == 0 and not found:
            raise DataError(
                f"data: found no image in {len(pieces)} shards of {split.title}, such as {_shard(split, piece)}"
            )
        turn = piece.turn + place // len(pieces)
        start, end = position, None if piece.count is None else position + piece.count
        if end is not None and not any(map(keep, range(start, end))):
            position, found = end, True
            continue
        met, reason = 0, ""
        wanted = partial(_is_wanted, piece.first, start, keep)
        stop = None if piece.count is None else piece.first + piece.count
        images = read_images(_shard(split, piece), wanted, split.limits, stop=stop)
        try:
            for number, name, content in images:
                met = max(met, number + 1 - piece.first)
                if content is not None:
                    yield start + number - piece.first, _Sample(piece.shard << 32 | number, name, content, turn)
        except ShardError as error:
            reason = str(error)
        finally:
            images.close()
        found |= met > 0
        if end is None:
            position = start + met
            if reason:
                if keep(position):
                    yield position, _missing(split, piece, _WHOLE, reason, turn)
                position += 1
            continue
        reason = reason or f"the shard holds {piece.first + met} images, fewer than the index says"
        for position in filter(keep, range(start + met, end)):
            yield position, _missing(split, piece, piece.first + position - start, reason, turn)
        position = end


def _is_wanted(first: int, start: int, keep: Callable[[int], bool], number: int) -> bool:
    """Whether the image of this number in a shard is wanted, where image ``first`` has the position ``start``."""
    return number >= first and keep(start + number - first)


def _shard(split: StreamSplit, piece: Piece) -> str:
    return split.shards[piece.shard]


def _missing(split: StreamSplit, piece: Piece, number: int, reason: str, turn: int) -> _Sample:
    name = _shard(split, piece)
    reason = reason if reason.startswith(name) else f"{name}: {reason}"
    return _Sample(piece.shard << 32 | number, name, CorruptImageError(reason), turn)


def _joined(parts: list[Batch], *, pinned: bool) -> Batch:
    """The batch of some parts, in page-locked memory on request; one copy of each part."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        size = (sum(map(len, tensors)), *tensors[0].shape[1:])
        return torch.cat(tensors, out=torch.empty(size, dtype=tensors[0].dtype, pin_memory=pinned))

    corrupt = {image: reason for part in parts for image, reason in part.corrupt.items()}
    return Batch(joined("first"), joined("second"), joined("image_ids"), corrupt)
