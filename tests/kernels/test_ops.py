from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from synco_fast.kernels import Negatives, ops, synthetic_contrast
from synco_fast.kernels.tracing import traced

NEGATIVES = Negatives.synco(16, interpolated=5, extrapolated=4, mixed=6, noisy=3, perturbed=2, adversarial=3)
SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
IDS = {"image_ids": torch.arange(5), "queue_ids": torch.arange(200) % 9}
BACKENDS = pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])


def flat(inputs, *, step=7, step_on_device=None, ids=None, extrapolation="released"):
    ids = ids or {"image_ids": None, "queue_ids": None}
    counts, numbers = ops._counts(NEGATIVES), ops._numbers(NEGATIVES)
    settings = (counts, numbers, extrapolation, 0.2, 3, step, step_on_device, 0)
    return (*inputs, *settings, ids["image_ids"], ids["queue_ids"], "blockwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "masked"])
def test_opcheck(make, dtype, ids):
    inputs = make(5, 200, 16, dtype)
    inputs.q.requires_grad_()
    torch.library.opcheck(ops._contrast, flat(inputs, ids=ids))
    torch.library.opcheck(ops._contrast, flat(inputs, ids=ids, step=0, step_on_device=torch.tensor(7)))


class _Seen(TorchDispatchMode):
    """Records the operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "synco_fast":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ids", [{}, IDS], ids=["plain", "masked"])
@pytest.mark.parametrize("step", [7, torch.tensor(7)], ids=["host", "device"])
def test_an_eager_call_makes_no_operator(make, monkeypatch, ids, step):
    inputs = make(5, 200, 16)
    inputs.q.requires_grad_()

    def answer():
        contrast = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS | {"step": step}, **ids, backend="blockwise")
        return *torch.autograd.grad(contrast.loss.sum(), inputs.q), contrast.loss, *contrast.statistics

    with _Seen() as seen:
        expected = answer()
    assert seen.names == ["synco_fast::contrast"]
    monkeypatch.setattr(ops, "_contrast", None)
    assert all(torch.equal(value, wanted) for value, wanted in zip(answer(), expected, strict=True))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, _Seen])
def test_only_queries_get_a_gradient(make, mode):
    inputs = make(5, 200, 16)
    inputs.k.requires_grad_()
    inputs.queue.requires_grad_()
    with mode():
        assert not synthetic_contrast(*inputs, NEGATIVES, **SETTINGS).loss.requires_grad


def test_a_subclass_meets_the_operator(make):
    class Own(torch.Tensor):
        pass

    q = make(5, 200, 16).q
    assert traced(q.as_subclass(Own))
    assert not traced(q)
    assert not traced(torch.nn.Parameter(q))


def test_description_survives_the_schema():
    for negatives in (NEGATIVES, Negatives.moco(), Negatives(2, 1, extrapolation="paper", sigma=3, mixed_range=(1, 2))):
        found = ops._describe(ops._counts(negatives), ops._numbers(negatives), negatives.extrapolation)
        assert found == negatives


@BACKENDS
@pytest.mark.parametrize("ids", [{}, IDS], ids=["plain", "masked"])
def test_back_ends_agree(make, answer, within, backend, ids):
    inputs = make(5, 200, 16)
    q = inputs.q.clone().requires_grad_()
    result = synthetic_contrast(q, inputs.k, inputs.queue, NEGATIVES, **SETTINGS, **ids, backend=backend)
    (gradient,) = torch.autograd.grad((result.loss * torch.arange(5)).sum(), q)
    exact = answer(inputs, NEGATIVES, **SETTINGS, **ids)
    plain = answer(inputs, NEGATIVES, torch.float32, **SETTINGS, **ids)
    within(result.loss.detach(), plain.contrast.loss, exact.contrast.loss, "loss")
    weights = torch.arange(5)[:, None]
    within(gradient, plain.gradient * weights, exact.gradient * weights, "gradient")
    for name in ("rank", "queue_rank"):
        assert torch.equal(getattr(result.statistics, name), getattr(exact.contrast.statistics, name))
    assert not any(value.requires_grad for value in result.statistics)


@BACKENDS
def test_queries_without_an_image_are_masked_by_nothing(make, backend):
    inputs, queue_ids = make(5, 200, 16), torch.arange(200) % 9 - 1
    ids = {"image_ids": torch.tensor([-1, 3, -1, 5, 0]), "queue_ids": queue_ids}
    found = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, **ids, backend=backend)
    # Ids that no queue key has mask nothing either.
    expected = synthetic_contrast(
        *inputs, NEGATIVES, **SETTINGS, image_ids=ids["image_ids"] % 99, queue_ids=queue_ids, backend=backend
    )
    assert torch.equal(found.loss, expected.loss)
    assert ids["image_ids"].tolist() == [-1, 3, -1, 5, 0], "what was given is not changed"


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_results(make, backend, dtype):
    inputs = make(5, 200, 16, dtype)
    q = inputs.q.requires_grad_()
    result = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend=backend)
    wide = torch.promote_types(dtype, torch.float32)
    statistics = result.statistics
    assert {tensor.dtype for tensor in (result.loss, statistics.positive, statistics.hard, statistics.synthetic)} == {
        wide
    }
    assert statistics.rank.dtype == statistics.queue_rank.dtype == torch.int64
    (gradient,) = torch.autograd.grad(result.loss.sum(), q)
    assert gradient.dtype == dtype


@BACKENDS
def test_autocast_does_not_reach_inside(make, backend):
    inputs = make(5, 200, 16)
    plain = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend=backend)
    assert torch.equal(inside.loss, plain.loss)


@BACKENDS
def test_step_may_be_a_tensor(make, backend):
    inputs = make(5, 200, 16)
    losses = [
        synthetic_contrast(*inputs, NEGATIVES, **SETTINGS | {"step": step}, backend=backend).loss
        for step in (7, torch.tensor(7), 8)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_k_and_queue_get_no_gradient(make):
    inputs = [tensor.requires_grad_() for tensor in make(5, 200, 16)]
    synthetic_contrast(*inputs, NEGATIVES, **SETTINGS).loss.sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is inputs[2].grad is None


def test_inputs_may_be_strided(make):
    inputs = make(5, 200, 32)
    strided = [tensor.T.contiguous().T for tensor in inputs]
    for backend in ("blockwise", "reference"):
        one, other = (synthetic_contrast(*some, NEGATIVES, **SETTINGS, backend=backend) for some in (inputs, strided))
        torch.testing.assert_close(one.loss, other.loss)


def test_second_derivatives_are_refused_rather_than_wrong(make):
    inputs = make(5, 200, 16)
    q = inputs.q.requires_grad_()
    loss = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS).loss.sum()
    with pytest.raises(RuntimeError, match="first derivative only; expected 'reference' for higher ones"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_compiles_whole(make):
    inputs = make(5, 200, 16)
    q = inputs.q.clone().requires_grad_()

    def step(q, number, ids):
        result = synthetic_contrast(
            torch.nn.functional.normalize(q, dim=1),
            inputs.k,
            inputs.queue,
            NEGATIVES,
            temperature=0.2,
            seed=3,
            step=number,
            image_ids=ids,
            queue_ids=None if ids is None else IDS["queue_ids"],
        )
        return result.loss.mean(), result.statistics.rank

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (7, 8, 9, torch.tensor(7)):
        for ids in (None, IDS["image_ids"]):
            expected, found = step(q, number, ids), compiled(q, number, ids)
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(loss, q)[0] for loss, _ in (expected, found)]
            torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiles_whole_with_inductor(make):
    inputs = make(5, 200, 16)
    q = inputs.q.clone().requires_grad_()

    def step(q, number):
        return synthetic_contrast(
            q, inputs.k, inputs.queue, NEGATIVES, temperature=0.2, seed=3, step=number
        ).loss.mean()

    compiled = torch.compile(step, fullgraph=True)
    for number in (7, 8):
        found, expected = compiled(q, number), step(q, number)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, q), torch.autograd.grad(expected, q))


def test_kernels_hand_over_with_one_note(make):
    inputs = make(5, 200, 16)
    ops._note.cache_clear()
    with pytest.warns(UserWarning, match="the loss uses the blockwise form: q is on cpu; the kernels run on CUDA"):
        found = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend="triton")
        expected = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, backend="blockwise")
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(again.loss, expected.loss)


@pytest.mark.parametrize(
    ("dtype", "dim", "temperature", "reason"),
    [
        (torch.float64, 16, 0.2, "q has dtype torch.float64"),
        (torch.float32, 528, 0.2, "q has 528 columns"),
        (torch.float32, 16, 0.02, "temperature is 0.02"),
    ],
)
def test_what_the_kernels_do_not_serve(make, dtype, dim, temperature, reason):
    unserved = pytest.importorskip("synco_fast.kernels.triton").unserved
    inputs = make(5, 200, dim, dtype)
    assert unserved(inputs.q, inputs.queue, temperature).startswith(reason)


def test_the_kernels_count_keys_in_32_bits():
    unserved = pytest.importorskip("synco_fast.kernels.triton").unserved
    q = torch.empty(2, 16)
    fits, beyond = (torch.empty(2**29 + more, 16, device="meta") for more in (0, 1))
    assert unserved(q, fits, 0.2).startswith("q is on cpu")
    assert unserved(q, beyond, 0.2) == "queue has 536870913 rows; the kernels take up to 536870912"
