"""The public function and the operators under it, on a CPU, where the formula stands in for the kernels."""

from __future__ import annotations

import itertools
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from synco_fast.kernels.norm import batch_norm, native, ops
from tests.support.norm_strides import results_by_strides
from tests.support.rotation import todays

BACKENDS = pytest.mark.parametrize("backend", ["auto", "native", "triton", "reference"])
KINDS = pytest.mark.parametrize(("relu", "added"), list(itertools.product((False, True), repeat=2)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
SHAPE = (6, 5, 3, 4)


@pytest.fixture(autouse=True)
def _notes(monkeypatch):
    # Group by group, as large tensors go.
    monkeypatch.setattr(native, "CACHED", 0)
    monkeypatch.setattr(native, "APART", 0)
    ops._note.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the batch norm uses the PyTorch formula")
        yield
    ops._note.cache_clear()


def inputs(shape=SHAPE, dtype=torch.float32, layout=torch.channels_last):
    wide = torch.promote_types(dtype, torch.float32)
    x, r = ((torch.randn(shape) * 2 + 1).to(dtype, memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], dtype=wide)
    return [value.requires_grad_() for value in (x, weight, bias, r)]


def state(channels=5, dtype=torch.float32):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5, torch.tensor(4)


@BACKENDS
@KINDS
@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_backends_agree(backend, relu, added, dtype, training, groups):
    leaves = inputs(dtype=dtype)
    wide = leaves[1].dtype
    before, results = state(dtype=wide), {}
    up = torch.randn(SHAPE).to(dtype)
    for form in ("exact", "modules", backend):
        cast = torch.float64 if form == "exact" else None
        x, weight, bias, r = (leaf.detach().to(cast).requires_grad_() for leaf in leaves)
        running = [value.clone() if value.dtype == torch.int64 else value.to(cast, copy=True) for value in before]
        settings = {"groups": groups, "residual": r if added else None, "relu": relu, "training": training}
        name = {"exact": "reference", "modules": "native"}.get(form, form)
        y = batch_norm(x, weight, bias, *running[:2], **settings, num_batches_tracked=running[2], backend=name)
        assert y.dtype == x.dtype
        gradients = torch.autograd.grad(y, [x, weight, bias] + ([r] if added else []), up.to(y.dtype))
        assert [gradient.dtype for gradient in gradients[:3]] == [x.dtype, weight.dtype, bias.dtype]
        results[form] = [y, *gradients, *running]
    eps = torch.finfo(wide).eps
    for exact, plain, found in zip(results["exact"], results["modules"], results[backend], strict=True):
        bound = 2 * (plain.double() - exact).abs().max() + 16 * eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound
    assert results[backend][-1] == (5 if training else 4)


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_apply(relu, added, training):
    x, weight, bias, r = inputs()
    groups = 2 if training else 1
    mean, variance = torch.randn(groups, 5), torch.rand(groups, 5) + 0.5
    arguments = (x, mean, variance, weight, bias, r if added else None, relu, training, 1e-5)
    torch.library.opcheck(ops._normalise, arguments)
    torch.library.opcheck(ops._normalise, (x, mean, variance, None, None, *arguments[5:]))


def test_opcheck_of_statistics_and_backward():
    x, weight, bias, r = (value.detach() for value in inputs())
    mean, variance, tracked = state()
    torch.library.opcheck(ops._statistics, (x, mean, variance, tracked, 2, 0.1))
    torch.library.opcheck(ops._statistics, (x, mean, variance, tracked, 3, None))
    torch.library.opcheck(ops._statistics, (x, None, None, None, 1, 0.1))
    for y, groups in itertools.product((None, r), (1, 2)):
        numbers = mean.repeat(groups, 1), variance.repeat(groups, 1)
        torch.library.opcheck(ops._backward, (r, x, y, *numbers, weight, bias, True, True, 1e-5))


@KINDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_whole(relu, added, training, backend):
    leaves, before = inputs(), state()

    def step(x, weight, bias, r, mean, variance, tracked):
        settings = {"groups": 2, "residual": r if added else None, "relu": relu, "training": training}
        return batch_norm(x * 2, weight, bias, mean, variance, **settings, num_batches_tracked=tracked, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    up, results = torch.randn(SHAPE), []
    for run in (step, compiled):
        running = [value.clone() for value in before]
        y = run(*leaves, *running)
        gradients = torch.autograd.grad(y, leaves[: 4 if added else 3], up)
        results.append([y, *gradients, *running])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("backend", todays(["triton", "auto"]))
def test_compiles_whole_with_inductor(backend):
    leaves, before = inputs(), state()

    def step(x, weight, bias, r, mean, variance, tracked):
        settings = {"groups": 2, "residual": r, "relu": True, "num_batches_tracked": tracked, "backend": backend}
        y = batch_norm(x * 2, weight, bias, mean, variance, **settings)
        return y.square().mean()

    compiled, results = torch.compile(step, fullgraph=True), []
    for run in (step, compiled):
        running = [value.clone() for value in before]
        loss = [run(*leaves, *running) for _ in range(3)][-1]
        results.append([loss, *torch.autograd.grad(loss, leaves), *running])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert results[1][-1] == 7


class Calls(TorchDispatchMode):
    """The calls that read or write a tensor of x's size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.numel() == self.size for value in args):
            self.names.append(func._schema.name)
        return result


def test_evaluation_is_one_elementwise_pass():
    x, weight, bias, r = (value.detach() for value in inputs())
    with Calls(x.numel()) as calls:
        batch_norm(x, weight, bias, *state()[:2], residual=r, relu=True, training=False, backend="triton")
    assert calls.names == ["synco_fast::norm_apply"]
    with Calls(x.numel()) as calls:
        batch_norm(x, weight, bias, *state()[:2], groups=2, residual=r, relu=True, backend="triton")
    assert {"synco_fast::norm_statistics", "synco_fast::norm_apply"} <= set(calls.names)


@BACKENDS
@pytest.mark.parametrize(
    ("channels", "side"), [(3, 1), (3, 7), (3, 56), (64, 1), (64, 7), (64, 56), (513, 7), (2048, 1), (2048, 7)]
)
def test_sizes(backend, channels, side):
    """Against PyTorch's modules of each group, in float64."""
    shape = (6, channels, side, side)
    x, weight, bias, r = inputs(shape, torch.float64)
    norms = [nn.BatchNorm2d(channels).double() for _ in range(2)]
    parts = [
        torch.nn.functional.batch_norm(part, norm.running_mean, norm.running_var, weight, bias, True, 0.1)
        for norm, part in zip(norms, x.chunk(2), strict=True)
    ]
    expected = (torch.cat(parts) + r).relu()
    running = torch.zeros(channels).double(), torch.ones(channels).double()
    y = batch_norm(x, weight, bias, *running, groups=2, residual=r, relu=True, backend=backend)
    up, leaves = torch.randn(shape).double(), (x, weight, bias, r)
    pairs = zip(
        [y, *torch.autograd.grad(y, leaves, up), *running],
        [
            expected,
            *torch.autograd.grad(expected, leaves, up),
            *(torch.stack([getattr(norm, name) for norm in norms]).mean(0) for name in ("running_mean", "running_var")),
        ],
        strict=True,
    )
    for found, wanted in pairs:
        assert (found - wanted).norm() <= 1e-12 * max(1, wanted.norm())


@BACKENDS
def test_one_image_a_group_is_refused_where_pytorch_does(backend):
    norm = nn.BatchNorm2d(5)
    x = torch.randn(2, 5, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(x[:1])
    with pytest.raises(ValueError, match=r"found shape \(2, 5, 1, 1\) in 2 groups, one value a channel in each"):
        batch_norm(x, None, None, None, None, groups=2, backend=backend)
    x = torch.randn(2, 5, 2, 1).to(memory_format=torch.channels_last)
    found = batch_norm(x, None, None, None, None, groups=2, backend=backend)
    torch.testing.assert_close(found, torch.cat([norm(part) for part in x.chunk(2)]), rtol=1e-5, atol=1e-6)


@BACKENDS
def test_no_image_at_all(backend):
    """Nothing to normalise in evaluation, as PyTorch has it; in training there are no statistics."""
    x = torch.empty(0, 5, 3, 4).to(memory_format=torch.channels_last)
    y = batch_norm(x, None, None, *state()[:2], training=False, relu=True, backend=backend)
    assert y.shape == x.shape
    with pytest.raises(ValueError, match=r"x: found shape \(0, 5, 3, 4\), expected at least two values a channel"):
        batch_norm(x, None, None, None, None, backend=backend)


@BACKENDS
def test_nan_stays_in_its_group_and_channel(backend):
    x, weight, bias, r = (value.detach() for value in inputs())
    x[2, 1, 0, 0] = float("nan")
    y = batch_norm(x, weight, bias, None, None, groups=3, residual=r, relu=True, backend=backend)
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[2:4, 1] = True
    assert torch.equal(y.isnan(), expected)


@BACKENDS
def test_momentum_none_is_pytorchs_cumulative_mean(backend):
    norm, (mean, variance, tracked) = (
        nn.BatchNorm2d(5, momentum=None),
        (torch.zeros(5), torch.ones(5), torch.tensor(0)),
    )
    for _ in range(3):
        x = torch.randn(SHAPE) * 3 + 1
        norm(x)
        batch_norm(x, None, None, mean, variance, momentum=None, num_batches_tracked=tracked, backend=backend)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)


@BACKENDS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_parameters_and_in_any_layout(backend, layout):
    x = inputs(layout=layout)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = batch_norm(x, None, None, None, None, groups=2, backend=backend)
    expected = torch.cat([nn.BatchNorm2d(5, affine=False)(part) for part in x.chunk(2)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    up = torch.randn(SHAPE).to(memory_format=layout)
    torch.testing.assert_close(*(torch.autograd.grad(value, x, up)[0] for value in (y, expected)), rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_parameters_and_statistics_change_nothing(backend, training):
    for expected, found in zip(*results_by_strides(backend, training=training), strict=True):
        assert torch.equal(expected, found)


def test_statistics_of_other_strides_move_in_a_compiled_call():
    x, table = inputs()[0].detach(), torch.stack(state()[:2], dim=1)
    tables = [table.clone(), table.clone()]

    def step(x, table):
        return batch_norm(x, None, None, *table.unbind(1), backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x, tables[0]), compiled(x, tables[1]))
    torch.testing.assert_close(*tables)
    assert not (tables[0] == table).any()


def test_the_kernels_layout_is_asked_for_once():
    x = inputs(layout=torch.contiguous_format)[0].detach()
    with pytest.warns(UserWarning, match="x is not channels-last, so every call copies it"):
        y = batch_norm(x, None, None, None, None, backend="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch_norm(x, None, None, None, None, backend="triton")


def test_the_formula_stands_in_with_one_line():
    x = inputs()[0].detach()
    with pytest.warns(UserWarning, match="the batch norm uses the PyTorch formula: x is on cpu; the kernels run on"):
        batch_norm(x, None, None, None, None, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch_norm(x, None, None, None, None, backend="triton")


def test_what_the_kernels_do_not_serve():
    unserved = pytest.importorskip("synco_fast.kernels.norm.triton").unserved
    assert unserved(torch.empty(1, 1, 1, 1, dtype=torch.float64)).startswith("x has dtype torch.float64")
    wide = torch.empty(1, device="meta").expand(1 << 15, 1, 1 << 8, 1 << 8)
    assert unserved(wide).startswith(f"x has {1 << 31} values a channel")


def test_second_derivatives_are_refused_rather_than_wrong():
    x, weight, bias, r = inputs()
    y = batch_norm(x, weight, bias, None, None, residual=r, relu=True, backend="triton")
    with pytest.raises(RuntimeError, match="first derivative only; expected 'reference' for higher ones"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@BACKENDS
def test_gradients_add_up_over_calls(backend):
    """Accumulation: two halves of a batch with half the groups each give the gradient of the whole."""
    x, weight, bias, r = inputs((8, 5, 3, 4))
    settings = {"relu": True, "backend": backend}
    whole = batch_norm(x, weight, bias, None, None, groups=4, residual=r, **settings).square().sum()
    expected = torch.autograd.grad(whole, [x, weight, bias, r])
    for half, added in zip(x.chunk(2), r.chunk(2), strict=True):
        batch_norm(half, weight, bias, None, None, groups=2, residual=added, **settings).square().sum().backward()
    for leaf, wanted in zip((x, weight, bias, r), expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-5)


def test_a_residual_without_gradient_and_frozen_parameters():
    for backend in ("native", "triton"):
        x, weight, bias, r = inputs()
        y = batch_norm(x, weight.detach(), bias.detach(), None, None, residual=r.detach(), relu=True, backend=backend)
        y.sum().backward()
        assert x.grad is not None


@BACKENDS
def test_autocast_does_not_reach_inside(backend):
    x, weight, bias, r = inputs()
    plain = batch_norm(x, weight, bias, None, None, residual=r, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = batch_norm(x, weight, bias, None, None, residual=r, backend=backend)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x: found torch.int64, expected a floating-point"),
        ({"x": torch.zeros(6, 5, 3)}, ValueError, r"x: found 3 dimensions, expected 4, \(B, C, H, W\)"),
        ({"groups": 4}, ValueError, "x: found a batch of 6, expected a multiple of 4 groups"),
        ({"groups": 0}, ValueError, "groups: found 0, expected a whole number of at least 1"),
        (
            {"x": torch.zeros(6, 5, 1, 1), "groups": 6},
            ValueError,
            r"x: found shape \(6, 5, 1, 1\) in 6 groups, one value a channel in each, expected more than one",
        ),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: found shape \(4,\), expected \(5,\), the channels of x"),
        (
            {"running_var": torch.ones(1).expand(5)},
            ValueError,
            "running_var: found an expanded tensor, expected memory",
        ),
        ({"running_var": None}, ValueError, "running_var: found None, expected a tensor where its counterpart"),
        ({"residual": torch.zeros(6, 5, 3, 3)}, ValueError, r"residual: found shape \(6, 5, 3, 3\), expected \(6, 5"),
        ({"eps": float("nan")}, ValueError, "eps: found nan, expected a finite number, 0 or more"),
        ({"momentum": None}, ValueError, "num_batches_tracked: found None, expected a tensor if momentum is None"),
        ({"num_batches_tracked": torch.zeros(1)}, ValueError, "num_batches_tracked: found torch.float32 of shape"),
        (
            {"training": False, "running_mean": None, "running_var": None},
            ValueError,
            "running_mean: found None, expected a tensor in evaluation",
        ),
        ({"backend": "cuda"}, ValueError, "backend: found 'cuda', expected auto, reference, native, triton"),
    ],
    ids=lambda value: None if isinstance(value, (dict, type)) else value[:30],
)
def test_bad_arguments(changes, error, message):
    arguments = {
        "x": torch.zeros(SHAPE),
        "weight": torch.ones(5),
        "bias": torch.zeros(5),
        "running_mean": torch.zeros(5),
        "running_var": torch.ones(5),
    }
    with pytest.raises(error, match=message):
        batch_norm(**arguments | changes)
