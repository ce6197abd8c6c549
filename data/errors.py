"""Errors that a person can mend, and those of images and sources among them."""

from __future__ import annotations

__all__ = ["BrokenImageError", "DataError", "UserError"]


class UserError(Exception):
    """Input that is not what it must be; the message names the thing, what was found and what is expected."""


class DataError(UserError, ValueError):
    """A source, a folder or a setting is not what it must be; the message is one line that says what was found."""


class BrokenImageError(DataError):
    """One image cannot be read; the message names it and says why."""
