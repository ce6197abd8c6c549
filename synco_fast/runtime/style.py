"""Colours and labels of all plots."""

from __future__ import annotations

__all__ = ["COLOURS", "colour_of", "columns_of", "plain", "shortened", "told_apart"]

#: Okabe and Ito's palette, which stays distinct for colour-blind readers; its yellow is darkened for a white page.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#000000")


def colour_of(place: int) -> str:
    """The colour of line number ``place``, counted from 0; repeats after eight."""
    return COLOURS[place % len(COLOURS)]


def plain(text: str) -> str:
    """A label that matplotlib shows as it is.

    It would take what stands between two ``$`` for a formula, and show no label in a legend that begins with ``_``.
    """
    hair_space = "\N{HAIR SPACE}" if text.startswith("_") else ""
    return hair_space + text.replace("$", r"\$")


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters: a longer one without its middle, since names often differ at the end."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[-tail:]}"


def told_apart(names: list[str], most: int) -> list[str]:
    """Names of at most ``most`` characters; if that leaves two alike, all begin with their numbers, counted from 0."""
    short = [shortened(name, most) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    return [shortened(f"{number} {name}", most) for number, name in enumerate(names)]


def columns_of(labels: list[str], room: int, *, most: int = 4) -> int:
    """The columns of a legend of up to ``room`` characters a line, each column with six for its mark and gap."""
    return max(1, min(most, len(labels), room // (max(map(len, labels), default=0) + 6)))
