"""Inputs whose similarities are exact in every dtype, and the float64 answer to compare with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from synco_fast.kernels.validation import Answer, Inputs, exact_inputs, reference_answer


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.manual_seed(20241002)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make() -> Callable[..., Inputs]:
    """Every backend sees the same similarities and must choose the same hard negatives, ties included."""
    return exact_inputs


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """Loss, statistics and gradient of the reference in the asked dtype, on the values as they are stored."""
    return reference_answer


@pytest.fixture
def within() -> Callable[..., None]:
    """Assert |found - exact| <= 2 |plain - exact| + a few units in the last place of ``plain``'s dtype."""

    def check(found: Tensor, plain: Tensor, exact: Tensor, what: str, units: float = 8) -> None:
        assert found.isfinite().all(), f"{what}: {int((~found.isfinite()).sum())} numbers are not finite"
        error = (found.double() - exact).abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        allowed += units * torch.finfo(plain.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{what}: error {error:.3e}, expected {allowed:.3e}"

    return check
