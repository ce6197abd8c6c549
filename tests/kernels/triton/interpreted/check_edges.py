"""The edges of tests/kernels/test_edges.py that concern the kernels."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels import Negatives
from synco_fast.kernels.reference import contrast
from synco_fast.kernels.triton import contrast_and_gradient
from synco_fast.kernels.validation import exact_inputs

SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
#: In bfloat16 tensor cores sum these synthetic negatives.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# Without a threshold, and with one.
@pytest.mark.parametrize("length", [30, 600])
def test_ties_with_the_positive_are_not_above_it(length):
    q = exact_inputs(2, 1, 16).q
    q[0, 0], q[1, 0] = 0.5, -0.25
    unit = torch.zeros(1, 16)
    unit[0, 0] = 1
    k, queue = unit.expand(2, -1).contiguous(), unit.expand(length, -1).contiguous()
    queue[-10:] *= -1
    found = contrast_and_gradient(q, k, queue, Negatives(hard=10, perturbed=8, delta=0.0), **SETTINGS)
    assert found.queue_rank.tolist() == [0, 10]
    assert found.rank.tolist() == [0, 18]


@DTYPES
def test_short_vectors_have_length_1_too(dtype):
    # x = q / 2^18: a floor under |x| far above the smallest number would shorten s.
    q = torch.zeros(1, 16, dtype=dtype)
    q[0, 3] = 1
    queue = -q * (1 - 2.0**-8)
    negatives = Negatives(hard=1, interpolated=4, interpolated_range=(0.5 - 2.0**-10, 0.5 - 2.0**-10))
    found = contrast_and_gradient(q, q, queue, negatives, **SETTINGS)
    expected = contrast(q.float(), q.float(), queue.float(), negatives, **SETTINGS)
    assert expected.statistics.synthetic[0, 0].item() == 1
    assert found.synthetic[0, 0].item() == 1
    torch.testing.assert_close(found.loss, expected.loss)


@DTYPES
def test_mixtures_of_short_keys_have_length_1_too(dtype):
    q, k, queue = exact_inputs(1, 12, 16, dtype)
    queue *= 2.0**-14
    negatives = Negatives(hard=12, mixed=9, perturbed=5, delta=0.0)
    found = contrast_and_gradient(q, k, queue, negatives, **SETTINGS)
    expected = contrast(q.float(), k.float(), queue.float(), negatives, **SETTINGS)
    torch.testing.assert_close(found.synthetic, expected.statistics.synthetic, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.loss, expected.loss)


@DTYPES
def test_coefficients_stay_below_the_end_of_their_range(dtype):
    # x = (2 t - 1) q, and a quarter of the draws would round up to t = 1/2, where nothing is left of x.
    q = torch.zeros(1, 16, dtype=dtype)
    q[0, 3] = 1
    negatives = Negatives(hard=1, interpolated=64, interpolated_range=(0.5 - 2.0**-24, 0.5))
    found = contrast_and_gradient(q, q, -q, negatives, **SETTINGS)
    expected = contrast(q.float(), q.float(), -q.float(), negatives, **SETTINGS)
    assert expected.statistics.synthetic[0, 0].item() == -1
    assert found.synthetic[0, 0].item() == -1
