"""Inputs whose similarities are exact in every dtype, and the float64 answer to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from synco_fast.kernels import Contrast, Negatives
from synco_fast.kernels.reference import contrast


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    queue: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(tensor.to(dtype) for tensor in self))


class Answer(NamedTuple):
    contrast: Contrast
    gradient: Tensor


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.manual_seed(20241002)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make() -> Callable[..., Inputs]:
    """Rows of length about 1 whose numbers are multiples of 1/128.

    They are exact in bfloat16, and their products and sums are exact in float32: every back end sees the same
    similarities and must choose the same hard negatives, ties included, of which there are many.
    """

    def inputs(
        rows: int, length: int, dim: int, dtype: torch.dtype = torch.float32, *, peaked: bool = False, seed: int = 0
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def unit(*shape: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

        q, queue = unit(rows, dim), unit(length, dim)
        k = torch.nn.functional.normalize(q + 0.7 * unit(rows, dim), dim=1)
        if peaked:  # the queue holds the queries themselves: a softmax with nearly all its weight in one place
            queue[: min(rows, length)] = q[: min(rows, length)]
        return Inputs(*((tensor * 128).round() / 128 for tensor in (q, k, queue))).to(dtype)

    return inputs


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """Loss, statistics and gradient of the reference in the asked dtype, on the values as they are stored."""

    def answers(inputs: Inputs, negatives: Negatives, dtype: torch.dtype = torch.float64, **arguments) -> Answer:
        q, k, queue = inputs.to(dtype)
        q = q.detach().requires_grad_()
        result = contrast(q, k, queue, negatives, **{"temperature": 0.2, "seed": 3, "step": 7} | arguments)
        (gradient,) = torch.autograd.grad(result.loss.sum(), q)
        return Answer(Contrast(result.loss.detach(), result.statistics), gradient)

    return answers


@pytest.fixture
def within() -> Callable[..., None]:
    """Assert |found - exact| <= 2 |plain - exact| + a few units in the last place of ``plain``'s dtype."""

    def check(found: Tensor, plain: Tensor, exact: Tensor, what: str, units: float = 8) -> None:
        assert found.isfinite().all(), f"{what}: {int((~found.isfinite()).sum())} numbers are not finite"
        error = (found.double() - exact).abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        allowed += units * torch.finfo(plain.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

    return check
