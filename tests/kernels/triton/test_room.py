"""The memory that the launcher asks for beside inputs and outputs."""

from __future__ import annotations

import math

import pytest
import torch

from synco_fast.kernels.negatives import Negatives

pytest.importorskip("triton")


class Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


def test_scratch_is_small(monkeypatch):
    """At the published shape: the aim is 64 MiB."""
    from synco_fast.kernels.triton import full_select, launch

    asked = []

    def empty(*shape, dtype=torch.float32, device):
        asked.append(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device=device)

    for name in ("sample", "rank", "scan", "select", "mix", "reduce"):
        monkeypatch.setattr(launch, name, Nothing())
    for name in ("fill", "choose"):
        monkeypatch.setattr(full_select, name, Nothing())
    monkeypatch.setattr(launch, "generation_of", lambda device: 9)
    monkeypatch.setattr(launch, "empty", empty)
    q, queue = torch.empty(256, 128, dtype=torch.bfloat16), torch.empty(65536, 128, dtype=torch.bfloat16)
    outputs = launch.contrast_and_gradient(q, q, queue, Negatives.synco(), temperature=0.2, seed=3, step=5)
    assert 32 << 20 < sum(asked) - sum(output.nbytes for output in outputs) < 64 << 20
