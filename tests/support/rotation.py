"""What takes minutes in full is run in turn: some of it each day, all of it where ``SYNCO_FAST_ALL`` is set."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

__all__ = ["in_turn", "todays"]

T = TypeVar("T")


def _day() -> int:
    return datetime.datetime.now(datetime.UTC).date().toordinal()


def in_turn(place: int, of: int) -> pytest.MarkDecorator:
    """Skip a test but on each ``of``-th day; tests with other places have the days between."""
    waits = not os.environ.get("SYNCO_FAST_ALL") and _day() % of != place
    return pytest.mark.skipif(waits, reason="runs on another day; SYNCO_FAST_ALL=1 runs all")


def todays(cases: Sequence[T], count: int = 1) -> list[T]:
    """``count`` of the cases, others each day."""
    if os.environ.get("SYNCO_FAST_ALL"):
        return list(cases)
    start = _day() * count
    return [cases[(start + number) % len(cases)] for number in range(min(count, len(cases)))]
