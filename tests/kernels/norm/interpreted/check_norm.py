"""The kernels against the formula in float64, beside PyTorch's modules in the same precision, each run twice."""

from __future__ import annotations

import itertools

import pytest
import torch

from synco_fast.kernels.norm import batch_norm, ops
from synco_fast.kernels.norm.triton import config, launch
from synco_fast.kernels.norm.triton.config import shape_of
from synco_fast.kernels.norm.validation import NormCase, validate_norm
from tests.support.devices import devices_entered
from tests.support.norm_strides import results_by_strides
from tests.support.rotation import todays

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ((False, False), (True, False), (True, True), (False, True))
#: One value more than a tile, maps of one place, channels below, at, above and beside a tile, odd everything.
SHAPES = (
    ((6, 3, 7, 7), 2),
    ((8, 64, 1, 1), 4),
    ((4, 130, 5, 3), 1),
    ((4, 1040, 1, 1), 2),
    ((2, 16, 17, 16), 1),
    ((2, 64, 28, 28), 2),
    ((5, 1, 3, 3), 5),
    ((4, 72, 9, 9), 2),
)


def inputs(shape, dtype, mean=1.0):
    x, r = ((torch.randn(shape) + mean).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(2, shape[1])
    return x, weight, bias, r


def check(shape, groups, dtype, relu, added, training=True, mean=1.0):
    case = NormCase(shape, groups, relu, added, dtype, training, mean)
    (verdict,) = validate_norm([case], torch.device("cpu"), ["triton"])
    assert not verdict.misses, verdict.as_dict()


#: One kind will do for the slow one.
CASES = [
    (shape, kind) for shape, kind in itertools.product(SHAPES, KINDS) if shape[0][1] != 1040 or kind == (True, True)
]


@pytest.mark.parametrize(("shape", "kind"), todays(CASES, 9), ids=str)
def test_shapes(shape, kind):
    (shape, groups), (relu, added) = shape, kind
    check(shape, groups, torch.float32, relu, added)


@pytest.mark.parametrize(
    ("training", "kind", "dtype"), todays(list(itertools.product([True, False], KINDS, DTYPES)), 9), ids=str
)
def test_dtypes(training, kind, dtype):
    relu, added = kind
    check((6, 40, 5, 7), 3 if training else 1, dtype, relu, added, training)


def few_programs(monkeypatch, programs):
    """Small tiles and few programs, so that each goes through several tiles, as at full size."""
    monkeypatch.setattr(config, "TILE", 256)
    monkeypatch.setattr(config, "PROGRAMS", programs)


@pytest.mark.parametrize(("groups", "at_once"), [(1, 4), (4, 256), (4, 4), (8, 4)])
def test_groups(monkeypatch, groups, at_once):
    """With few shares at once, splits and then groups are added up in several goes."""
    for module in (config, launch):
        monkeypatch.setattr(module, "SHARES", at_once)
    few_programs(monkeypatch, 8)
    shape = (8, 24, 5, 5)
    found = shape_of(torch.empty(shape), groups)
    assert found.tiles == 4
    assert found.splits == {1: 7, 4: 2, 8: 1}[groups]
    check(shape, groups, torch.float32, True, True)


def test_cumulative_mean():
    mean, variance, tracked = torch.zeros(20), torch.ones(20), torch.tensor(0)
    norm = torch.nn.BatchNorm2d(20, momentum=None)
    for _ in range(3):
        x = inputs((6, 20, 5, 7), torch.float32)[0]
        norm(x)
        settings = {"momentum": None, "num_batches_tracked": tracked, "backend": "triton"}
        batch_norm(x, None, None, mean, variance, **settings)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)
    assert tracked == 3


@pytest.mark.parametrize("mean", todays([1e3, -1e4]))
def test_no_digits_are_lost_beside_a_large_mean(monkeypatch, mean):
    """The variance to a few units in the last place; sums of squares would leave none of its digits."""
    few_programs(monkeypatch, 16)
    x = inputs((4, 20, 25, 24), torch.float32, mean)[0]
    assert shape_of(x, 2).tiles > 10
    found_mean, found = launch.statistics(x, None, None, None, groups=2, momentum=0.1)
    exact = x.double().unflatten(0, (2, -1))
    variance, expected = torch.var_mean(exact, dim=(1, 3, 4), correction=0)
    eps = torch.finfo(torch.float32).eps
    assert (found_mean - expected).abs().max() <= 2 * eps * abs(mean)
    assert (found / variance - 1).abs().max() <= 8 * eps


@pytest.mark.parametrize(("mean", "kind"), todays(list(itertools.product([1e3, -1e4], KINDS)), 2), ids=str)
def test_no_digits_are_lost_in_any_kind_of_call(monkeypatch, mean, kind):
    few_programs(monkeypatch, 16)
    check((4, 24, 9, 8), 2, torch.float32, *kind, mean=mean)


def test_an_outlier_in_the_first_row_costs_few_digits(monkeypatch):
    """The hardest case of counting from a place's first value: T values, all but one of them as far away as it.

    With u = eps / 2 and the distance D, the mean's error after t values is at most u D t / 2, the difference's in the
    next one u D (t / 2 + 1), and it enters M, which is D^2, by 2 D / t times that. With the additions to M themselves,
    u each, the relative error is below u (2 T + 2 ln T + 5), in the first order: 57 eps for T = 50, were all roundings
    on one side. As they fall, 3 eps is usual and 12 the most of 192 channels; sums of squared distances alone have
    lost a factor of D^2 / variance = 3,200 and more.
    """
    few_programs(monkeypatch, 4)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 40, 40).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 1e4
    assert shape_of(x, 1).tiles == 50
    _, found = launch.statistics(x, None, None, None, groups=1, momentum=0.1)
    variance = x.double().var(dim=(0, 2, 3), correction=0)
    error = (found[0] / variance - 1).abs() / torch.finfo(torch.float32).eps
    assert error.max() <= 16
    assert error.mean() <= 4


def test_constant_channels():
    """Variance 0, also where the square of the value overflows."""
    for value in (0.0, 3.7, 1e30):
        x = torch.full((4, 16, 20, 20), value).contiguous(memory_format=torch.channels_last)
        mean, variance = launch.statistics(x, None, None, None, groups=2, momentum=0.1)
        torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-6, atol=0)
        assert (variance <= (1e-6 * value) ** 2).all()


@pytest.mark.parametrize(("relu", "added"), KINDS)
def test_nan_stays_in_its_group_and_channel(relu, added):
    x, weight, bias, r = inputs((6, 20, 5, 7), torch.float32)
    x[3, 4, 2, 2] = float("nan")
    x, r = x.requires_grad_(), r.requires_grad_()
    settings = {"groups": 3, "relu": relu, "backend": "triton"}
    y = batch_norm(x, weight, bias, None, None, residual=r if added else None, **settings)
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[2:4, 4] = True
    assert torch.equal(y.isnan(), hit)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient.isnan(), hit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_that_of_the_output(monkeypatch, dtype):
    """Recomputed from x, it is that of y to the last place: no gradient where y is 0, all of it elsewhere."""
    few_programs(monkeypatch, 16)
    x, weight, _, _ = inputs((4, 16, 12, 12), dtype)
    bias = torch.zeros(16)
    x[:, :, ::2] = 1  # about the mean: y is near 0
    mean, variance = launch.statistics(x, None, None, None, groups=2, momentum=0.1)
    y = launch.apply(x, mean, variance, weight, bias, None, relu=True, eps=1e-5)
    up = torch.ones_like(x)
    settings = {"relu": True, "training": False, "eps": 1e-5}
    of_x, _, _, of_bias = launch.backward(up, x, None, mean, variance, weight, bias, **settings)
    assert torch.equal(of_x != 0, (y > 0) & (weight != 0)[:, None, None])
    assert torch.equal(of_bias, (y > 0).sum(dim=(0, 2, 3)).float())


def test_each_byte_is_moved_once():
    """Numbers loaded and stored by the kernels, counted in the interpreter, are the passes that the launcher states."""
    from triton.runtime.interpreter import interpreter_builder as builder

    x, weight, bias, r = inputs((6, 70, 9, 9), torch.float32)
    up, y = torch.randn_like(x), torch.rand_like(x)
    moved = {"load": 0, "store": 0}
    originals = builder.create_masked_load, builder.create_masked_store
    count_of = {}

    def inside(pointers, mask, kind):
        address = pointers.data[mask.data]
        for begin, end in count_of["ranges"]:
            moved[kind] += int(((address >= begin) & (address < end)).sum())

    def load(ptrs, mask, *rest):
        inside(ptrs, mask, "load")
        return originals[0](ptrs, mask, *rest)

    def store(ptrs, value, mask, *rest):
        inside(ptrs, mask, "store")
        return originals[1](ptrs, value, mask, *rest)

    large = [x, r, up, y]
    made = launch.empty_like

    def remembered(like):
        large.append(made(like))
        count_of["ranges"] = [(value.data_ptr(), value.data_ptr() + value.nbytes) for value in large]
        return large[-1]

    launch.empty_like = remembered
    builder.create_masked_load, builder.create_masked_store = load, store
    count_of["ranges"] = [(value.data_ptr(), value.data_ptr() + value.nbytes) for value in large]

    def passes():
        found = tuple(value / x.numel() for value in moved.values())
        moved.update(load=0, store=0)
        return found

    try:
        mean, variance = launch.statistics(x, None, None, None, groups=2, momentum=0.1)
        assert passes() == (1, 0)
        launch.apply(x, mean, variance, weight, bias, None, relu=True, eps=1e-5)
        assert passes() == (1, 1)
        launch.apply(x, mean, variance, weight, bias, r, relu=True, eps=1e-5)
        assert passes() == (2, 1)
        for relu, output, expected in ((False, None, (4, 1)), (True, None, (4, 1)), (True, y, (5, 2))):
            launch.backward(up, x, output, mean, variance, weight, bias, relu=relu, training=True, eps=1e-5)
            assert passes() == expected
    finally:
        launch.empty_like = made
        builder.create_masked_load, builder.create_masked_store = originals


def test_kinds_are_all():
    assert set(KINDS) == set(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_call_equals_the_operators_that_a_compiler_sees(monkeypatch, kind):
    """Training calls the kernels directly; with something that traces it goes through the operators."""
    relu, added = kind
    x, weight, bias, r = inputs((4, 24, 5, 3), torch.bfloat16)
    up, (calls, whole) = torch.randn(x.shape).bfloat16(), ([], ops._normalise)
    monkeypatch.setattr(ops, "_normalise", lambda *given: calls.append(1) or whole(*given))

    def step():
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias, r)]
        mean, variance, tracked = torch.zeros(24), torch.ones(24), torch.zeros((), dtype=torch.int64)
        settings = {"groups": 2, "relu": relu, "num_batches_tracked": tracked, "backend": "triton"}
        y = batch_norm(*leaves[:3], mean, variance, residual=leaves[3] if added else None, **settings)
        gradients = torch.autograd.grad(y, leaves[: 3 + added], up)
        return [y.detach(), *gradients, mean, variance, tracked]

    direct = step()
    assert not calls
    monkeypatch.setattr(ops, "traced", lambda x: True)
    for one, other in zip(direct, step(), strict=True):
        assert torch.equal(one, other)
    assert calls


@pytest.mark.parametrize("training", [True, False])
def test_strides_of_parameters_and_statistics_change_nothing(training):
    """The kernels read the number of a channel at its index, whatever the strides."""
    for expected, found in zip(*results_by_strides("triton", training=training), strict=True):
        assert torch.equal(expected, found)


def test_launches_go_to_the_device_of_x(monkeypatch):
    """All memory of the kernels is taken in a launcher, so each place says which device was current there."""
    current, places = devices_entered(monkeypatch), []

    def recorded(true):
        return lambda *shape, **options: places.append(list(current)) or true(*shape, **options)

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(launch, name, recorded(getattr(launch, name)))
    x, weight, bias, r = inputs((4, 8, 3, 3), torch.float32)
    y = batch_norm(x.requires_grad_(), weight, bias, None, None, groups=2, relu=True, residual=r, backend="triton")
    forward = len(places)
    y.sum().backward()
    assert 0 < forward < len(places)
    assert all(len(found) == 1 and found[0].shape == x.shape for found in places)


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = inputs((4, 8, 3, 3), torch.float32)
    x.requires_grad_()
    y = batch_norm(x, weight, bias, torch.zeros(8), torch.ones(8), groups=2, backend="triton")
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("relu", [False, True])
def test_residual_and_gradient_of_any_layout(relu):
    x, weight, bias, residual = inputs((4, 12, 3, 5), torch.float32)
    given = torch.arange(5.0).expand_as(x)
    leaves = x.requires_grad_(), residual.requires_grad_()

    def results(residual, gradient):
        y = batch_norm(x, weight, bias, None, None, residual=residual, relu=relu, groups=2, backend="triton")
        return y, *torch.autograd.grad(y, leaves, gradient)

    expected = results(residual, given.contiguous(memory_format=torch.channels_last))
    for one, other in zip(results(residual.contiguous(), given), expected, strict=True):
        assert torch.equal(one, other)
