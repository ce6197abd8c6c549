"""Data-dependent costs, stated for each launch, since the machine code and the launch do not show them.

For random unit rows it states the trip counts of data-dependent branches and loops. It also states the bytes through
the L2 cache where the machine code counts too many, because of masked lanes or lanes that read the same word. Other
launches are counted from the machine code only.

L2 moves whole sectors of 32 bytes, so there are two counts: the bytes that are used, and all bytes of the sectors that
hold them. A sector counts once for all lanes of an instruction, and again for each other instruction: no reuse in L1 is
assumed. The one exception is Q^N of a row (8 bytes a key). Each program of `mix` picks from it in a few instructions in
a row, so it counts once for each program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from synco_fast.bench.cost.launches import Launch
from synco_fast.bench.loss import Shape
from synco_fast.kernels.triton.config import sampling_of

__all__ = ["STATED", "Moved", "Stated", "candidates"]

_SECTOR = 32


class Moved(NamedTuple):
    """Bytes between multiprocessors and L2: those that are used, and those of all sectors that hold them."""

    used: float
    sectors: float


@dataclass(frozen=True)
class Stated:
    """The stated costs of a launch.

    Attributes:
        turns: Trip counts of loops and branches, by a substring of their source line.
        moved: Bytes read from and written to the L2 cache by the whole launch.
    """

    turns: dict[str, Callable[[Shape], float]] = field(default_factory=dict)
    moved: Callable[[Launch, Shape], Moved] | None = None

    def turns_of(self, line: str, shape: Shape) -> float | None:
        """The stated trip count of a loop or branch; None if there is none."""
        return next((turns(shape) for part, turns in self.turns.items() if part in line), None)


def candidates(shape: Shape) -> float:
    """Average number of keys of a row above the sampled threshold."""
    hard = shape.negatives.hard
    sampling = sampling_of(shape.length, hard) if hard else None
    # The threshold is up to 1/16 beyond the wanted rank.
    return sampling[0] * sampling[1] * 33 / 32 if sampling else 0.0


def _row(shape: Shape) -> int:
    return shape.dim * shape.itemsize


def _scan(launch: Launch, shape: Shape) -> Moved:
    values = launch.arguments
    rows = min(values["ROWS"], shape.rows)
    read: float = launch.programs * (values["tiles"] * values["KEYS"] + rows) * _row(shape)
    sums = shape.rows * launch.grid[1] * (4 * shape.dim + 12)
    # A similarity and an index for each candidate, stored alone, and the sums of each split.
    found = shape.rows * candidates(shape)
    return Moved(read + sums + 8 * found, read + sums + _SECTOR * found)


def _splits(launch: Launch, shape: Shape) -> Moved:
    """Of a row: a sum, a rank and a vector of each split."""
    splits: int = launch.arguments["SPLITS"]
    return Moved(splits * (4.0 * shape.dim + 8), splits * (4.0 * shape.dim + 2 * _SECTOR))


def _select(launch: Launch, shape: Shape) -> Moved:
    lists, found, hard = launch.arguments["lists"], candidates(shape), shape.negatives.hard
    sums = _splits(launch, shape)
    # The chosen are read twice, and written; so is the sum of all splits.
    used = 8 * found + 4 * lists + 16 * hard + 4 * shape.dim + 8
    # A list ends in the middle of a sector. Nearly every sector with candidates holds a chosen one. Of 32 candidates
    # some are stored side by side, from anywhere on.
    sectors = 2 * (8 * found + lists * _SECTOR / 2) + 4 * lists + 8 * hard + 2 * found / 32 * (_SECTOR - 8)
    return Moved(shape.rows * (used + sums.used), shape.rows * (sectors + 4 * shape.dim + 2 * _SECTOR + sums.sectors))


def _mix(launch: Launch, shape: Shape) -> Moved:
    negatives, values = shape.negatives, launch.arguments
    picks = drawn = picked = 0
    for _, count, *numbers in values["TABLE"]:
        _, _, _, _, _, _, second, second_slope, *_ = numbers
        paired = bool(second or second_slope)
        picks += count * (1 + paired)
        # Four numbers of each key are written and read once, and what they pick is read once: index and q.n.
        drawn += 16 * count * 2 * (1 + paired)
        picked += 8 * count * (1 + paired)
    shared = values["PARTS"] * (4 * shape.dim + _row(shape) + 16) + 4 * negatives.synthetic
    once = picks * _row(shape) + drawn + shared
    return Moved(shape.rows * (once + picked), shape.rows * (once + values["PARTS"] * 8 * negatives.hard))


def _reduce(launch: Launch, shape: Shape) -> Moved:
    negatives, values = shape.negatives, launch.arguments
    sums = _splits(launch, shape)
    # Of Q^N the similarities alone are used.
    alone = 4 * negatives.synthetic + 2 * _row(shape) + 4 * shape.dim * values["PARTS"]
    return Moved(
        shape.rows * (sums.used + alone + 4 * negatives.hard), shape.rows * (sums.sectors + alone + 8 * negatives.hard)
    )


def _flags(launch: Launch, shape: Shape) -> Moved:
    bytes_read = 4.0 * launch.programs * shape.rows
    return Moved(bytes_read, bytes_read)


_NEVER: Callable[[Shape], float] = lambda shape: 0.0  # noqa: E731
_ALWAYS: Callable[[Shape], float] = lambda shape: 1.0  # noqa: E731

STATED: dict[str, Stated] = {
    # Bisects the sample's similarities down to a rank that may be off by 1/16.
    "rank": Stated({"while (low < high) & (reached > wanted": lambda shape: 8.0}),
    "scan": Stated(moved=_scan),
    "select": Stated(
        {
            "if flag == 0": _ALWAYS,
            # No two similarities are equal.
            "if reached != needed": _NEVER,
            # Simulated in tests/bench/test_cost.py, on similarities of random rows.
            "while (low < high) & (reached != needed)": lambda shape: 7.7,
        },
        _select,
    ),
    # On ordinary features no row takes the slow path.
    "fill": Stated(
        dict.fromkeys(("if tl.max(b_flag) > 0", "for tile in"), _NEVER),
        _flags,
    ),
    "choose": Stated({"for number in": _NEVER}, _flags),
    "mix": Stated({"if available > 0": _ALWAYS, "if marked > 0": _NEVER}, _mix),
    "reduce": Stated(moved=_reduce),
}
