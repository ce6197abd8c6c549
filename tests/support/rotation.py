"""What takes minutes in full is run in turn: some of it each day, all of it where ``SYNCO_FAST_ALL`` is set."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

__all__ = ["day", "in_turn", "keep_the_day", "todays"]

T = TypeVar("T")


_DAY = "SYNCO_FAST_DAY"


def day() -> int:
    """The number of the day by which tests take turns."""
    return int(os.environ.get(_DAY) or datetime.datetime.now(datetime.UTC).date().toordinal())


def keep_the_day() -> None:
    """Give this process and those that it starts one day: pytest's workers must collect the same tests at midnight."""
    os.environ.setdefault(_DAY, str(day()))


def in_turn(place: int, of: int) -> pytest.MarkDecorator:
    """Skip a test but on each ``of``-th day; tests with other places have the days between.

    A test that runs others by `todays` gives them the day divided by ``of``: on each third day alone, three cases in
    turn would always be the same one.
    """
    waits = not os.environ.get("SYNCO_FAST_ALL") and day() % of != place
    return pytest.mark.skipif(waits, reason="runs on another day; SYNCO_FAST_ALL=1 runs all")


def todays(cases: Sequence[T], count: int = 1) -> list[T]:
    """``count`` of the cases, others each day."""
    if os.environ.get("SYNCO_FAST_ALL"):
        return list(cases)
    start = day() * count
    return [cases[(start + number) % len(cases)] for number in range(min(count, len(cases)))]
