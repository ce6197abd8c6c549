"""The loss by backend, forward and gradient. ``synco-fast bench loss`` adds memory, floors and graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from synco_fast.bench.loss import Shape, prepare
from synco_fast.bench.subjects import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "length"), [(64, 4096), (256, 65536)])
def test_loss(
    timed: Callable[[Callable[[], object]], None], device: torch.device, backend: str, rows: int, length: int
) -> None:
    """SynCo: 960 synthetic negatives from 1,024 hard ones, D = 128."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    try:
        run = prepare(backend, Shape(rows, length, dtype=dtype), device)
        run()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    timed(run)
    assert torch.isfinite(run()).all()
