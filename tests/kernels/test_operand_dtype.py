"""Queries and keys rounded inside the loss: as tensors given in that dtype, but with loss and gradient in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.kernels import Negatives, ops, synthetic_contrast
from synco_fast.kernels.reference import contrast

SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
NEGATIVES = {"moco": Negatives.moco(), "synco": Negatives.synco(64)}
HALVES = (torch.bfloat16, torch.float16)


def unit_rows(rows=24, length=4096, dim=128):
    """What training hands over: unit rows with all the digits of float32, keys near their queries."""
    generator = torch.Generator().manual_seed(5)
    q, k, queue = (torch.randn(count, dim, generator=generator) for count in (rows, rows, length))
    q, queue = normalize(q, dim=1), normalize(queue, dim=1)
    return q, normalize(q + 0.05 * k, dim=1), queue


def run(q, k, queue, negatives, **settings):
    q = q.detach().requires_grad_()
    found = synthetic_contrast(q, k, queue, negatives, **SETTINGS, **settings)
    found.loss.sum().backward()
    return found, q.grad


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_it_is_the_loss_of_the_rounded_tensors_and_stays_in_float32(backend, dtype):
    q, k, queue = unit_rows(8, 300, 32)
    found, gradient = run(q, k, queue.to(dtype), NEGATIVES["synco"], backend=backend, operand_dtype=dtype)
    rounded = [tensor.to(dtype).float() for tensor in (q, k, queue)]
    expected, exact = run(*rounded, NEGATIVES["synco"], backend=backend)
    assert found.loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-6 * exact.abs().max().item())
    assert gradient.to(dtype).float().ne(gradient).any(), "the gradient keeps more digits than the operands have"


def moco_in(dtype, q, k, queue, negatives):
    """MoCo's loss as its code writes it: products and logits in ``dtype``, the softmax in float32 or wider."""
    positive, negative = torch.einsum("nc,nc->n", q, k), torch.einsum("nc,kc->nk", q, queue)
    logits = torch.cat([positive[:, None], negative], dim=1) / SETTINGS["temperature"]
    wide = logits if dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide, torch.zeros(len(q), dtype=torch.int64), reduction="sum")


def reference_in(dtype, q, k, queue, negatives):
    return contrast(q, k, queue, negatives, **SETTINGS).loss.sum()


@pytest.mark.parametrize(("plain", "name"), [(moco_in, "moco"), (reference_in, "moco"), (reference_in, "synco")])
def test_the_gradient_is_within_twice_the_error_of_plain_pytorch_in_bfloat16(plain, name):
    """Both are compared with float64 on the rows as they were before they were rounded."""
    q, k, queue = unit_rows()

    def gradient_in(dtype):
        leaf = q.detach().requires_grad_()
        plain(dtype, leaf.to(dtype), k.to(dtype), queue.to(dtype), NEGATIVES[name]).backward()
        return leaf.grad

    exact = gradient_in(torch.float64).double()
    _, gradient = run(q, k, queue.bfloat16(), NEGATIVES[name], operand_dtype=torch.bfloat16)
    found, of_plain = (
        ((one.double() - exact).norm() / exact.norm()).item() for one in (gradient, gradient_in(torch.bfloat16))
    )
    assert 0 < found <= 2 * of_plain
    assert of_plain < 0.1, "plain PyTorch's gradient is one"


def test_without_it_nothing_is_rounded():
    q, k, queue = unit_rows(4, 60, 16)
    one, other = (run(q, k, queue, NEGATIVES["moco"], **more)[1] for more in ({}, {"operand_dtype": None}))
    assert torch.equal(one, other)
    assert not torch.equal(one, run(q, k, queue, NEGATIVES["moco"], operand_dtype=torch.bfloat16)[1])


def test_what_it_does_not_take():
    q, k, queue = unit_rows(4, 60, 16)
    with pytest.raises(ValueError, match=r"operand_dtype: found torch.float64, expected torch.bfloat16 or"):
        run(q, k, queue, NEGATIVES["moco"], operand_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"q: found torch.float64, expected torch.float32 with operand_dtype"):
        run(q.double(), k.double(), queue, NEGATIVES["moco"], operand_dtype=torch.bfloat16)


def test_the_operator_takes_it():
    """Schema, fake tensors and autograd of the operator, and `torch.func` through it."""
    q, k, queue = unit_rows(4, 60, 16)
    _, expected = run(q, k, queue.bfloat16(), NEGATIVES["moco"], operand_dtype=torch.bfloat16)

    def total(q):
        settings = {**SETTINGS, "operand_dtype": torch.bfloat16}
        return synthetic_contrast(q, k, queue.bfloat16(), NEGATIVES["moco"], **settings).loss.sum()

    assert torch.equal(torch.func.grad(total)(q), expected)
    described = ops._counts(NEGATIVES["moco"]), ops._numbers(NEGATIVES["moco"])
    rest = ("released", 0.2, 3, 7, None, 0, None, None, "blockwise", torch.bfloat16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        ops._contrast, (q.requires_grad_(), k, queue.bfloat16(), *described, *rest), test_utils=checks
    )
