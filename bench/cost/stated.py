"""Data-dependent costs, stated for each launch, since the machine code and the launch do not show them.

For random unit rows it states the trip counts of data-dependent branches and loops. It also states the bytes through
the L2 cache where the machine code counts too many, because of masked lanes or lanes that read the same word. Other
launches are counted from the machine code only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from synco_fast.bench.cost.launches import Launch
from synco_fast.bench.loss import Shape
from synco_fast.kernels.triton.config import sampling_of

__all__ = ["STATED", "Stated", "candidates"]


@dataclass(frozen=True)
class Stated:
    """The stated costs of a launch.

    Attributes:
        turns: Trip counts of loops and branches, by a substring of their source line.
        moved: Bytes read from and written to the L2 cache by the whole launch.
    """

    turns: dict[str, Callable[[Shape], float]] = field(default_factory=dict)
    moved: Callable[[Launch, Shape], float] | None = None

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


def _scan(launch: Launch, shape: Shape) -> float:
    values = launch.arguments
    rows = min(values["ROWS"], shape.rows)
    read: float = launch.programs * (values["tiles"] * values["KEYS"] + rows) * _row(shape)
    # A similarity and an index for each candidate, and the sums of each split.
    return read + shape.rows * (8 * candidates(shape) + launch.grid[1] * (4 * shape.dim + 12))


def _select(launch: Launch, shape: Shape) -> float:
    return shape.rows * 8.0 * (candidates(shape) + shape.negatives.hard)


def _mix(launch: Launch, shape: Shape) -> float:
    negatives, values = shape.negatives, launch.arguments
    picks = drawn = 0
    for _, count, *numbers in values["TABLE"]:
        _, _, _, a_slope, _, first_slope, second, second_slope, sigma, eta, _, _ = numbers
        paired, sloped = bool(second or second_slope), bool(a_slope or first_slope or second_slope)
        known = not (paired or sigma or eta)
        picks += count * (1 + paired)
        # The draws are written and read once, and what they pick is read once: t, keys, and q.n_i if no x is formed.
        drawn += 4 * count * (2 * (1 + paired + sloped + known) + 1 + paired + known)
    shared = values["PARTS"] * (4 * shape.dim + _row(shape) + 16) + 4 * negatives.synthetic
    return float(shape.rows * (picks * _row(shape) + drawn + shared))


def _reduce(launch: Launch, shape: Shape) -> float:
    negatives, values = shape.negatives, launch.arguments
    shares: int = values["SPLITS"] + values["PARTS"]
    alone = 4 * (negatives.hard + negatives.synthetic)
    return float(shape.rows * (shares * (4 * shape.dim + 8) + alone + 2 * _row(shape)))


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
            # From about 2^23 numbers between threshold and maximum to about 2^10 between two similarities.
            "while (low < high) & (reached != needed)": lambda shape: 12.2,
        },
        _select,
    ),
    # On ordinary features no row takes the slow path.
    "fill": Stated(
        dict.fromkeys(("if tl.max(m_row.to(tl.int32)) > 0", "for tile in", "for begin in"), _NEVER),
        lambda launch, shape: 4.0 * launch.programs,
    ),
    "choose": Stated({"if tl.load(p_flag + row) != 0": _NEVER}),
    "mix": Stated({"if available > 0": _ALWAYS, "if tl.max(cancelled.to(tl.int32), axis=0) > 0": _NEVER}, _mix),
    "reduce": Stated(moved=_reduce),
}
