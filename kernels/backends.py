"""The backends of the loss by name; importing them costs nothing."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BACKENDS", "Backend"]

Backend = Literal["auto", "reference", "blockwise", "triton"]
"""What a configuration may name; ``auto`` chooses for the device."""

BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "auto")
"""What computes the loss, the plainest first."""
