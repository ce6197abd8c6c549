"""Which device is current, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

__all__ = ["devices_entered"]


def devices_entered(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Replace `torch.cuda.device_of`; the list holds the tensors whose device is entered, innermost last."""
    current: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return current
