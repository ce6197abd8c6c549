from __future__ import annotations

import warnings

import pytest
import torch

from synco_fast.kernels import momentum, momentum_update
from synco_fast.kernels.triton import momentum as kernel
from tests.support.devices import devices_entered


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch):
    monkeypatch.setattr(momentum, "_plans", {})
    momentum._note.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_tensors_and_nothing_else(dtype, on_device):
    sizes = [1, 7, kernel.BLOCK, kernel.BLOCK + 1, 0, 2 * kernel.BLOCK, 3 * kernel.BLOCK - 5]
    # One buffer with gaps of a guard value, which no program may touch; the second size ends the alignment.
    room = torch.full((sum(sizes) + 16 * len(sizes),), 77.0, dtype=dtype)
    keys, begin = [], 0
    for size in sizes:
        keys.append(room[begin : begin + size])
        keys[-1].normal_()
        begin += size + 16
    queries = [torch.randn(size).to(dtype) for size in sizes]
    expected = [0.99 * k.double() + 0.01 * q.double() for k, q in zip(keys, queries, strict=True)]
    momentum_update(keys, queries, torch.tensor(0.99, dtype=torch.float64) if on_device else 0.99, backend="triton")
    for k, wanted in zip(keys, expected, strict=True):
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(k.double(), wanted, rtol=bound, atol=bound)
    assert room.eq(77).sum() == 16 * len(sizes)
    (plan,) = momentum._plans.values()
    assert set(plan.tables) == {True, False}
    assert sum(len(tables.targets) for tables in plan.tables.values()) == 6


def test_ends_of_the_range_and_equal_tensors_are_exact():
    keys, queries = [torch.randn(5000)], [torch.randn(5000)]
    before = keys[0].clone()
    momentum_update(keys, queries, 1.0, backend="triton")
    assert torch.equal(keys[0], before)
    momentum_update(keys, [before], 0.999, backend="triton")
    assert torch.equal(keys[0], before)


def test_weights_are_as_exact_as_those_of_foreach():
    # 1 - m is a small number of few digits where m is rounded first.
    keys, queries = [torch.zeros(10)], [torch.ones(10)]
    momentum_update(keys, queries, 0.9999, backend="triton")
    torch.testing.assert_close(keys[0], torch.full((10,), 1e-4), rtol=1e-6, atol=0)


def test_orders_in_memory():
    image = torch.randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last)
    keys = [image.clone(memory_format=torch.preserve_format), torch.randn(6, 4).T, torch.randn(4, 3, 5, 2)]
    queries = [torch.randn_like(image), torch.randn(6, 4).T, torch.randn_like(image)]
    expected = [0.5 * (k + q) for k, q in zip(keys, queries, strict=True)]
    with pytest.warns(UserWarning, match="the momentum update uses foreach: a tensor is not dense in memory, or its"):
        momentum_update(keys, queries, 0.5, backend="triton")
    for k, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(k, wanted)


def test_plans_are_kept_and_few():
    pairs = [([torch.ones(3)], [torch.ones(3)]) for _ in range(12)]
    momentum_update(*pairs[0], 0.5, backend="triton")
    (first,) = momentum._plans.values()
    momentum_update(*pairs[0], 0.5, backend="triton")
    assert list(momentum._plans.values()) == [first]
    for pair in pairs[1:]:
        momentum_update(*pair, 0.5, backend="triton")
    assert len(momentum._plans) == 8
    assert first not in momentum._plans.values()


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    current, launched = devices_entered(monkeypatch), []

    class Launch:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(list(current))

    monkeypatch.setattr(kernel, "_update", Launch())
    plan = kernel.Plan([torch.ones(3)], [torch.ones(3)])
    kernel.update(plan, 0.5)
    assert launched == [[plan.tables[True].targets]]
