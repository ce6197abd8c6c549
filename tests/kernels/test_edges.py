"""Slips that stay within every tolerance on ordinary inputs: each is given the input on which it shows."""

from __future__ import annotations

import math

import pytest
import torch

from synco_fast.kernels import Negatives, blockwise, draw, mixing, synthetic_contrast, topk
from synco_fast.kernels.blockwise import Budget, contrast_and_gradient
from synco_fast.kernels.reference import contrast, hard_negatives
from synco_fast.kernels.rng import philox, uniform
from synco_fast.kernels.validation import exact_inputs

SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "blockwise"])
FORMS = pytest.mark.parametrize("by_vectors", [False, True], ids=["scalars", "vectors"])


def gradient_of(q, k, queue, negatives, **settings):
    leaf = q.clone().requires_grad_()
    loss = contrast(leaf, k, queue, negatives, **SETTINGS | settings).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


# The draws.


@pytest.mark.parametrize("family", ["interpolated", "extrapolated", "mixed"])
def test_coefficients_of_float64_are_float64(family):
    found = draw(Negatives(hard=4, **{family: 50}), 3, 8, seed=3, step=7, dtype=torch.float64)[family].coefficient
    low, high = Negatives().range_of(next(f for f in Negatives.synco().active() if f.name == family))
    number = {"interpolated": 1, "extrapolated": 2, "mixed": 3}[family]
    word = philox((torch.arange(3)[:, None], torch.arange(50), number, 0), (3, 7))[0]
    assert torch.equal(found, low + (high - low) * uniform(word, torch.float64))


@BACKENDS
def test_seed_step_and_first_row_reach_the_draws(backend):
    inputs, negatives = exact_inputs(3, 200, 16), Negatives(hard=20, mixed=9)
    for change in ({}, {"seed": 4}, {"step": 8}, {"first_row": 5}):
        found = synthetic_contrast(*inputs, negatives, **SETTINGS | change, backend=backend)
        torch.testing.assert_close(found.loss, contrast(*inputs, negatives, **SETTINGS | change).loss)
        if change:
            assert not torch.equal(found.loss, synthetic_contrast(*inputs, negatives, **SETTINGS, backend=backend).loss)


# Ranks: a negative as similar as the positive is not more similar.


@pytest.mark.parametrize("form", ["reference", "scalars", "vectors"])
def test_ties_with_the_positive_are_not_above_it(form):
    unit = torch.zeros(1, 16)
    unit[0, 0] = 1
    q = exact_inputs(4, 1, 16).q
    k, queue = unit.expand(4, -1).contiguous(), unit.expand(30, -1).contiguous()
    queue[20:] *= -1
    # With delta = 0 the synthetic negatives are the keys themselves.
    negatives = Negatives(hard=10, perturbed=8, delta=0.0)
    above = (q @ queue.T > q[:, :1]).sum(dim=1)
    assert above.unique().tolist() == [0, 10]
    if form == "reference":
        found = contrast(q, k, queue, negatives, **SETTINGS).statistics
    else:
        found = contrast_and_gradient(q, k, queue, negatives, **SETTINGS, by_vectors=form == "vectors")
    assert torch.equal(found.queue_rank, above)
    # Where the keys that point away are the similar ones, all synthetic negatives come from them.
    assert torch.equal(found.rank, above + 8 * (above > 0))


# The loss and its gradient, in float32, where the positive is nearly everything.


@FORMS
def test_a_tiny_loss_keeps_its_digits(by_vectors):
    q, k, queue = (tensor.clone() for tensor in exact_inputs(3, 50, 32))
    k[:] = q
    queue -= (queue @ q[0])[:, None] * q[0]
    expected, gradient = gradient_of(q.double(), k.double(), queue.double(), Negatives(), temperature=0.05)
    assert 0 < expected[0] < 1e-6
    found = contrast_and_gradient(q, k, queue, Negatives(), **SETTINGS | {"temperature": 0.05}, by_vectors=by_vectors)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.gradient[0].double(), gradient[0], rtol=1e-3, atol=1e-4 * gradient[0].abs().max())


@FORMS
def test_a_low_temperature_keeps_the_digits_of_differences(by_vectors):
    # s / T is near 75,000, where float32 has two digits behind the point; the differences of s are exact.
    q, k, queue = torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(7, 16)
    q[0, 0], k[0, 0] = 1, 0.75
    queue[:, 0] = 0.75 + torch.arange(-3, 4) * 2.0**-17
    settings = {"temperature": 1e-5}
    expected, gradient = gradient_of(q.double(), k.double(), queue.double(), Negatives(), **settings)
    found = contrast_and_gradient(q, k, queue, Negatives(), **SETTINGS | settings, by_vectors=by_vectors)
    torch.testing.assert_close(found.loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-2, atol=0)


# Synthetic vectors of length 0 or nearly.


@FORMS
def test_nothing_of_nothing_is_nothing(by_vectors):
    # q = 0 and n = 0: no term cancels another, there is just none.
    q, queue = torch.zeros(2, 16), torch.zeros(40, 16)
    k = exact_inputs(2, 1, 16).k
    negatives = Negatives(hard=4, interpolated=3, extrapolated=3, mixed=3, perturbed=3, adversarial=3)
    found = contrast_and_gradient(q, k, queue, negatives, **SETTINGS, by_vectors=by_vectors)
    expected, gradient = gradient_of(q, k, queue, negatives)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.gradient, gradient)


def test_cancelled_slots_beyond_one_block(monkeypatch):
    monkeypatch.setattr(mixing, "_AT_ONCE", 5)
    q = exact_inputs(3, 1, 64).q.double()
    q = q / q.norm(dim=1, keepdim=True)
    queue = -q[:1] + 1e-6 * torch.randn(1, 64, dtype=torch.float64)
    negatives = Negatives(hard=1, interpolated=17, interpolated_range=(0.5, 0.5))
    q = q[:1].expand(3, -1).contiguous()
    expected, gradient = gradient_of(q, q, queue, negatives)
    found = contrast_and_gradient(q, q, queue, negatives, **SETTINGS)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-11)


def test_a_narrow_queue_in_more_than_one_block(monkeypatch):
    q, k, queue = exact_inputs(3, 300, 32)
    queue = queue.bfloat16()
    negatives = Negatives(hard=50, mixed=40, perturbed=9)
    expected = contrast_and_gradient(q, k, queue.float(), negatives, **SETTINGS)
    monkeypatch.setattr(blockwise, "CPU", Budget(2 << 20, 7 * 3 * 32 * 4, 16 << 20))
    found = contrast_and_gradient(q, k, queue, negatives, **SETTINGS)
    torch.testing.assert_close(found.gradient, expected.gradient)


# The selection.


def select(similarity, hard):
    """Q^N by way of candidates, all of which lie above the threshold."""
    candidates = topk.Candidates(torch.full((len(similarity), 1), -9.0), similarity.shape[1])
    for begin in range(0, similarity.shape[1], 64):
        candidates.add(similarity[:, begin : begin + 64].contiguous(), begin)
    values, index, failed = candidates.select(hard, torch.full((len(similarity),), hard))
    assert not failed.any()
    return values, index


def test_zeros_of_both_signs_are_one():
    similarity = torch.full((2, 300), -0.5)
    similarity[:, 10:50] = torch.tensor([-0.0, 0.0]).repeat(20)
    assert torch.equal(select(similarity, 11)[1], hard_negatives(similarity, 11)[1])
    assert select(similarity, 11)[1][0].tolist() == list(range(10, 21))


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001], ids=hex)
def test_nan_of_either_sign_comes_first(bits):
    similarity = torch.linspace(-1, 1, 300).repeat(2, 1)
    similarity[:, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert similarity[:, 7].isnan().all()
    index = select(similarity, 5)[1]
    assert index.tolist() == [[7, 296, 297, 298, 299]] * 2
    assert torch.equal(index, hard_negatives(similarity, 5)[1])


@pytest.mark.parametrize("words", [1, 255, 256, 257, 511, 1024])
def test_marks_are_counted_without_a_carry(words):
    marks = torch.ones(2, 8 * words, dtype=torch.bool)
    marks[1, ::3] = False
    assert topk.count_marks(marks).tolist() == marks.sum(dim=1).tolist()
    assert topk.count_marks(marks[:, :-1].contiguous()).tolist() == marks[:, :-1].sum(dim=1).tolist()


def test_the_sample_heeds_the_mask():
    # The mask takes the most similar tenth of the keys: a threshold among those would let nothing through.
    q, k, queue = exact_inputs(4, 6000, 32)
    q = q[:1].expand(4, -1).contiguous()
    queue_ids = torch.full((6000,), -1)
    queue_ids[(queue @ q[0]).topk(600).indices] = 5
    masks = {"image_ids": torch.tensor([5, 5, 6, 6]), "queue_ids": queue_ids}
    found = contrast_and_gradient(q, k, queue, Negatives(hard=20), **SETTINGS, **masks)
    assert found.fallback.tolist() == [0, 0, 0, 0]
    expected = contrast(q, k, queue, Negatives(hard=20), **SETTINGS, **masks).statistics
    torch.testing.assert_close(found.hard, expected.hard)


@FORMS
def test_a_masked_key_that_is_nan(by_vectors):
    """Its row's loss is whole; its gradient is not, as documented: weight 0 times NaN is NaN."""
    inputs = exact_inputs(3, 60, 16)
    inputs.queue[7] = math.nan
    ids = {
        "image_ids": torch.tensor([4, 5, 6]),
        "queue_ids": torch.arange(60).remainder(9).masked_fill(torch.arange(60) == 7, 4),
    }
    found = contrast_and_gradient(*inputs, Negatives(hard=5, mixed=4), **SETTINGS, **ids, by_vectors=by_vectors)
    expected, gradient = gradient_of(*inputs, Negatives(hard=5, mixed=4), **ids)
    assert found.loss.isnan().tolist() == expected.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(found.loss[0], expected[0])
    assert found.gradient.isnan().all(dim=1).tolist() == gradient.isnan().all(dim=1).tolist() == [True, True, True]
