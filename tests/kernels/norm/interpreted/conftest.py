"""Every buffer of the launcher starts as NaN."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels.norm.triton import config, launch


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    assert config.interpreted(), "these checks run through test_interpreter.py"

    def poisoned(*shape, dtype=torch.float32, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    def poisoned_like(x):
        return torch.full_like(x, float("nan"), memory_format=torch.channels_last)

    monkeypatch.setattr(launch, "empty", poisoned)
    monkeypatch.setattr(launch, "empty_like", poisoned_like)
