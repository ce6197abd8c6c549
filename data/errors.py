"""What the data package raises for input that a person can mend."""

from __future__ import annotations

__all__ = ["BrokenImageError", "DataError"]


class DataError(ValueError):
    """A source, a folder or a setting is not what it must be; the message is one line that says what was found."""


class BrokenImageError(DataError):
    """One image cannot be read; the message names it and says why."""
