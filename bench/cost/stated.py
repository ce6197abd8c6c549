"""What the counted cost cannot read from machine code and launch, since data decides it: stated here, launch by launch.

For unit rows at random: how often branches and loops that depend on data are taken or turn, and the bytes that really
pass through the L2 cache where the count of bytes asked for says more (masked lanes, lanes that read the same word). A
launch that is not named here is counted as the machine code alone says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from synco_fast.bench.cost.launches import Launch
from synco_fast.bench.loss import Shape
from synco_fast.kernels.topk import stride_and_rank

__all__ = ["STATED", "Stated", "candidates"]


@dataclass(frozen=True)
class Stated:
    """What is known of a launch beside its code.

    Attributes:
        turns: By a part of the source line of a loop or branch: how often it turns or is taken.
        moved: Bytes read from and written to the L2 cache by the whole launch.
    """

    turns: dict[str, Callable[[Shape], float]] = field(default_factory=dict)
    moved: Callable[[Launch, Shape], float] | None = None

    def turns_of(self, line: str, shape: Shape) -> float | None:
        """What is stated of a loop or branch; None where nothing is."""
        return next((turns(shape) for part, turns in self.turns.items() if part in line), None)


def candidates(shape: Shape) -> float:
    """Keys of a row above the sampled threshold, on average."""
    hard = shape.negatives.hard
    stride, rank = stride_and_rank(shape.length, hard) if hard else (1, 0)
    return float(stride * rank)


def _row(shape: Shape) -> int:
    return shape.dim * shape.itemsize


def _scan(launch: Launch, shape: Shape) -> float:
    values = launch.arguments
    rows = min(values["ROWS"], shape.rows)
    read = launch.programs * (values["tiles"] * values["KEYS"] + rows) * _row(shape)
    return read + shape.rows * shape.length / 8 + launch.grid[1] * shape.rows * (4 * shape.dim + 8)


def _mix(launch: Launch, shape: Shape) -> float:
    negatives = shape.negatives
    picks = negatives.synthetic + negatives.mixed
    return shape.rows * (picks * (_row(shape) + 4) + launch.arguments["PARTS"] * (4 * shape.dim + 72))


def _reduce(launch: Launch, shape: Shape) -> float:
    values = launch.arguments
    shares = values["SPLITS"] + values["PARTS"]
    return shape.rows * (shares * (4 * shape.dim + 8) + 4 * shape.negatives.hard + 2 * _row(shape))


_NEVER: Callable[[Shape], float] = lambda shape: 0.0  # noqa: E731
_ALWAYS: Callable[[Shape], float] = lambda shape: 1.0  # noqa: E731

STATED: dict[str, Stated] = {
    "scan": Stated(moved=_scan),
    "collect": Stated(moved=lambda launch, shape: shape.rows * (shape.length / 8 + 4 * candidates(shape))),
    "score": Stated(
        {"if start < count": lambda shape: math.ceil(candidates(shape) / 64) / 64},
        lambda launch, shape: shape.rows * candidates(shape) * (_row(shape) + 8),
    ),
    "order": Stated(
        {"if flag == 0": _ALWAYS},
        lambda launch, shape: 8 * shape.rows * (candidates(shape) + shape.negatives.hard),
    ),
    # On ordinary features no row goes the slow way.
    "full_sort": Stated({"if tl.load(p_flag + row) != 0": _NEVER}),
    "mix": Stated({"if available > 0": _ALWAYS}, _mix),
    "reduce": Stated(moved=_reduce),
}
