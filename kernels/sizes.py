"""Sizes of launches. Triton's functions of these names take the host a microsecond or two for each call."""

from __future__ import annotations

__all__ = ["cdiv", "next_power_of_2"]


def cdiv(count: int, size: int) -> int:
    """Blocks of ``size`` that cover ``count``, both positive."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least ``count``, which is positive."""
    return 1 << (count - 1).bit_length()
