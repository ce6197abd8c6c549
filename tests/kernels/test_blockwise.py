from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.kernels import FAMILIES, Negatives, blockwise, mixing, ops, topk
from synco_fast.kernels.blockwise import contrast_and_gradient
from synco_fast.kernels.reference import contrast, hard_negatives
from synco_fast.kernels.validation import random_cases, validate
from tests.support.answers import compare

SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
COUNTS = {"interpolated": 40, "extrapolated": 33, "mixed": 37, "noisy": 9, "perturbed": 8, "adversarial": 7}
FORMS = pytest.mark.parametrize("by_vectors", [False, True], ids=["scalars", "vectors"])


def some(hard: int, **changes) -> Negatives:
    return replace(Negatives(hard=hard, **COUNTS), **changes)


def check(make, answer, within, shape, negatives, *, dtype=torch.float32, by_vectors=False, peaked=False, **arguments):
    """The blockwise form against the float64 reference, measured by the error of the reference in float32 (or 64)."""
    inputs = make(*shape, dtype, peaked=peaked)
    settings = SETTINGS | arguments
    found = contrast_and_gradient(*inputs, negatives, **settings, by_vectors=by_vectors)
    exact = answer(inputs, negatives, **settings)
    plain = answer(inputs, negatives, torch.promote_types(dtype, torch.float32), **settings)
    assert found.loss.dtype == plain.contrast.loss.dtype
    # In float64 the plain form is its own measure, so its error is 0; 1 / T magnifies that of a similarity.
    units = 8 if dtype != torch.float64 else 8 / settings["temperature"]
    compare(within, found, plain, exact, units)


SHAPES = [(1, 4096, 64, 64), (7, 4097, 96, 1000), (255, 700, 16, 1), (3, 5000, 256, 63), (300, 130, 128, 130)]


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(make, answer, within, shape, by_vectors):
    check(make, answer, within, shape[:3], some(shape[3]), by_vectors=by_vectors)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_dtypes_and_softmax(make, answer, within, dtype, peaked, temperature, by_vectors):
    arguments = {"dtype": dtype, "peaked": peaked, "temperature": temperature, "by_vectors": by_vectors}
    check(make, answer, within, (17, 4100, 64), some(128), **arguments)


@FORMS
@pytest.mark.parametrize("extrapolation", ["released", "paper"])
@pytest.mark.parametrize("name", [*COUNTS, "none"])
def test_each_family_alone(make, answer, within, name, extrapolation, by_vectors):
    alone = Negatives(hard=100, extrapolation=extrapolation, sigma=0.05, delta=-0.3, eta=0.02)
    if name != "none":
        alone = replace(alone, **{name: COUNTS[name]})
    check(make, answer, within, (9, 4096, 64), alone, by_vectors=by_vectors, peaked=True)


@pytest.mark.parametrize(
    "case", random_cases(40, [torch.float32, torch.float64, torch.bfloat16, torch.float16]), ids=str
)
def test_random_shapes(case, monkeypatch):
    for by_vectors in (False, True):
        with monkeypatch.context() as patch:
            true = blockwise.contrast_and_gradient
            form = functools.partial(true, by_vectors=by_vectors)
            patch.setattr(ops.blockwise, "contrast_and_gradient", form)
            (verdict,) = validate(["blockwise"], [case], torch.device("cpu"))
        assert not verdict.misses, verdict.as_dict()


@FORMS
def test_moco(make, answer, within, by_vectors):
    check(make, answer, within, (9, 4096, 64), Negatives.moco(), by_vectors=by_vectors)


@FORMS
def test_unlike_dtypes_compute_in_the_wider(make, answer, within, by_vectors):
    inputs = make(9, 4096, 64)
    found = contrast_and_gradient(
        inputs.q, inputs.k, inputs.queue.bfloat16(), some(64), **SETTINGS, by_vectors=by_vectors
    )
    exact, plain = answer(inputs, some(64), **SETTINGS), answer(inputs, some(64), torch.float32, **SETTINGS)
    assert found.loss.dtype == torch.float32
    within(found.loss, plain.contrast.loss, exact.contrast.loss, "loss")
    within(found.gradient, plain.gradient, exact.gradient, "gradient")


@FORMS
def test_mask(make, answer, within, by_vectors):
    # Row 0 may use nothing, row 1 fewer keys than N, the others nearly all.
    image_ids = torch.arange(8)
    queue_ids = torch.zeros(600, dtype=torch.int64)
    inputs = make(8, 600, 32)
    check(make, answer, within, (8, 600, 32), some(64), by_vectors=by_vectors, image_ids=image_ids, queue_ids=queue_ids)
    queue_ids = torch.ones(600, dtype=torch.int64)
    queue_ids[::40] = torch.arange(15)
    found = contrast_and_gradient(
        *inputs, some(64), **SETTINGS, image_ids=image_ids, queue_ids=queue_ids, by_vectors=by_vectors
    )
    exact = answer(inputs, some(64), **SETTINGS, image_ids=image_ids, queue_ids=queue_ids)
    torch.testing.assert_close(found.loss.double(), exact.contrast.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=1e-4, atol=1e-6)
    check(make, answer, within, (8, 600, 32), some(64), by_vectors=by_vectors, image_ids=image_ids, queue_ids=queue_ids)


@FORMS
def test_nothing_available_is_a_zero_loss_with_a_zero_gradient(make, by_vectors):
    same = torch.zeros(3, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    found = contrast_and_gradient(
        *make(3, 50, 16), some(10), **SETTINGS, image_ids=same[0], queue_ids=same[1], by_vectors=by_vectors
    )
    assert found.loss.eq(0).all()
    assert found.gradient.eq(0).all()
    assert found.hard.isnan().all()
    assert found.synthetic.isnan().all()
    assert found.rank.eq(0).all()


def chosen(inputs, hard: int, by_vectors: bool = False, **arguments):
    """Q^N as the blockwise form finds it, row by row."""
    rows = blockwise._Rows(
        inputs.q,
        inputs.k,
        inputs.queue,
        inputs.queue.square().sum(1),
        Negatives(hard=hard),
        0.2,
        arguments.get("image_ids"),
        arguments.get("queue_ids"),
    )
    rows.scan(by_vectors)
    return rows.hard, rows.index


def clustered(inputs):
    """The hard keys of all rows in one run that the sample at a stride hardly meets."""
    near = inputs.q[:1] + (torch.randn(600, inputs.q.shape[1]) / 16).mul(64).round() / 128
    return inputs._replace(queue=torch.cat((inputs.queue[:4000], near, inputs.queue[4000:])))


WORST = {
    "all equal": lambda inputs: inputs._replace(queue=inputs.queue[:1].expand(9000, -1).contiguous()),
    "two values": lambda inputs: inputs._replace(queue=inputs.queue[:2].repeat(4500, 1)),
    "all in one place": clustered,
    "sample sees only the hard": lambda inputs: inputs._replace(
        queue=torch.where(torch.arange(9000)[:, None] % 2 == 0, inputs.queue[:9000], -inputs.q[:1])
    ),
    "sample sees only the easy": lambda inputs: inputs._replace(
        queue=torch.where(torch.arange(9000)[:, None] % 2 == 1, inputs.queue[:9000], -inputs.q[:1])
    ),
    "zero rows": lambda inputs: inputs._replace(queue=inputs.queue * (torch.rand(9000, 1) < 0.01)),
}


@FORMS
@pytest.mark.parametrize("hard", [1, 63, 1024, 9000])
@pytest.mark.parametrize("case", WORST)
def test_selection_is_exact(make, case, hard, by_vectors):
    inputs = WORST[case](make(4, 9000, 32))
    values, index = chosen(inputs, hard, by_vectors)
    expected, order = hard_negatives(inputs.q @ inputs.queue.T, hard)
    assert torch.equal(values, expected)
    assert torch.equal(index, order)


def test_selection_with_more_candidates_than_expected_and_with_fewer(make, monkeypatch):
    inputs = make(6, 9000, 32)
    expected, order = hard_negatives(inputs.q @ inputs.queue.T, 100)
    whole = []
    original = topk.select_whole_rows
    monkeypatch.setattr(blockwise, "select_whole_rows", lambda *a: whole.append(len(a[1])) or original(*a))
    assert torch.equal(chosen(inputs, 100)[1], order)
    assert whole == [], "the estimate should hold for every row here"
    for rank in (2, 4000):
        monkeypatch.setattr(blockwise, "stride_and_rank", lambda length, hard, rank=rank: (2, rank))
        monkeypatch.setattr(topk, "_EXCESS", 50 if rank == 2 else 0.5)
        values, index = chosen(inputs, 100)
        assert torch.equal(index, order)
        assert torch.equal(values, expected)
    assert whole == [6, 6]


def test_rows_selected_again_are_reported(make):
    inputs = make(6, 9000, 32)
    inputs.queue[::9] = inputs.q[2]
    inputs.q[4] = 0
    found = contrast_and_gradient(*inputs, some(100), **SETTINGS)
    assert found.fallback.tolist() == [0, 0, 1, 0, 1, 0]
    assert found.fallback.dtype == torch.int32
    for negatives, by_vectors in ((some(9000), False), (Negatives(), False), (some(100), True)):
        found = contrast_and_gradient(*inputs, negatives, **SETTINGS, by_vectors=by_vectors)
        assert found.fallback.tolist() == [0] * 6
    assert contrast(*inputs, some(100), **SETTINGS).statistics.fallback.tolist() == [0] * 6


def test_threshold_lets_few_but_enough_through():
    for length, hard in ((65536, 1024), (65536, 1), (4096, 64), (262144, 1024), (5000, 1000)):
        stride, rank = topk.stride_and_rank(length, hard)
        assert rank * stride >= hard + 5 * stride * math.sqrt(hard / stride)
        assert rank * stride <= 4 * hard + 40 * stride
    assert topk.stride_and_rank(1000, 1000) is None
    assert topk.stride_and_rank(10, 1) is None


@FORMS
def test_nan_rows_stay_alone(make, by_vectors):
    inputs = make(6, 4500, 32)
    whole = contrast_and_gradient(*inputs, some(50), **SETTINGS, by_vectors=by_vectors)
    inputs.q[1, 3] = inputs.k[4, 0] = torch.nan
    broken = contrast_and_gradient(*inputs, some(50), **SETTINGS, by_vectors=by_vectors)
    reference = contrast(*inputs, some(50), **SETTINGS)
    others = [0, 2, 3, 5]
    assert broken.loss.isnan().tolist() == [False, True, False, False, True, False]
    assert broken.gradient[[1, 4]].isnan().all()
    for before, after in zip(whole, broken, strict=True):
        torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-7)
    for name in ("positive", "hard", "synthetic", "rank", "queue_rank"):
        expected = getattr(reference.statistics, name)
        torch.testing.assert_close(getattr(broken, name), expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@FORMS
def test_nan_in_the_queue_is_nan_everywhere(make, by_vectors):
    inputs = make(6, 4500, 32)
    inputs.queue[17, 0] = torch.nan
    found = contrast_and_gradient(*inputs, some(50), **SETTINGS, by_vectors=by_vectors)
    reference = contrast(*inputs, some(50), **SETTINGS)
    assert found.loss.isnan().all()
    assert reference.loss.isnan().all()
    torch.testing.assert_close(found.hard, reference.statistics.hard, rtol=1e-5, atol=1e-6)


@FORMS
def test_vectors_of_length_zero(within, by_vectors):
    # n = -q and t = 1/2 throughout: the vector is 0, its similarity 0 and its part of the gradient nothing.
    q = normalize(torch.randn(2, 16), dim=1)
    queue = torch.cat((-q, -q))
    negatives = Negatives(hard=4, interpolated=6, interpolated_range=(0.5, 0.5))
    inputs = (q, q.flip(0), -q[:1].expand(4, -1).contiguous())
    found = contrast_and_gradient(*inputs, negatives, **SETTINGS, by_vectors=by_vectors)
    leaf = q.clone().requires_grad_()
    expected = contrast(leaf, *inputs[1:], negatives, **SETTINGS)
    (gradient,) = torch.autograd.grad(expected.loss.sum(), leaf)
    assert found.synthetic[0, 0].item() == 0
    torch.testing.assert_close(found.loss, expected.loss.detach())
    torch.testing.assert_close(found.gradient, gradient)
    assert len(queue) == 4


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["cos near 1", "x near 0"])
def test_cancellation(within, distance, sign):
    generator = torch.Generator().manual_seed(1)
    q = normalize(torch.randn(4, 64, generator=generator), dim=1)
    queue = sign * normalize(q[:1] + distance * normalize(torch.randn(40, 64, generator=generator), dim=1), dim=1)
    q = q[:1].contiguous()
    k = normalize(q + torch.randn(1, 64, generator=generator) / 8, dim=1)
    # One hard negative, so that rounding cannot change which one is picked.
    for name in ("interpolated", "extrapolated", "mixed", "perturbed", "noisy", "adversarial"):
        negatives = Negatives(hard=1, interpolated_range=(0.4999, 0.5001), delta=1.0, **{name: 16})
        leaves = [q.to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32)]
        plain = []
        for leaf in leaves:
            loss = contrast(leaf, k.to(leaf.dtype), queue[:1].to(leaf.dtype), negatives, **SETTINGS).loss
            plain.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        found = contrast_and_gradient(q, k, queue[:1], negatives, **SETTINGS, by_vectors=False)
        within(found.loss, plain[1][0], plain[0][0], f"{name} loss")
        within(found.gradient, plain[1][1], plain[0][1], f"{name} gradient", units=16)


def test_cancelled_slots_in_float64_are_few_and_exact(monkeypatch):
    # Without the exact form the same inputs miss the mark: the exact form is what holds them.
    q = normalize(torch.randn(1, 64, dtype=torch.float64), dim=1)
    queue = -normalize(q + 1e-6 * torch.randn(1, 64, dtype=torch.float64), dim=1)
    negatives = Negatives(hard=1, interpolated=8, interpolated_range=(0.5, 0.5))
    leaf = q.clone().requires_grad_()
    loss = contrast(leaf, q, queue, negatives, **SETTINGS).loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)

    def error():
        found = contrast_and_gradient(q, q, queue, negatives, **SETTINGS)
        return (found.gradient - gradient).abs().max().item()

    assert error() < 1e-9
    monkeypatch.setattr(mixing, "_CANCELLED", 0.0)
    assert error() > 1e-8


def test_draws_follow_the_global_row(make):
    inputs = make(300, 500, 16)
    whole = contrast_and_gradient(*inputs, some(20), **SETTINGS)
    part = contrast_and_gradient(inputs.q[260:], inputs.k[260:], inputs.queue, some(20), **SETTINGS, first_row=260)
    torch.testing.assert_close(whole.loss[260:], part.loss)
    torch.testing.assert_close(whole.gradient[260:], part.gradient)


@FORMS
def test_repeats_are_bit_equal(make, by_vectors):
    inputs = make(70, 9000, 64)
    first, second = (contrast_and_gradient(*inputs, some(200), **SETTINGS, by_vectors=by_vectors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_one_family_for_each_name():
    assert list(COUNTS) == [family.name for family in FAMILIES]


def test_no_tensor_is_as_large_as_the_similarities(make):
    # 300 rows and 40,000 keys would make 48 MB of similarities and 46 MB of synthetic vectors.
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not function.is_view:
                largest = max(largest, result.nbytes)
            return result

    inputs = make(300, 40000, 64)
    negatives = Negatives.synco(512, interpolated=200, extrapolated=200, mixed=200, noisy=20)
    with Largest():
        contrast_and_gradient(*inputs, negatives, **SETTINGS)
    assert 0 < largest <= 9 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_few_calls_on_a_device_and_none_looks_at_data(dtype, masked):
    # Meta tensors have no data: a wait for a value would raise. Each call is some microseconds of host time on a GPU.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.count += not function.is_view
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if not function.is_view and isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.nbytes)
            return result

    q, queue = (torch.empty(length, 128, dtype=dtype, device="meta") for length in (256, 65536))
    ids = {}
    if masked:
        ids["image_ids"], ids["queue_ids"] = (
            torch.empty(length, dtype=torch.int64, device="meta") for length in (256, 65536)
        )
    for step in (7, torch.empty((), dtype=torch.int64, device="meta")):
        with Calls() as calls:
            found = contrast_and_gradient(q, q, queue, Negatives.synco(), **SETTINGS | {"step": step}, **ids)
        assert found.gradient.shape == (256, 128)
        assert found.gradient.is_meta
        assert 600 < calls.count <= 720, "docs/kernels.md says so"
        assert calls.largest <= 64 << 20
