"""User errors: wrong input, and the errors of sources and images among them."""

from __future__ import annotations

import os

__all__ = ["CorruptImageError", "DataError", "UserError", "printable"]


def printable(text: str) -> str:
    """Text for one line of any UTF-8 terminal: bytes of file names that are not UTF-8, and control characters, escaped.

    Python reads such bytes as lone surrogates, which a strict stream refuses to print.
    """
    try:
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


class UserError(Exception):
    """Wrong input; the message names the thing, what was found and what is expected, in one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class DataError(UserError, ValueError):
    """A source, folder or setting is wrong; the message is one line."""


class CorruptImageError(DataError):
    """One image cannot be decoded; the message names it and gives the reason."""
