"""What the machine raises where a kernel does what a device may answer with anything."""

from __future__ import annotations

__all__ = ["Fault"]


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
