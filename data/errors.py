"""User errors, including those of sources and images."""

from __future__ import annotations

import os

__all__ = ["CorruptImageError", "DataError", "UserError", "first_line", "one_line", "printable"]


def printable(text: str) -> str:
    """Text printable in one line: control characters and non-UTF-8 bytes of file names are escaped.

    Python reads such bytes as lone surrogates, which a strict stream cannot print.
    """
    try:
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that is not an escaped byte
        text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def first_line(error: BaseException, most: int = 160) -> str:
    """The first line of an error's message, for a message about it; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def one_line(error: BaseException, most: int | None = None) -> str:
    """All that an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UserError(Exception):
    """Wrong input; the message names the thing, what was found and what is expected, in one printable line.

    Attributes:
        waited: Whether this process of a job has given the other ones time to print the same.
        said: Whether another process of the job prints it.
        awaited: Whether other processes of the job may wait for this one to join it.
    """

    waited = said = awaited = False

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class DataError(UserError, ValueError):
    """A source, folder or setting is wrong; the message is one line."""


class CorruptImageError(DataError):
    """One image cannot be decoded; the message names it and gives the reason."""
