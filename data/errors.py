"""User errors: wrong input, and the errors of sources and images among them."""

from __future__ import annotations

__all__ = ["CorruptImageError", "DataError", "UserError"]


class UserError(Exception):
    """Wrong input; the message names the thing, what was found and what is expected."""


class DataError(UserError, ValueError):
    """A source, folder or setting is wrong; the message is one line."""


class CorruptImageError(DataError):
    """One image cannot be decoded; the message names it and gives the reason."""
