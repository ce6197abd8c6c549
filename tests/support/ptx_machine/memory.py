"""Global memory: the tensors of a launch at made-up addresses, with every access checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.ptx_machine.faults import Fault, raise_at
from tests.support.ptx_machine.operands import UNSIGNED

__all__ = ["GlobalMemory", "Space"]

Array = NDArray[Any]
#: Bits of the addresses of one space, and the address of its first byte there: nothing lies around it.
_BITS, _ORIGIN = 40, 1 << 39
#: Stamps of reads by several threads of a CTA (a mask), and of several CTAs.
_MANY, _EVERYWHERE = 0xFFFF, 0xFFFFF << 40


class Space:
    """The bytes of one storage.

    Attributes:
        data: The bytes themselves.
        written: 1 for each byte that has been written; None where all have.
        ranges: First and last byte + 1 of each part that the launch may touch.
        stamps: Who wrote each granule in this launch, and when; None until somebody does.
        reads: Who read each granule in this launch, and when; None until somebody does.
    """

    def __init__(self, data: Array, *, written: bool) -> None:
        self.data = data
        self.written = None if written else np.zeros(len(data), np.uint8)
        self.ranges: list[tuple[int, int]] = []
        self.stamps: Array | None = None
        self.reads: Array | None = None

    def view(self, width: int) -> Array:
        """The bytes as unsigned integers of ``width`` bytes."""
        return self.data[: len(self.data) // width * width].view(UNSIGNED[8 * width])

    def allow(self, begin: int, end: int) -> None:
        """Let the launch touch these bytes."""
        self.ranges.append((begin, end))
        self.ranges.sort()
        merged = [self.ranges[0]]
        for low, high in self.ranges[1:]:
            if low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        self.ranges = merged


class GlobalMemory:
    """All storages that launches have seen, and whether their bytes are known to be written."""

    def __init__(self) -> None:
        self.spaces: list[Space] = []
        self._numbers: dict[int, int] = {}
        # Nobody else may get their memory while it is known here.
        self._kept: list[Tensor] = []
        #: Bytes that divide every access of the launch.
        self.granule = 1
        #: Whether a thread may store what others of its CTA have read: see `Emulator.copies`.
        self.copies = False
        #: Whether threads may store different numbers at one place: see `Emulator.overlaps`.
        self.overlaps = False

    def register(self, tensor: Tensor, *, written: bool = True) -> int:
        """The number of the space of a tensor, which is known from now on."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._numbers or not storage.nbytes():
            assert address % 16 == 0, "a storage that is not aligned to 16 bytes"
            self._kept.append(tensor)
            self._numbers[address] = len(self.spaces)
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[no-untyped-call]
            self.spaces.append(Space(whole.numpy(), written=written))
        return self._numbers[address]

    def mark(self, tensor: Tensor) -> None:
        """PyTorch has written this tensor."""
        number = self._numbers.get(tensor.untyped_storage().data_ptr())
        if number is not None and (written := self.spaces[number].written) is not None:
            begin, end = _extent(tensor)
            written[begin:end] = 1

    def pointer(self, tensor: Tensor) -> int:
        """The address of a tensor, which the launch may touch from now on."""
        number = self.register(tensor)
        begin, end = _extent(tensor)
        self.spaces[number].allow(begin, end)
        return (number + 1 << _BITS) + _ORIGIN + begin

    def begin(self) -> None:
        """A new launch, which may touch nothing yet."""
        for space in self.spaces:
            space.ranges, space.stamps, space.reads = [], None, None

    def load(self, s: Any, threads: Array, address: Array, width: int, count: int, *, atomic: bool = False) -> Array:
        """(n, count) numbers of ``width`` bytes for these threads, at addresses (n,)."""
        found = np.empty((len(threads), count), UNSIGNED[8 * width])
        for space, some, place in self._places(threads, address, width * count):
            whole = width * count
            if space.written is not None:
                unit = min(whole, 8)
                index = (place // unit)[:, None] + np.arange(whole // unit)
                full = space.written[: len(space.written) // unit * unit].view(UNSIGNED[8 * unit])
                raise_at(full[index] != int.from_bytes(b"\1" * unit, "little"), threads[some], "reads unwritten bytes")
            granules = self._granules(place, whole)
            if space.stamps is not None:
                stamps = space.stamps[granules]
                if stamps.any():
                    other = self._conflict(s, stamps, threads[some], atomic)
                    raise_at(other, threads[some], "reads what another thread writes")
            if not atomic:
                self._note_read(s, space, granules, threads[some])
            found[some] = space.view(width)[(place // width)[:, None] + np.arange(count)]
        return found

    def store(self, s: Any, threads: Array, address: Array, values: Array, *, atomic: bool = False) -> None:
        """Store (n, count) unsigned numbers."""
        width, count = values.dtype.itemsize, values.shape[1]
        for space, some, place in self._places(threads, address, width * count):
            who = threads[some]
            index = (place // width)[:, None] + np.arange(count)
            view, own = space.view(width), values[some]
            granules = self._granules(place, width * count)
            # Writing the same number again is harmless.
            differs = (view[index] != own).any(axis=1)
            if space.stamps is None:
                space.stamps = np.zeros(-(-len(space.data) // self.granule), np.int64)
            else:
                other = self._conflict(s, space.stamps[granules], who, atomic)
                if not self.overlaps:
                    raise_at(other & differs[:, None], who, "writes what another thread writes")
            if space.reads is not None:
                read, mine = space.reads[granules], self._reader(s, who)
                settled = (read >> 40 == mine >> 40) & ((read >> 16 < mine >> 16) | (read == mine) | self.copies)
                raise_at((read != 0) & ~settled & differs[:, None], who, "writes what another thread reads")
            view[index] = own
            if not self.overlaps:
                raise_at(view[index] != own, who, "writes what another thread writes")
            space.stamps[granules] = ((s.number[who] + 1) << 32 | atomic << 31 | s.epoch[s.cta[who]])[:, None]
            if space.written is not None:
                unit = min(width * count, 8)
                place_of = (place // unit)[:, None] + np.arange(width * count // unit)
                full = space.written[: len(space.written) // unit * unit].view(UNSIGNED[8 * unit])
                full[place_of] = int.from_bytes(b"\1" * unit, "little")

    def add(self, s: Any, threads: Array, address: Array, values: Array) -> Array:
        """Atomically add (n,) unsigned numbers, and return what was there before."""
        before = np.empty(len(threads), values.dtype)
        # One after another: few threads do this.
        for number in range(len(threads)):
            some = slice(number, number + 1)
            found = self.load(s, threads[some], address[some], values.dtype.itemsize, 1, atomic=True)
            before[some] = found[:, 0]
            self.store(s, threads[some], address[some], found + values[some, None], atomic=True)
        return before

    def _granules(self, place: Array, width: int) -> Array:
        return (place // self.granule)[:, None] + np.arange(width // self.granule)

    def _reader(self, s: Any, threads: Array) -> Array:
        """Threads as stamps of reads, (n, 1): CTA, barriers that it has passed, and thread."""
        cta = s.cta[threads]
        stamps: Array = s.numbers[cta] + 1 << 40 | s.epoch[cta] << 16 | s.tid[threads] + 1
        return stamps[:, None]

    def _note_read(self, s: Any, space: Space, granules: Array, threads: Array) -> None:
        """Remember the last reader of each granule, or that there are several in its CTA or in several CTAs."""
        if space.reads is None:
            space.reads = np.zeros(-(-len(space.data) // self.granule), np.int64)
        mine, before = self._reader(s, threads), space.reads[granules]

        def joined(one: Array, other: Array) -> Array:
            later = np.where(one >> 16 == other >> 16, one | _MANY, np.maximum(one, other))
            both = np.where(one >> 40 == other >> 40, later, _EVERYWHERE)
            return np.where((one == other) | (other == 0), one, both)

        found = joined(mine, before)
        space.reads[granules] = found
        # Threads of one instruction that read the same granule.
        after = space.reads[granules]
        lost = after != found
        if lost.any():
            space.reads[granules[lost]] = joined(found[lost], after[lost])

    def _conflict(self, s: Any, stamps: Array, threads: Array, atomic: bool) -> Array:
        """Where somebody else has written in this launch, without a barrier since. Atomic accesses do not conflict."""
        writer, epoch, own = (stamps >> 32) - 1, stamps & 0x7FFFFFFF, s.number[threads][:, None]
        alike = writer // s.threads == own // s.threads
        settled = (alike & (epoch < s.epoch[s.cta[threads]][:, None])) | (writer == own)
        if atomic:
            settled |= stamps >> 31 & 1 == 1
        return (stamps != 0) & ~settled

    def _places(self, threads: Array, address: Array, width: int) -> Iterable[tuple[Space, Any, Array]]:
        """For each space its threads and the places of their bytes."""
        raise_at(address % width != 0, threads, f"a misaligned access of {width} bytes at", address)
        number = (address >> np.uint64(_BITS)).astype(np.int64) - 1
        offset = (address & np.uint64((1 << _BITS) - 1)).astype(np.int64) - _ORIGIN
        low, high = int(number.min()), int(number.max())
        for one in [low] if low == high else np.unique(number).tolist():
            some = slice(None) if low == high else number == one
            place, who = offset[some], threads[some]
            if not 0 <= one < len(self.spaces):
                raise Fault(f"an access at {int(address[some][0]):#x}, where no tensor is", int(who[0]))
            space = self.spaces[one]
            within = np.zeros(len(place), bool)
            for begin, end in space.ranges:
                within |= (place >= begin) & (place + width <= end)
            if not within.all():
                first = int(np.argmin(within))
                parts = ", ".join(f"{begin} to {end}" for begin, end in space.ranges) or "none"
                raise Fault(
                    f"an access out of bounds: {width} bytes at {int(place[first])} of a storage of {len(space.data)}"
                    f" bytes, of which the launch has {parts}",
                    int(who[first]),
                )
            yield space, some, place


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and last + 1 of a tensor in its storage."""
    begin = tensor.storage_offset() * tensor.itemsize
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize
