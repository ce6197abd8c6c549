"""Names of the loss's backends; importing them is cheap."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BACKENDS", "Backend"]

Backend = Literal["auto", "reference", "blockwise", "triton"]
"""Names in a configuration; ``auto`` chooses for the device."""

BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "auto")
"""The backends of the loss, the plainest first."""
