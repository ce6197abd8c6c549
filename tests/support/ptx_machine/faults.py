"""What the machine raises where a kernel does what a device may answer with anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fault", "raise_at"]


class Fault(Exception):
    """A race, an access out of bounds, misaligned or of unwritten bytes, a deadlock.

    Attributes:
        message: What happened.
        thread: Number of the thread among those that run at once, or None.
        where: Instruction, CTA and thread, where they are known.
    """

    def __init__(self, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.message, self.thread, self.where = message, thread, ""

    def __str__(self) -> str:
        return f"{self.message}{self.where}"


def raise_at(wrong: NDArray[Any], threads: NDArray[Any], message: str, address: NDArray[Any] | None = None) -> None:
    """Raise for the first thread that something is wrong for, (n,) or (n, any), with its address if given."""
    if wrong.any():
        first = int(np.argmax(wrong.reshape(len(threads), -1).any(axis=1)))
        raise Fault(message if address is None else f"{message} {int(address[first]):#x}", int(threads[first]))
