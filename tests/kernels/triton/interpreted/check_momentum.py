from __future__ import annotations

import pytest
import torch

from synco_fast.kernels.triton import momentum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_tensors_and_nothing_else(dtype):
    sizes = [1, 7, momentum.BLOCK, momentum.BLOCK + 1, 0, 3 * momentum.BLOCK - 5]
    # One buffer with gaps of a guard value, which no program may touch.
    room = torch.full((sum(sizes) + 16 * len(sizes),), 77.0, dtype=dtype)
    keys, begin = [], 0
    for size in sizes:
        keys.append(room[begin : begin + size])
        keys[-1].normal_()
        begin += size + 16
    queries = [torch.randn(size).to(dtype) for size in sizes]
    expected = [0.99 * k.double() + 0.01 * q.double() for k, q in zip(keys, queries, strict=True)]
    plan = momentum.Plan(keys, queries)
    momentum.update(plan, 0.99)
    for k, wanted in zip(keys, expected, strict=True):
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(k.double(), wanted, rtol=bound, atol=bound)
    assert room.eq(77).sum() == 16 * len(sizes)
    assert plan.key == momentum.addresses(keys, queries)
    assert plan.key != momentum.addresses(queries, keys)


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    from contextlib import contextmanager

    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Launch:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(momentum, "_update", Launch())
    plan = momentum.Plan([torch.ones(3)], [torch.ones(3)])
    momentum.update(plan, 0.5)
    assert launched == [[plan.targets]]
