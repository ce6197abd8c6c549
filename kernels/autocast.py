"""Autocast inside the operators, whose dtypes are explicit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on this device. A compiler can trace it, unlike `torch.amp.is_autocast_available`."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
