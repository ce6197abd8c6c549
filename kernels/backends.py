"""Backend names of the loss. This module imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BACKENDS", "Backend"]

Backend = Literal["auto", "reference", "blockwise", "triton"]
"""The names that a configuration accepts; ``auto`` chooses a backend for the device."""

BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "auto")
"""The backends of the loss, the simplest first."""
