"""The batch norm's kernels on a GPU at full size: rounding, repeats, graphs, compilation, memory."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels.norm import batch_norm, ops
from synco_fast.kernels.norm.validation import norm_cases, validate_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPE = (64, 256, 28, 28)


class Layer:
    """A norm with everything that it has, and a step of it."""

    def __init__(self, dtype=torch.bfloat16, shape=SHAPE):
        make = {"device": "cuda", "dtype": dtype}
        self.x, self.r, self.up = (
            torch.randn(shape, **make).contiguous(memory_format=torch.channels_last) for _ in range(3)
        )
        self.weight, self.bias = torch.randn(2, shape[1], device="cuda")
        self.mean, self.variance = torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")
        self.tracked = torch.zeros((), dtype=torch.int64, device="cuda")
        self.leaves = [value.requires_grad_() for value in (self.x, self.weight, self.bias, self.r)]

    def forward(self, x, weight, bias, r):
        running = self.mean, self.variance
        settings = {"groups": 8, "relu": True, "num_batches_tracked": self.tracked, "backend": "triton"}
        return batch_norm(x, weight, bias, *running, residual=r, **settings)

    def step(self):
        y = self.forward(*self.leaves)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.up)]


@DTYPES
def test_within_the_bounds_of_the_formula(dtype):
    verdicts = validate_norm(norm_cases([dtype], large=True), torch.device("cuda"))
    missed = [verdict.as_dict() for verdict in verdicts if verdict.misses]
    assert not missed, "\n".join(map(str, missed))


@DTYPES
def test_repeats_and_poison(dtype, monkeypatch):
    from synco_fast.kernels.norm.triton import launch

    layer = Layer(dtype)
    first = layer.step()
    monkeypatch.setattr(
        launch, "empty", lambda *shape, dtype=torch.float32, device: torch.full(shape, torch.nan, device=device)
    )
    monkeypatch.setattr(
        launch, "empty_like", lambda x: torch.full_like(x, torch.nan, memory_format=torch.channels_last)
    )
    for _ in range(20):
        for one, other in zip(first, layer.step(), strict=True):
            assert torch.equal(one, other)


def test_cuda_graph_without_a_wait_for_the_host():
    layer = Layer()
    layer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer.step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step()
    fresh = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.x.copy_(fresh)
    before = layer.tracked.clone()
    graph.replay()
    assert layer.tracked == before + 1
    for one, other in zip(captured, layer.step(), strict=True):
        assert torch.equal(one, other)


def test_compiled_equals_eager():
    layer = Layer()
    compiled = torch.compile(layer.forward, fullgraph=True)
    expected = layer.step()
    y = compiled(*layer.leaves)
    found = [y.detach(), *torch.autograd.grad(y, layer.leaves, layer.up)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_opcheck():
    layer = Layer(shape=(4, 64, 5, 5))
    numbers = torch.zeros(2, 64, device="cuda"), torch.ones(2, 64, device="cuda")
    torch.library.opcheck(ops._normalise, (layer.x, *numbers, *layer.leaves[1:], True, True, 1e-5))
    torch.library.opcheck(ops._statistics, (layer.x.detach(), layer.mean, layer.variance, layer.tracked, 2, 0.1))


def test_only_the_output_is_kept():
    """Beside x, r and y nothing of their size lives from forward to backward."""
    layer = Layer()
    layer.step()
    before = torch.cuda.memory_allocated()
    y = layer.forward(*layer.leaves)
    assert torch.cuda.memory_allocated() - before < 1.05 * y.nbytes
