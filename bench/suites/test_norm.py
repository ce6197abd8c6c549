"""Norm, add and ReLU by implementation, forward and backward. ``synco-fast bench norm`` adds shapes and bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from synco_fast.bench.norm import prepare_norm, unavailable
from synco_fast.bench.norm_model import Layer
from synco_fast.bench.subjects import NORMS

LAYERS = [Layer(64, 56, 56, True, False), Layer(256, 56, 56, True, True), Layer(2048, 7, 7, True, True)]


@pytest.mark.parametrize("subject", NORMS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.channels}x{layer.height}-{layer.kind}")
def test_norm(timed: Callable[[Callable[[], object]], None], device: torch.device, subject: str, layer: Layer) -> None:
    """Layers of a ResNet-50 in eight groups; 256 images on a GPU and 16 on a CPU."""
    dtype = torch.float16 if subject == "apex" else torch.bfloat16
    if reason := unavailable(subject, device, dtype):
        pytest.skip(reason)
    run = prepare_norm(subject, layer, 256 if device.type == "cuda" else 16, 8, device, dtype)
    timed(run)
    assert torch.isfinite(run()[0]).all()
