"""Shared memory of many CTAs, with a race check: who wrote and read which bytes, and which barriers came since."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine.faults import Fault, raise_at
from tests.support.ptx_machine.operands import UNSIGNED

__all__ = ["ORIGIN", "SharedMemory"]

Array = NDArray[Any]
#: Address of the first byte: on a device the system has the first KiB.
ORIGIN = 1024
#: Stamp of bytes that an asynchronous copy is on its way to.
_FLYING = -1
#: In place of a lane: several lanes of a warp.
_SEVERAL = 255


class SharedMemory:
    """(CTAs, bytes). Each granule has a stamp of its last write (barriers of the CTA, of the warp, and thread), and for
    each warp the last read and its lane.

    Two clocks count barriers: ``epoch`` those of a CTA, (CTAs,), and ``clock`` those of a warp, of both kinds,
    (CTAs x warps,). ``passed`` is the clock of a warp at the last barrier of its CTA.
    """

    def __init__(self, s: Any, size: int, granule: int) -> None:
        self.s, self.granule = s, granule
        self.size = -(-size // 16) * 16
        self.limit = size
        self.data = np.zeros(s.ctas * self.size, np.uint8)
        count = s.ctas * self.size // granule
        self.stamps = np.zeros(count, np.int64)
        #: By warp: its clock at the last read, times 256, plus the lane.
        self.reads = np.full((count, s.warps), -1, np.int64)
        #: How many asynchronous products read each granule.
        self.held: Array | None = None
        #: Count of stores and fences, at which each granule was stored and each thread fenced, and in which epoch.
        self.now = 1
        self.stored_at = np.zeros(count, np.int32)
        self.fenced_at = np.zeros(s.shape, np.int32)
        self.fenced_in = np.zeros(s.shape, np.int64)

    def view(self, width: int) -> Array:
        """The bytes as unsigned integers."""
        return self.data.view(UNSIGNED[8 * width])

    def load(self, threads: Array, address: Array, width: int, count: int) -> Array:
        """(n, count) numbers of ``width`` bytes for these threads, at addresses (n,)."""
        place = self._places(threads, address, width * count)
        self.note_read(threads, self._granules(place, width * count))
        return self.view(width)[(place // width)[:, None] + np.arange(count)]

    def store(self, threads: Array, address: Array, values: Array) -> None:
        """Store (n, count) unsigned numbers."""
        width, count = values.dtype.itemsize, values.shape[1]
        place = self._places(threads, address, width * count)
        granules = self._granules(place, width * count)
        index = (place // width)[:, None] + np.arange(count)
        view = self.view(width)
        self._check_write(threads, granules, (view[index] == values).all(axis=1))
        view[index] = values
        raise_at(view[index] != values, threads, "a race: two threads of one instruction write shared bytes")
        self._note_write(threads, granules)

    def add(self, threads: Array, address: Array, values: Array) -> Array:
        """Atomically add (n,) words, and return what was there before."""
        place = self._places(threads, address, 4)
        granules = self._granules(place, 4)
        # Atomic additions have the thread that does not exist, and do not race with each other.
        stamps = self.stamps[granules]
        self._check_write(threads, granules, ((stamps > 0) & (stamps & 0xFFF == 0xFFF)).all(axis=1))
        index, view = place // 4, self.view(4)
        order = np.argsort(index, kind="stable")
        sums = np.cumsum(values[order], dtype=np.uint32)
        first = np.r_[True, index[order][1:] != index[order][:-1]]
        ahead = sums - values[order]
        ahead -= np.repeat(ahead[first], np.diff(np.r_[np.flatnonzero(first), len(index)]))
        before = np.empty(len(index), np.uint32)
        before[order] = view[index[order]] + ahead
        np.add.at(view, index, values)
        self.stamps[granules] = (self._stamp(threads) | 0xFFF)[:, None]
        return before

    def launch_copy(self, threads: Array, address: Array, width: int) -> Array:
        """Bytes that a copy will write: nobody may touch them until it lands. Returns their places."""
        place = self._places(threads, address, width)
        granules = self._granules(place, width)
        self._check_write(threads, granules, np.zeros(len(threads), bool))
        self.stamps[granules] = _FLYING
        return place

    def land(self, threads: Array, place: Array, values: Array) -> None:
        """A copy has arrived, as if its threads wrote now."""
        self.data[place[:, None] + np.arange(values.shape[1])] = values
        granules = self._granules(place, values.shape[1])
        self._note_write(threads, granules)
        if self.s.unfenced_copies:
            self.stored_at[granules] = -1

    def fence(self, threads: Array) -> None:
        """What these threads have seen may be read by asynchronous products."""
        self.now += 1
        self.fenced_at[threads], self.fenced_in[threads] = self.now, self.s.epoch[self.s.cta[threads]]

    def check_proxy(self, threads: Array, granules: Array) -> None:
        """Between a store and a product that reads it stands a proxy fence: of the thread that stored, or of those that
        read, after a barrier."""
        stamps = self.stamps[granules]
        writer = np.minimum(stamps & 0xFFF, self.s.threads - 1) + (self.s.cta[threads] * self.s.threads)[:, None]
        by_writer = self.fenced_at[writer] > self.stored_at[granules]
        by_reader = self.fenced_in[threads][:, None] > stamps >> 40
        raise_at((stamps > 0) & ~by_writer & ~by_reader, threads, "no proxy fence between a store and a product")

    def _note_write(self, threads: Array, granules: Array) -> None:
        self.stamps[granules] = self._stamp(threads)[:, None]
        self.now += 1
        self.stored_at[granules] = self.now

    def note_read(self, threads: Array, granules: Array, *, whole: bool = False) -> None:
        """Check that these threads, or with ``whole`` their warps, may read granules, (n, any), and remember it."""
        s = self.s
        stamps = self.stamps[granules]
        cta = s.cta[threads]
        warp = s.warp[threads]
        suspicious = (stamps <= 0) | (stamps >> 40 >= s.epoch[cta][:, None])
        if suspicious.any():
            raise_at(stamps == 0, threads, "reads shared bytes that nobody has written")
            raise_at(stamps == _FLYING, threads, "reads shared bytes that an asynchronous copy has not brought yet")
            suspicious &= (stamps & 0xFFF) != s.tid[threads][:, None]
            self._raise_race(suspicious, stamps, threads, "reads what")
        place = granules * s.warps + warp[:, None]
        reads, clock = self.reads.reshape(-1), s.clock[cta, warp][:, None].astype(np.int64) << 8
        if whole:
            reads[place] = clock | _SEVERAL
            return
        mine = clock | s.lane[threads][:, None]
        before = reads[place]
        mine = np.where((before >= clock) & (before != mine), clock | _SEVERAL, mine)
        reads[place] = mine
        several = reads[place] != mine
        if several.any():
            reads[place[several]] |= _SEVERAL

    def _check_write(self, threads: Array, granules: Array, same: Array) -> None:
        """Check that these threads may write these granules now. ``same`` where they write what is there already."""
        s = self.s
        if self.held is not None:
            raise_at(self.held[granules] > 0, threads, "a race: writes shared bytes that a product reads")
        stamps = self.stamps[granules]
        cta, warp = s.cta[threads], s.warp[threads]
        suspicious = stamps >> 40 >= s.epoch[cta][:, None]
        raise_at(stamps == _FLYING, threads, "writes shared bytes that an asynchronous copy is on its way to")
        if suspicious.any():
            suspicious &= ((stamps & 0xFFF) != s.tid[threads][:, None]) & ~same[:, None]
            self._raise_race(suspicious, stamps, threads, "writes what")
        reads = self.reads[granules]
        clock = s.clock[cta, warp][:, None].astype(np.int64) << 8
        own = np.take_along_axis(reads, warp[:, None, None], 2)[..., 0]
        other = (own >= clock) & (own != clock | s.lane[threads][:, None]) & ~same[:, None]
        raise_at(other, threads, "a race: writes shared bytes that another lane has read, without a barrier between")
        recent = reads >= s.passed[cta][:, None, :].astype(np.int64) << 8
        if recent.any():
            recent[np.arange(len(warp)), :, warp] = False
            raise_at(
                recent.reshape(len(threads), -1) & ~same[:, None],
                threads,
                "a race: writes shared bytes that another warp has read, without a barrier between",
            )

    def _raise_race(self, suspicious: Array, stamps: Array, threads: Array, what: str) -> None:
        """Raise where another thread wrote since the last barrier of the CTA or, in one warp, of the warp."""
        if not suspicious.any():
            return
        s = self.s
        cta, warp = s.cta[threads], s.warp[threads]
        writer = stamps & 0xFFF
        alike = (writer >> 5 == warp[:, None]) & (writer != 0xFFF)
        late = ~alike | ((stamps >> 12 & 0xFFFFFFF) >= s.clock[cta, warp][:, None])
        wrong = suspicious & late
        if wrong.any():
            first = int(np.argmax(wrong.any(axis=1)))
            place = int(np.argmax(wrong[first]))
            who = int(writer[first, place])
            raise Fault(
                f"a race in shared memory: {what} thread {who} wrote, without a barrier between", int(threads[first])
            )

    def _stamp(self, threads: Array) -> Array:
        s = self.s
        cta, warp = s.cta[threads], s.warp[threads]
        return s.epoch[cta] << 40 | s.clock[cta, warp].astype(np.int64) << 12 | s.tid[threads]

    def _granules(self, place: Array, width: int) -> Array:
        return (place // self.granule)[:, None] + np.arange(width // self.granule)

    def _places(self, threads: Array, address: Array, width: int) -> Array:
        raise_at(address % width != 0, threads, f"a misaligned access of {width} bytes to shared memory")
        offset = address.astype(np.int64) - ORIGIN
        outside = (offset < 0) | (offset + width > self.limit)
        if outside.any():
            first = int(np.argmax(outside))
            raise Fault(
                f"an access out of bounds of shared memory: {width} bytes at {int(offset[first])} of {self.limit}",
                int(threads[first]),
            )
        return self.s.cta[threads] * self.size + offset
