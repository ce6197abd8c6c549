from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.kernels import FAMILIES, Negatives, draw, synthetic_contrast
from synco_fast.kernels.reference import contrast, hard_negatives, synthesise
from synco_fast.kernels.rng import Draw

ALL = Negatives.synco(8, interpolated=5, extrapolated=4, mixed=6, noisy=3, perturbed=2, adversarial=3)
SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}


@pytest.mark.parametrize("extrapolation", ["released", "paper"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_general_form_is_the_formula(family, extrapolation):
    negatives = replace(ALL, extrapolation=extrapolation, sigma=0.3, delta=-0.7, eta=0.2)
    q, n_i, n_j, e = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    t = torch.rand(2, 5, 1, dtype=torch.float64)
    mixture = negatives.mixture(family)
    x = mixture.noise * e + mixture.sign * q.sign()
    for affine, vector in ((mixture.q, q), (mixture.first, n_i), (mixture.second, n_j)):
        x = x + (affine.constant + affine.slope * t) * vector
    torch.testing.assert_close(x, family.vector(q, n_i, n_j, t, e, negatives))
    assert family.paired == (mixture.second != (0, 0))
    assert family.noisy == (mixture.noise != 0)
    slopes = (mixture.q.slope, mixture.first.slope, mixture.second.slope)
    assert family.ranged == any(slopes)


HAND = {
    # q = (1, 0), n_0 = (0.8, 0.6), n_1 = (0, 1): s before normalising, worked out on paper.
    "interpolated": ((0.25 * 1 + 0.75 * 0.8, 0.75 * 0.6), {}),
    "extrapolated": ((1 + 1.25 * (0.8 - 1), 1.25 * 0.6), {}),
    "extrapolated, paper": ((0.8 + 1.25 * (0.8 - 1), 0.6 + 1.25 * 0.6), {"extrapolation": "paper"}),
    "mixed": ((0.25 * 0.8, 0.25 * 0.6 + 0.75 * 1), {}),
    "noisy": ((0.8 + 0.5 * 2, 0.6 - 0.5 * 1), {"sigma": 0.5}),
    "perturbed": ((0.8 + 0.5, 0.6), {"delta": 0.5}),
    "adversarial": ((0.8 + 0.5, 0.6), {"eta": 0.5}),
}


@pytest.mark.parametrize("case", HAND)
def test_each_family_by_hand(case):
    (x, y), changes = HAND[case]
    name = case.split(",")[0]
    family = next(family for family in FAMILIES if family.name == name)
    negatives = replace(Negatives(hard=2, **{name: 1}), **changes)
    drawn = Draw(
        first=torch.tensor([[0]]),
        second=torch.tensor([[1]]) if family.paired else None,
        coefficient=torch.tensor([[1.25 if name == "extrapolated" else 0.25]]) if family.ranged else None,
        noise=torch.tensor([[[2.0, -1.0]]]) if family.noisy else None,
    )
    hard = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])
    found = synthesise(torch.tensor([[1.0, 0.0]]), hard, negatives, {name: drawn})[name]
    length = math.hypot(x, y)
    torch.testing.assert_close(found, torch.tensor([[[x / length, y / length]]]))


def test_loss_by_hand():
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    queue = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    result = synthetic_contrast(q, k, queue, Negatives.moco(), temperature=0.5, seed=0, step=0, backend="reference")
    expected = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6) + 1))
    assert result.loss.item() == pytest.approx(expected)
    assert result.statistics.positive.item() == pytest.approx(0.6)
    assert (result.statistics.rank.item(), result.statistics.queue_rank.item()) == (1, 1)
    assert result.statistics.hard.isnan().all()
    assert result.statistics.synthetic.isnan().all()
    assert result.statistics.synthetic.shape == (1, len(FAMILIES))


def test_the_largest_in_queue_order_and_masked_keys_last():
    nothing = -math.inf
    similarity = torch.tensor(
        [[0.1, 0.7, 0.5, 0.5, 0.7, 0.5], [0.0] * 6, [nothing, 0.2, nothing, 0.3, nothing, 0.1], [nothing] * 6]
    )
    values, index = hard_negatives(similarity, 4)
    assert index.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3], [1, 3, 5, 0], [0, 1, 2, 3]]
    assert values[0].tolist() == pytest.approx([0.7, 0.5, 0.5, 0.7])
    assert values[2].tolist() == pytest.approx([0.2, 0.3, 0.1, nothing])


@pytest.mark.parametrize("extrapolation", ["released", "paper"])
def test_gradient_against_finite_differences(extrapolation):
    # The synthetic negatives are constants, so q moves only in the products: the loss is rebuilt with them held.
    q, k, queue = (normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (3, 3, 12))
    negatives = replace(ALL, extrapolation=extrapolation)
    similarity = q @ queue.T
    _, index = hard_negatives(similarity, 8)
    draws = draw(negatives, 3, 6, seed=3, step=7, dtype=torch.float64)
    vectors = torch.cat(list(synthesise(q, queue[index], negatives, draws).values()), dim=1)

    def held(q):
        logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T, torch.einsum("bd,bnd->bn", q, vectors)), dim=1)
        return logits.div(0.2).logsumexp(1) - logits[:, 0] / 0.2

    leaf = q.clone().requires_grad_()
    result = contrast(leaf, k, queue, negatives, **SETTINGS)
    torch.testing.assert_close(result.loss, held(q))
    (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
    step = 1e-6
    for column in range(6):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[column] = step
        slope = (held(q + moved) - held(q - moved)) / (2 * step)
        torch.testing.assert_close(gradient[:, column], slope, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(lambda q: contrast(q, k, queue, Negatives(hard=4), **SETTINGS).loss, leaf)


def test_gradient_reaches_q_only():
    q, k, queue = (normalize(torch.randn(n, 6), dim=1).requires_grad_() for n in (3, 3, 12))
    result = synthetic_contrast(q, k, queue, ALL, **SETTINGS, backend="reference")
    result.loss.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().min() > 0
    assert k.grad is None
    assert queue.grad is None
    assert not any(value.requires_grad for value in result.statistics)


def test_synthetic_negatives_only_add_to_the_loss():
    q, k, queue = (normalize(torch.randn(n, 6), dim=1) for n in (3, 3, 12))
    plain = contrast(q, k, queue, Negatives.moco(), **SETTINGS)
    for family in FAMILIES:
        more = contrast(q, k, queue, Negatives(hard=8, **{family.name: 1}), **SETTINGS)
        assert (more.loss > plain.loss).all()
        assert torch.equal(more.statistics.queue_rank, plain.statistics.queue_rank)


def test_mask_takes_the_same_image_away():
    q, k, queue = (normalize(torch.randn(n, 6), dim=1) for n in (3, 3, 12))
    image_ids = torch.tensor([4, 5, 6])
    queue_ids = torch.tensor([4, 4, 5, -1, 9, 9, 9, 9, 9, 9, 9, 9])
    masked = contrast(q, k, queue, ALL, **SETTINGS, image_ids=image_ids, queue_ids=queue_ids)
    for row, kept in enumerate(([2, *range(3, 12)], [0, 1, *range(3, 12)], list(range(12)))):
        alone = contrast(q[row : row + 1], k[row : row + 1], queue[kept], ALL, **SETTINGS, first_row=row)
        torch.testing.assert_close(masked.loss[row], alone.loss[0])
        for found, expected in zip(masked.statistics, alone.statistics, strict=True):
            torch.testing.assert_close(found[row], expected[0])


def test_mask_leaves_fewer_than_n_or_none():
    q, k, queue = (normalize(torch.randn(n, 6), dim=1) for n in (2, 2, 12))
    image_ids, queue_ids = torch.tensor([1, 2]), torch.tensor([1] * 12)
    queue_ids[:3] = 2
    few = contrast(q, k, queue, ALL, **SETTINGS, image_ids=image_ids, queue_ids=queue_ids)
    assert few.loss.isfinite().all()
    assert few.statistics.hard[0].item() == pytest.approx((q[0] @ queue[:3].T).mean().item(), abs=1e-6)
    none = contrast(q, k, queue, ALL, **SETTINGS, image_ids=image_ids, queue_ids=torch.tensor([1] * 12))
    assert none.loss[0].item() == 0
    assert none.statistics.hard[0].isnan()
    assert none.statistics.synthetic[0].isnan().all()
    assert none.loss[1] > 0


def test_nan_in_one_row_stays_there():
    q, k, queue = (normalize(torch.randn(n, 6), dim=1) for n in (4, 4, 12))
    whole = contrast(q, k, queue, ALL, **SETTINGS)
    q[1, 2] = k[2, 0] = torch.nan
    broken = contrast(q, k, queue, ALL, **SETTINGS)
    assert broken.loss.isnan().tolist() == [False, True, True, False]
    assert torch.equal(broken.loss[[0, 3]], whole.loss[[0, 3]])


def _good() -> dict:
    q, k, queue = (normalize(torch.randn(n, 6), dim=1) for n in (3, 3, 12))
    return {"q": q, "k": k, "queue": queue, "negatives": ALL, **SETTINGS}


IDS = {"image_ids": torch.arange(3), "queue_ids": torch.arange(12)}


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        (
            {"q": torch.ones(3, 6, dtype=torch.int64)},
            TypeError,
            "q: found torch.int64, expected a floating-point tensor",
        ),
        ({"k": [1.0]}, TypeError, "k: found list, expected a floating-point tensor"),
        ({"q": torch.ones(6)}, ValueError, r"q: found shape \(6,\), expected two dimensions, none of them 0"),
        ({"queue": torch.ones(0, 6)}, ValueError, r"queue: found shape \(0, 6\), expected two dimensions, none of"),
        ({"queue": torch.ones(12, 6, device="meta")}, TypeError, "queue: found on meta, expected cpu, the device of q"),
        ({"k": torch.ones(2, 6)}, ValueError, r"k: found shape \(2, 6\), expected \(3, 6\), the shape of q"),
        ({"k": torch.ones(3, 6).double()}, TypeError, "k: found torch.float64, expected torch.float32, the dtype of q"),
        ({"queue": torch.ones(12, 5)}, ValueError, r"queue: found shape \(12, 5\), expected \(K, 6\), as wide as q"),
        ({"negatives": 3}, TypeError, "negatives: found int, expected a synco_fast.kernels.Negatives"),
        (
            {"negatives": Negatives(hard=13)},
            ValueError,
            "negatives.hard: found 13, expected 0 to 12, the queue's length",
        ),
        ({"temperature": 0.0}, ValueError, "temperature: found 0.0, expected a finite number above 0"),
        ({"temperature": math.nan}, ValueError, "temperature: found nan, expected a finite number above 0"),
        ({"seed": -1}, ValueError, "seed: found -1, expected a whole number from 0 to 4294967295"),
        ({"step": 2**32}, ValueError, "step: found 4294967296, expected a whole number from 0 to 4294967295"),
        ({"step": torch.tensor(1, device="meta")}, TypeError, "step: found on meta, expected cpu, the device of q"),
        ({"step": torch.tensor([1])}, ValueError, r"step: found torch.int64 of shape \(1,\), expected a 0-dimensional"),
        ({"first_row": 2**32 - 2}, ValueError, "first_row: found 4294967294, expected a whole number from 0 to 42949"),
        ({"image_ids": torch.arange(3)}, ValueError, "queue_ids: found None, expected a tensor where its counterpart"),
        (IDS | {"image_ids": torch.ones(3)}, TypeError, "image_ids: found torch.float32 on cpu, expected int64 on cpu"),
        (IDS | {"queue_ids": torch.arange(3)}, ValueError, r"queue_ids: found shape \(3,\), expected \(12,\)"),
        ({"backend": "fast"}, ValueError, "backend: found 'fast', expected auto, reference, blockwise, triton"),
    ],
)
def test_bad_input_is_one_line_that_names_it(changes, error, line):
    with pytest.raises(error, match=f"^{line}") as caught:
        synthetic_contrast(**_good() | changes)
    assert "\n" not in str(caught.value)
