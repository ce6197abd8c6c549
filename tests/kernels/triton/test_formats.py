"""What float32 loses as products of fewer bits, emulated on the CPU: the margins of the selection rest on it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.kernels.negatives import Negatives
from synco_fast.kernels.validation import Inputs, exact_inputs, reference_answer

pytest.importorskip("triton")


def halves(x, dtype):
    high = x.to(dtype).float()
    return high, (x - high).to(dtype).float()


def three(left, right, dtype=torch.float16):
    (left_high, left_low), (right_high, right_low) = halves(left, dtype), halves(right, dtype)
    return left_high @ right_low + left_low @ right_high + left_high @ right_high


def tf32(left, right):
    left, right = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (left, right))
    return left @ right


def contrast_of_three(inputs, temperature, dtype=torch.float16):
    """Loss and gradient of MoCo as the kernels multiply float32 on tensor cores."""
    q, k, queue = inputs
    positive = (q * k).sum(dim=1, keepdim=True)
    similarity = three(q, queue.T, dtype)
    shift = torch.maximum(positive, similarity[:, ::2].amax(dim=1, keepdim=True))
    p = ((similarity - shift) / temperature).exp()
    rest, first = p.sum(dim=1, keepdim=True), ((positive - shift) / temperature).exp()
    loss = ((first + rest).log() + (shift - positive) / temperature).squeeze(1)
    return loss, (three(p, queue, torch.bfloat16) - rest * k) / ((first + rest) * temperature)


@pytest.mark.parametrize(("name", "product"), [("three", three), ("tf32", tf32)])
@pytest.mark.parametrize("dim", [64, 512])
def test_margins_are_twice_the_error_at_least(name, product, dim):
    from synco_fast.kernels.triton import config

    q, keys = (normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1).float() for rows in (16, 4000))
    # Equal signs and the very key of a query add up the errors.
    keys[:16], q, keys[16:32] = q.abs(), q.abs(), q
    error = (product(q, keys.T).double() - q.double() @ keys.double().T).abs().max().item()
    assert 0 < error <= config.FORMATS[name].margin / 2


def test_three_products_keep_the_bounds_on_exact_inputs(within):
    temperature = 0.07
    inputs = exact_inputs(8, 2048, 64, peaked=True)
    exact, plain = (
        reference_answer(inputs, Negatives.moco(), dtype, temperature=temperature)
        for dtype in (torch.float64, torch.float32)
    )
    loss, gradient = contrast_of_three(inputs, temperature)
    within(loss, plain.contrast.loss, exact.contrast.loss, "loss", 16)
    within(gradient, plain.gradient, exact.gradient, "gradient", 64)


@pytest.mark.parametrize(("temperature", "peaked"), [(0.2, False), (0.07, True), (0.03, True)])
def test_three_products_of_other_rows(within, temperature, peaked):
    """Rows that no half holds exactly: the loss keeps its bound, the gradient is off by u / T, u = 3 / 2^18."""
    q, queue = (normalize(torch.randn(rows, 64, dtype=torch.float64), dim=1).float() for rows in (8, 2048))
    k = normalize(q + 0.1 * torch.randn(8, 64), dim=1)
    if peaked:
        queue[:8] = q
    inputs = Inputs(q, k, queue)
    exact, plain = (
        reference_answer(inputs, Negatives.moco(), dtype, temperature=temperature)
        for dtype in (torch.float64, torch.float32)
    )
    loss, gradient = contrast_of_three(inputs, temperature)
    within(loss, plain.contrast.loss, exact.contrast.loss, "loss", 16)
    if peaked:
        loss, _ = contrast_of_three(inputs, temperature, torch.bfloat16)
        with pytest.raises(AssertionError):
            within(loss, plain.contrast.loss, exact.contrast.loss, "loss", 16)
    error = (gradient.double() - exact.gradient).abs().max().item()
    own = 2 * (plain.gradient.double() - exact.gradient).abs().max().item()
    spare = 3 / 2.0**18 / temperature
    assert error <= own + spare
    assert spare < 1e-3, "a bound that says something"


def test_halves_hold_small_and_large_numbers():
    """To one part in 2^22, or to 2^-25; from 65,520 on they hold nothing, and the result shows it."""
    x = torch.logspace(-8, 4.8, 2000) * (1 + torch.rand(2000))
    x = x[x < 65504]
    high, low = halves(x, torch.float16)
    error = (high.double() + low.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double() * 2.0**-22, torch.tensor(2.0**-25, dtype=torch.float64))).all()
    assert sum(halves(torch.tensor(65536.0), torch.float16)).isnan()


@pytest.mark.parametrize(
    ("setting", "generation", "expected"),
    [("none", 9, "three"), ("none", 8, "ieee"), ("tf32", 8, "tf32"), ("ieee", 9, "ieee")],
)
def test_float32_follows_what_pytorch_is_set_to(setting, generation, expected):
    from synco_fast.kernels.triton import config

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert config.formats_of(torch.float32, generation) == expected
        assert config.formats_of(torch.bfloat16, generation) == "bfloat16"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
