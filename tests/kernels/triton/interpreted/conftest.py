"""Every buffer of the launcher starts as poison: NaN, or a whole number that no result may be."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels.triton import config, launch


def poisoned(*shape, dtype=torch.float32, device):
    poison = float("nan") if dtype.is_floating_point else -(2**30) - 7
    return torch.full(shape, poison, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    assert config.interpreted(), "these checks run through test_interpreter.py"
    monkeypatch.setattr(launch, "empty", poisoned)
