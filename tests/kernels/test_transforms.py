"""The loss under transforms, compilers and modes, by table: each is supported, or refused in one line."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from synco_fast.kernels import Negatives, synthetic_contrast
from synco_fast.kernels.validation import exact_inputs

NEGATIVES = Negatives.synco(16, interpolated=5, extrapolated=4, mixed=6, noisy=3, perturbed=2, adversarial=3)
SETTINGS = {"temperature": 0.2, "seed": 3, "step": 7}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "blockwise"])

Loss = Callable[[Tensor], Tensor]


@pytest.fixture
def inputs():
    return exact_inputs(5, 200, 16)


@pytest.fixture
def loss(inputs) -> Callable[[str], Loss]:
    """The losses as a function of q alone, by backend."""

    def of(backend: str) -> Loss:
        return lambda q: synthetic_contrast(q, inputs.k, inputs.queue, NEGATIVES, **SETTINGS, backend=backend).loss

    return of


def plain(function: Loss, q: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum, as autograd alone gives them."""
    leaf = q.detach().clone().requires_grad_()
    values = function(leaf)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def diagonal(jacobian: Tensor) -> Tensor:
    """(B, B, D) to (B, D): a row's loss depends on that row alone."""
    index = torch.arange(len(jacobian))
    rest = jacobian.clone()
    rest[index, index] = 0
    assert rest.eq(0).all()
    return jacobian[index, index]


REVERSE = {
    "func.grad": lambda f, q: torch.func.grad(lambda q: f(q).sum())(q),
    "func.grad_and_value": lambda f, q: torch.func.grad_and_value(lambda q: f(q).sum())(q)[0],
    "func.vjp": lambda f, q: torch.func.vjp(f, q)[1](torch.ones(len(q)))[0],
    "func.jacrev": lambda f, q: diagonal(torch.func.jacrev(f)(q)),
    "autograd.functional.jacobian": lambda f, q: diagonal(torch.autograd.functional.jacobian(f, q)),
    "vmap of grad": lambda f, q: torch.func.vmap(torch.func.grad(lambda q: f(q).sum()))(q.expand(2, -1, -1))[1],
    "checkpoint": lambda f, q: plain(lambda q: checkpoint(f, q, use_reentrant=False), q)[1],
    "anomaly mode": lambda f, q: _within(torch.autograd.detect_anomaly(check_nan=True), f, q),
    "a backward hook": lambda f, q: _with_hook(f, q),
}


def _within(context, function, q):
    with context:
        return plain(function, q)[1]


def _with_hook(function, q):
    leaf = q.clone().requires_grad_()
    seen = []
    leaf.register_hook(seen.append)
    function(leaf).sum().backward()
    return seen[0]


@BACKENDS
@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_reverse_mode(inputs, loss, backend, name):
    _, expected = plain(loss(backend), inputs.q)
    torch.testing.assert_close(REVERSE[name](loss(backend), inputs.q), expected)


NO_FORWARD = r"^backend: this one has no forward-mode derivative; expected 'reference' for that$"


def _compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager")


def _called(function, q):
    function(q)
    return function


def _forward_ad(function, q):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(q, torch.ones_like(q)))).tangent


FORWARD = {
    "func.jvp": lambda f, q: torch.func.jvp(f, (q,), (torch.ones_like(q),))[1],
    "func.jacfwd": lambda f, q: diagonal(torch.func.jacfwd(f)(q)).sum(dim=1),
    "forward_ad": _forward_ad,
}


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode(inputs, loss, name):
    _, gradient = plain(loss("reference"), inputs.q)
    torch.testing.assert_close(FORWARD[name](loss("reference"), inputs.q), gradient.sum(dim=1))
    with pytest.raises(RuntimeError, match=NO_FORWARD):
        FORWARD[name](loss("blockwise"), inputs.q)


BELOW_OTHERS = {
    "func.hessian": lambda f, q: torch.func.hessian(lambda q: f(q).sum())(q),
    "func.jvp of func.grad": lambda f, q: FORWARD["func.jvp"](torch.func.grad(lambda q: f(q).sum()), q),
    "func.grad of func.jvp": lambda f, q: torch.func.grad(lambda q: FORWARD["func.jvp"](f, q).sum())(q),
    "func.jvp of vmap": lambda f, q: FORWARD["func.jvp"](torch.func.vmap(f), torch.stack((q, q))),
    "func.linearize": lambda f, q: torch.func.linearize(f, q)[1](q),
    "func.jvp, compiled": lambda f, q: _compiled(lambda q: FORWARD["func.jvp"](f, q))(q),
    "a dual tensor in what was compiled without": lambda f, q: _forward_ad(_called(_compiled(f), q), q),
}


@pytest.mark.parametrize("name", BELOW_OTHERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode_is_refused_below_other_transforms_too(inputs, loss, name):
    with pytest.raises(RuntimeError, match=NO_FORWARD):
        BELOW_OTHERS[name](loss("blockwise"), inputs.q)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_transforms_inside_what_is_compiled(inputs, loss, transform):
    f = loss("blockwise")
    function = transform(lambda q: f(q).sum())
    q = inputs.q if transform is torch.func.grad else inputs.q.expand(2, -1, -1)
    torch.testing.assert_close(_compiled(function)(q), function(q))


SECOND = {
    "func": lambda f, q: torch.func.grad(lambda q: torch.func.grad(lambda q: f(q).sum())(q).square().sum())(q),
    "func.hessian by rows": lambda f, q: torch.func.jacrev(torch.func.jacrev(lambda q: f(q).sum()))(q).sum(dim=(0, 1)),
    "autograd": lambda f, q: plain(lambda q: torch.autograd.grad(f(q).sum(), q, create_graph=True)[0], q)[1],
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(inputs, loss, name):
    assert SECOND[name](loss("reference"), inputs.q).abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"^backend: this one has a first derivative only; expected 'reference'"):
        SECOND[name](loss("blockwise"), inputs.q)


@BACKENDS
def test_vmap_draws_alike_for_each_call(inputs, loss, backend):
    both = torch.stack((inputs.q, inputs.q.flip(0)), dim=1)
    found = torch.func.vmap(loss(backend), in_dims=1)(both)
    for number in range(2):
        torch.testing.assert_close(found[number], loss(backend)(both[:, number]))


@BACKENDS
def test_meta_tensors(inputs, backend):
    far = [tensor.to("meta") for tensor in inputs]
    ids = {"image_ids": torch.arange(5, device="meta"), "queue_ids": torch.arange(200, device="meta")}
    for masked in ({}, ids):
        found = synthetic_contrast(*far, NEGATIVES, **SETTINGS, **masked, backend=backend)
        near = {name: torch.zeros(len(tensor), dtype=torch.int64) for name, tensor in masked.items()}
        expected = synthetic_contrast(*inputs, NEGATIVES, **SETTINGS, **near, backend=backend)
        for one, other in zip((found.loss, *found.statistics), (expected.loss, *expected.statistics), strict=True):
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


@BACKENDS
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_export_with_a_dynamic_batch(inputs, backend, masked):
    class Module(torch.nn.Module):
        def forward(self, q, k, image_ids):
            ids = {"image_ids": image_ids, "queue_ids": torch.arange(200) % 9} if masked else {}
            return synthetic_contrast(q, k, inputs.queue, NEGATIVES, **SETTINGS, **ids, backend=backend).loss

    batch = torch.export.Dim("batch")
    given = inputs.q, inputs.k, torch.arange(5)
    program = torch.export.export(Module(), given, dynamic_shapes=({0: batch},) * 3).module()
    for rows in (5, 2):
        some = [tensor[:rows] for tensor in given]
        torch.testing.assert_close(program(*some), Module()(*some))


MODES = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype of float64": lambda: _Setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic algorithms": lambda: _Setting(torch.use_deterministic_algorithms, True, False),
    "two threads": lambda: _Setting(torch.set_num_threads, 2, 1),
    "flushed denormals": lambda: _Setting(torch.set_flush_denormal, True, False),
}


class _Setting:
    def __init__(self, put, value, back):
        self.put, self.value, self.back = put, value, back

    def __enter__(self):
        self.put(self.value)

    def __exit__(self, *_):
        self.put(self.back)


@BACKENDS
@pytest.mark.parametrize("name", MODES)
def test_modes_change_nothing(inputs, loss, backend, name):
    expected = loss(backend)(inputs.q)
    with MODES[name]():
        found = loss(backend)(inputs.q)
        assert found.dtype == torch.float32
        assert found.requires_grad is False
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@BACKENDS
def test_tensors_of_inference_mode_as_constants(inputs, backend):
    with torch.inference_mode():
        k, queue = inputs.k.clone(), inputs.queue.clone()

    def function(q):
        return synthetic_contrast(q, k, queue, NEGATIVES, **SETTINGS, backend=backend).loss

    if backend == "blockwise":
        _, expected = plain(lambda q: synthetic_contrast(q, *inputs[1:], NEGATIVES, **SETTINGS).loss, inputs.q)
        torch.testing.assert_close(plain(function, inputs.q)[1], expected)
    else:
        # Autograd keeps k and the queue for the backward pass of the reference.
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            plain(function, inputs.q)


@BACKENDS
def test_threads_do_not_disturb_one_another(inputs, loss, backend):
    expected, found = loss(backend)(inputs.q), {}

    def work(number):
        found[number] = loss(backend)(inputs.q)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected) for number in range(4))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_descriptions_are_values(again):
    for negatives in (NEGATIVES, Negatives.moco(), replace(NEGATIVES, extrapolation="paper", sigma=0.5)):
        assert again(negatives) == negatives
        assert hash(again(negatives)) == hash(negatives)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"image_ids": [1] * 5, "queue_ids": torch.arange(200)}, TypeError, "image_ids: found list, expected an int64"),
        ({"image_ids": torch.arange(5), "queue_ids": 3}, TypeError, "queue_ids: found int, expected an int64 tensor"),
        (
            {"image_ids": torch.arange(5)[:, None], "queue_ids": torch.arange(200)},
            ValueError,
            r"image_ids: found shape \(5, 1\), expected \(5,\)",
        ),
        ({"temperature": True}, ValueError, "temperature: found True, expected a finite number above 0"),
        ({"temperature": "0.2"}, ValueError, "temperature: found '0.2', expected a finite number above 0"),
        ({"temperature": torch.tensor(0.2)}, ValueError, r"temperature: found tensor\(0.2000\), expected a finite"),
        ({"seed": True}, ValueError, "seed: found True, expected a whole number from 0 to"),
        ({"step": 1.0}, ValueError, "step: found 1.0, expected a whole number from 0 to"),
        ({"first_row": None}, ValueError, "first_row: found None, expected a whole number from 0 to"),
        ({"backend": None}, ValueError, "backend: found None, expected auto, reference, blockwise, triton"),
    ],
)
@BACKENDS
def test_wrong_types_are_refused(inputs, backend, changes, error, line):
    with pytest.raises(error, match=f"^{line}") as caught:
        synthetic_contrast(*inputs, NEGATIVES, **SETTINGS | {"backend": backend} | changes)
    assert "\n" not in str(caught.value)
