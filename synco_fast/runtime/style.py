"""Colours and labels of all plots."""

from __future__ import annotations

__all__ = ["COLOURS", "colour_of", "plain"]

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
