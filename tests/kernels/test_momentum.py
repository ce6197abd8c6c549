from __future__ import annotations

import pytest
import torch

from synco_fast.kernels import momentum
from synco_fast.kernels.momentum import momentum_update


def pairs(dtype=torch.float32):
    shapes = [(3, 4), (1,), (), (5000,), (2, 3, 7)]
    return [torch.randn(shape).to(dtype) for shape in shapes], [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_against_the_formula(dtype):
    keys, queries = pairs(dtype)
    expected = [0.9 * k.double() + 0.1 * q.double() for k, q in zip(keys, queries, strict=True)]
    before = [q.clone() for q in queries]
    momentum_update(keys, queries, 0.9)
    for k, wanted in zip(keys, expected, strict=True):
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(k.double(), wanted, rtol=bound, atol=bound)
    assert all(torch.equal(q, old) for q, old in zip(queries, before, strict=True))


def test_ends_of_the_range_are_exact():
    keys, queries = pairs()
    before = [k.clone() for k in keys]
    momentum_update(keys, queries, 1.0)
    assert all(torch.equal(k, old) for k, old in zip(keys, before, strict=True))
    momentum_update(keys, queries, 0.0)
    assert all(torch.equal(k, q) for k, q in zip(keys, queries, strict=True))


def test_equal_tensors_stay_as_they_are():
    keys, _ = pairs()
    queries = [k.clone() for k in keys]
    for _ in range(50):
        momentum_update(keys, queries, 0.999)
    assert all(torch.equal(k, q) for k, q in zip(keys, queries, strict=True))


def test_parameters_buffers_and_views_in_place():
    query, key = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    query(torch.randn(8, 4))
    expected = [0.5 * (k + q).detach() for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    momentum_update([*key.parameters(), *key.buffers()], [*query.parameters(), *query.buffers()], 0.5)
    for k, wanted in zip(key.parameters(), expected, strict=True):
        torch.testing.assert_close(k.detach(), wanted)
        assert k.grad_fn is None
    assert key[1].num_batches_tracked.item() == 1
    torch.testing.assert_close(key[1].running_mean, query[1].running_mean / 2)
    base = torch.zeros(4, 6)
    momentum_update([base.T[::2]], [torch.ones(3, 4)], 0.75)
    assert base.T[::2].eq(0.25).all()
    assert base.T[1::2].eq(0).all()


@pytest.mark.parametrize(
    ("k", "q", "m", "error", "line"),
    [
        ([], [], 1.5, ValueError, "m: found 1.5, expected a number from 0 to 1"),
        ([], [], float("nan"), ValueError, "m: found nan, expected a number from 0 to 1"),
        ([], [], True, ValueError, "m: found True, expected a number from 0 to 1"),
        (
            [],
            [],
            torch.ones(1),
            ValueError,
            r"m: found torch.float32 of shape \(1,\), expected a 0-dimensional float",
        ),
        ([torch.ones(2)], [], 0.5, ValueError, "params_q: found 0 tensors, expected 1, as many as params_k"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, ValueError, r"params_q\[0\]: found shape \(3,\), expected \(2,\)"),
        ([torch.ones(2)], [torch.ones(2).double()], 0.5, TypeError, r"params_q\[0\]: found torch.float64 on cpu"),
    ],
)
def test_bad_input(k, q, m, error, line):
    with pytest.raises(error, match=f"^{line}"):
        momentum_update(k, q, m)


def test_momentum_may_be_a_tensor():
    keys, queries = pairs()
    expected = [k.clone() for k in keys]
    momentum_update(expected, queries, 0.9)
    momentum_update(keys, queries, torch.tensor(0.9))
    torch.testing.assert_close(keys, expected)


def test_the_kernel_hands_over_with_one_note(monkeypatch):
    keys, queries = pairs()
    expected = [k.clone() for k in keys]
    momentum_update(expected, queries, 0.9)
    momentum._note.cache_clear()
    with pytest.warns(UserWarning, match="^the momentum update uses foreach: (a tensor is on cpu; the|Triton cannot)"):
        momentum_update(keys, queries, 0.9, backend="triton")
    assert all(torch.equal(k, wanted) for k, wanted in zip(keys, expected, strict=True))
    with pytest.raises(ValueError, match=r"^backend: found 'fused', expected auto, foreach, triton"):
        momentum_update(keys, queries, 0.9, backend="fused")
