"""Ranks as messages name them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["name_ranks"]


def name_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks with runs of them shortened: ``rank 3``, ``ranks 0-7, 9``."""
    spans = [[ranks[0], ranks[0]]]
    for rank in ranks[1:]:
        if rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
