"""The loss and its gradient against float64. What takes minutes in full is run in turn (`tests.support.rotation`)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from synco_fast.kernels import Negatives, synthetic_contrast
from synco_fast.kernels.triton import config, contrast_and_gradient, launch
from tests.support.answers import compare
from tests.support.devices import devices_entered
from tests.support.rotation import in_turn, todays

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
#: Of 33, the last of two programs has one fewer, which is a whole block.
COUNTS = {"interpolated": 33, "extrapolated": 11, "mixed": 12, "noisy": 5, "perturbed": 4, "adversarial": 3}


def some(hard: int, **changes) -> Negatives:
    return replace(Negatives(hard=hard, **COUNTS), **changes)


def check(make, answer, within, shape, negatives, *, dtype=torch.float32, peaked=False, **arguments):
    inputs = make(*shape, dtype, peaked=peaked).guarded()
    settings = SETTINGS | arguments
    found = contrast_and_gradient(*inputs, negatives, **settings)
    exact = answer(inputs, negatives, **settings)
    plain = answer(inputs, negatives, torch.float32, **settings)
    compare(within, found, plain, exact, 16)


# One row, rows beyond a tile, keys no multiple of a tile; widths below, at and above a tile and a chunk.
SHAPES = [(1, 64, 64, 1), (2, 257, 16, 30), (66, 130, 96, 20), (2, 300, 128, 63), (2, 130, 256, 130), (2, 100, 130, 7)]


@pytest.mark.parametrize("shape", todays(SHAPES, 2), ids=str)
def test_shapes(make, answer, within, shape):
    counts = {"noisy": 2, "mixed": 3} if shape[0] > 60 else COUNTS
    check(make, answer, within, shape[:3], Negatives(hard=shape[3], **counts))


@pytest.mark.parametrize("dtype", todays(DTYPES), ids=str)
def test_a_queue_that_ends_within_a_tile(make, answer, within, dtype):
    # One key beyond the last whole tile of 32, 64 or 128.
    check(make, answer, within, (1, 4097, 16), Negatives(hard=63, mixed=2), dtype=dtype)


def test_a_last_split_with_fewer_whole_tiles(make, answer, within, monkeypatch):
    # Five tiles of 32 keys for three splits: two tiles each, and one for the last. Few rows, to save time.
    monkeypatch.setitem(config.TILES, ("ieee", True), replace(config.TILES["ieee", True], rows=2))
    monkeypatch.setattr(launch, "splits_of", lambda *_: 3)
    check(make, answer, within, (2, 160, 16), Negatives(hard=40, mixed=2))


@pytest.mark.parametrize(
    ("dtype", "softmax"),
    todays(list(itertools.product(DTYPES, [(True, 0.07), (False, 0.2), (True, 0.03)])), 4),
    ids=str,
)
def test_dtypes_and_softmax(make, answer, within, dtype, softmax):
    peaked, temperature = softmax
    check(make, answer, within, (2, 200, 64), some(20), dtype=dtype, peaked=peaked, temperature=temperature)


FAMILIES = [*((name, "released") for name in (*COUNTS, "none", "moco")), ("extrapolated", "paper")]


# In bfloat16 tensor cores sum those without noise and sign.
@pytest.mark.parametrize(
    ("family", "dtype"), todays(list(itertools.product(FAMILIES, [torch.float32, torch.bfloat16])), 6), ids=str
)
def test_each_family_alone(make, answer, within, family, dtype):
    name, extrapolation = family
    alone = Negatives(hard=0 if name == "moco" else 9, extrapolation=extrapolation, sigma=0.05, delta=-0.3, eta=0.02)
    if name in COUNTS:
        alone = replace(alone, **{name: COUNTS[name]})
    check(make, answer, within, (2, 130, 64), alone, dtype=dtype, peaked=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask(make, answer, within, dtype):
    # Rows 0 and 3 may use most keys, then fewer than N, then none.
    image_ids = torch.tensor([7, 2**40, -5, 7])
    queue_ids = torch.full((150,), -1)
    queue_ids[::3], queue_ids[1::7] = 2**40, 7
    inputs = make(4, 150, 32, dtype)
    few = torch.where(torch.arange(150) < 145, 7, queue_ids)
    for ids in (queue_ids, few, torch.full_like(few, 7)):
        masks = {"image_ids": image_ids, "queue_ids": ids}
        found = contrast_and_gradient(*inputs, some(12), **SETTINGS, **masks)
        exact, plain = (answer(inputs, some(12), one, **SETTINGS, **masks) for one in (torch.float64, torch.float32))
        within(found.loss, plain.contrast.loss, exact.contrast.loss, "loss", 16)
        within(found.gradient, plain.gradient, exact.gradient, "gradient", 16)
        for name in ("hard", "synthetic"):
            expected = getattr(exact.contrast.statistics, name)
            torch.testing.assert_close(getattr(found, name).double(), expected, rtol=0, atol=1e-6, equal_nan=True)
        assert torch.equal(found.queue_rank, exact.contrast.statistics.queue_rank)


@in_turn(0, 2)
def test_nan_rows_stay_alone(make):
    inputs = make(4, 200, 32)
    whole = contrast_and_gradient(*inputs, some(20), **SETTINGS)
    inputs.q[1, 3] = inputs.k[2, 0] = torch.nan
    broken = contrast_and_gradient(*inputs, some(20), **SETTINGS)
    assert broken.loss.isnan().tolist() == [False, True, True, False]
    assert broken.gradient[[1, 2]].isnan().all()
    for before, after in zip(whole, broken, strict=True):
        assert torch.equal(after[[0, 3]], before[[0, 3]])
    inputs.queue[17, 0] = torch.nan
    assert contrast_and_gradient(*inputs, some(20), **SETTINGS).loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_of_length_zero(make, dtype):
    inputs = make(1, 1, 16, dtype)
    inputs = inputs._replace(queue=-inputs.q)
    negatives = Negatives(hard=1, interpolated=6, interpolated_range=(0.5, 0.5))
    found = contrast_and_gradient(*inputs, negatives, **SETTINGS)
    expected = synthetic_contrast(*inputs.to(torch.float32), negatives, **SETTINGS, backend="reference")
    assert found.synthetic[0, 0].item() == 0
    torch.testing.assert_close(found.loss, expected.loss)


@in_turn(1, 2)
def test_step_on_the_device_and_global_rows(make):
    inputs = make(4, 200, 32)
    whole = contrast_and_gradient(*inputs, some(20), **SETTINGS)
    tensor = contrast_and_gradient(*inputs, some(20), **SETTINGS | {"step": torch.tensor(7)})
    assert torch.equal(whole.loss, tensor.loss)
    part = contrast_and_gradient(inputs.q[2:], inputs.k[2:], inputs.queue, some(20), **SETTINGS, first_row=2)
    torch.testing.assert_close(whole.loss[2:], part.loss)
    torch.testing.assert_close(whole.gradient[2:], part.gradient)


def test_launches_go_to_the_device_of_q(make, monkeypatch):
    current, launched, true = devices_entered(monkeypatch), [], launch._launch

    monkeypatch.setattr(launch, "_launch", lambda *arguments: launched.append(list(current)) or true(*arguments))
    inputs = make(2, 64, 16)
    contrast_and_gradient(*inputs, some(4), **SETTINGS)
    assert len(launched) == 1
    assert launched[0][0] is inputs.q


@in_turn(1, 2)
def test_rows_beyond_one_series_of_launches(make, answer, within, monkeypatch):
    monkeypatch.setattr(launch, "_ROWS", 3)
    check(make, answer, within, (5, 130, 32), some(9), image_ids=torch.arange(5), queue_ids=torch.arange(130) % 11)


def test_repeats_are_bit_equal(make):
    inputs = make(2, 300, 64)
    first, second = (contrast_and_gradient(*inputs, some(30), **SETTINGS) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@in_turn(0, 2)
def test_the_operator_takes_the_kernels(make, answer, within):
    inputs = make(3, 200, 32)
    q = inputs.q.clone().requires_grad_()
    loss = synthetic_contrast(q, inputs.k, inputs.queue, some(20), **SETTINGS, backend="triton").loss
    assert torch.equal(loss.detach(), contrast_and_gradient(*inputs, some(20), **SETTINGS).loss)
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    exact, plain = (answer(inputs, some(20), dtype, **SETTINGS) for dtype in (torch.float64, torch.float32))
    within(gradient, plain.gradient, exact.gradient, "gradient", 16)
