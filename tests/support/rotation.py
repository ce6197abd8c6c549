"""What takes minutes in full is run in turn: some of it each day, all of it where ``SYNCO_FAST_ALL`` is set."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["todays"]

T = TypeVar("T")


def todays(cases: Sequence[T], count: int = 1) -> list[T]:
    """``count`` of the cases, others each day."""
    if os.environ.get("SYNCO_FAST_ALL"):
        return list(cases)
    start = datetime.datetime.now(datetime.UTC).date().toordinal() * count
    return [cases[(start + number) % len(cases)] for number in range(min(count, len(cases)))]
