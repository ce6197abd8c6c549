"""The kernels on a GPU at full size: rounding, order, graphs, compilation. Elsewhere the interpreter stands in."""

from __future__ import annotations

import pytest
import torch

from synco_fast.kernels import Negatives, draw, momentum_update, ops, synthetic_contrast
from synco_fast.kernels.validation import cases, exact_inputs, reference_answer, validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SETTINGS = {"temperature": 0.2, "seed": 3}
SHAPES = [
    (1, 4096, 64, 64),
    (7, 4097, 96, 1000),
    (255, 65536, 128, 1024),
    (256, 65536, 128, 1024),
    (1024, 16384, 256, 63),
    (64, 4096, 512, 4096),
    (33, 100, 130, 100),
]


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


def compute(inputs, negatives, step=7, backend="triton", **named):
    q = inputs.q.detach().requires_grad_()
    result = synthetic_contrast(q, inputs.k, inputs.queue, negatives, **SETTINGS | named, step=step, backend=backend)
    (gradient,) = torch.autograd.grad(result.loss.sum(), q)
    return result, gradient


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bounds_of_the_reference(cuda, dtype, shape):
    missed = [verdict for verdict in validate(["triton", "blockwise"], cases([shape], [dtype]), cuda) if verdict.misses]
    assert not missed, "\n".join(str(verdict.as_dict()) for verdict in missed)


def exact_choice(inputs, hard):
    """The N largest similarities of each row by float64 and a stable sort."""
    similarity = inputs.q.double() @ inputs.queue.double().T
    return similarity.sort(dim=1, descending=True, stable=True).values[:, :hard].mean(dim=1)


@pytest.mark.parametrize("kind", ["all equal", "boundary tie", "one block", "clustered", "descending"])
def test_selection_where_the_estimate_fails(cuda, kind):
    """Each beats a sampled threshold or a fixed buffer; the mean of Q^N shows what was chosen."""
    inputs = exact_inputs(64, 65536, 64, torch.float32).to(device=cuda)
    queue = inputs.queue
    if kind == "all equal":
        queue[:] = queue[0]
    elif kind == "boundary tie":
        queue[::9] = inputs.q[0]
        queue[1::9] = queue[4]
    elif kind == "one block":  # one split holds all the hard ones, none of them where the sample looks
        queue[5001:7001] = inputs.q[torch.arange(2000, device=cuda) % 64]
    elif kind == "clustered":
        queue[:20000] = (0.9 * inputs.q[0] * 128).round() / 128
    else:
        order = (inputs.q[0] @ queue.T).argsort(descending=True)
        queue[:] = queue[order]
    for hard in (1, 63, 1024):
        result, _ = compute(inputs, Negatives.synco(hard))
        torch.testing.assert_close(result.statistics.hard.double(), exact_choice(inputs, hard), rtol=0, atol=2e-6)
        plain = reference_answer(inputs, Negatives.synco(hard))
        torch.testing.assert_close(result.loss.detach().double(), plain.contrast.loss, rtol=0, atol=1e-4)


@DTYPES
def test_repeats_and_poison(cuda, dtype, monkeypatch):
    """Bit-equal whatever the memory held before."""
    from synco_fast.kernels.triton import launch as launcher

    inputs = exact_inputs(256, 65536, 128, dtype).to(device=cuda)
    first, gradient = compute(inputs, Negatives.synco())

    def poisoned(*shape, dtype=torch.float32, device):
        poison = float("nan") if dtype.is_floating_point else -(2**30) - 7
        return torch.full(shape, poison, dtype=dtype, device=device)

    monkeypatch.setattr(launcher, "empty", poisoned)
    for _ in range(20):
        again, same = compute(inputs, Negatives.synco())
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(gradient, same)
        assert torch.equal(first.statistics.rank, again.statistics.rank)


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(cuda, masked):
    """Captured once, replayed with other inputs and steps: what eager gives, bit for bit."""
    static = exact_inputs(256, 65536, 128, torch.bfloat16).to(device=cuda)
    step = torch.zeros((), dtype=torch.int64, device=cuda)
    ids = {}
    if masked:
        ids = {"image_ids": torch.arange(256, device=cuda), "queue_ids": torch.arange(65536, device=cuda) % 999}
    compute(static, Negatives.synco(), step=step, **ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute(static, Negatives.synco(), step=step, **ids)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, gradient = compute(static, Negatives.synco(), step=step, **ids)
    for seed in (1, 2):
        fresh = exact_inputs(256, 65536, 128, torch.bfloat16, seed=seed).to(device=cuda)
        for held, new in zip(static, fresh, strict=True):
            held.copy_(new)
        step.fill_(seed)
        graph.replay()
        eager, expected = compute(fresh, Negatives.synco(), step=seed, **ids)
        assert torch.equal(result.loss, eager.loss)
        assert torch.equal(gradient, expected)


def test_no_wait_for_the_host(cuda):
    inputs = exact_inputs(256, 65536, 128, torch.bfloat16).to(device=cuda)
    step = torch.zeros((), dtype=torch.int64, device=cuda)
    compute(inputs, Negatives.synco(), step=step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(inputs, Negatives.synco(), step=step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_equals_eager(cuda):
    inputs = exact_inputs(256, 65536, 128, torch.bfloat16).to(device=cuda)

    def loss(q, step):
        return synthetic_contrast(
            q, inputs.k, inputs.queue, Negatives.synco(), **SETTINGS, step=step, backend="triton"
        ).loss.mean()

    q, step = inputs.q.requires_grad_(), torch.tensor(7, device=cuda)
    compiled = torch.compile(loss, fullgraph=True)
    (expected,) = torch.autograd.grad(loss(q, step), q)
    (gradient,) = torch.autograd.grad(compiled(q, step), q)
    # The mean over rows is another program's when compiled; the loss itself is the same.
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled(q, step), loss(q, step), rtol=1e-6, atol=0)


def test_compiled_draws_equal_eager_ones(cuda):
    def drawn(step):
        found = draw(Negatives.synco(), 256, 128, seed=3, step=step, first_row=7, device=cuda)
        return [value for one in found.values() for value in one if value is not None]

    step = torch.tensor(7, device=cuda)
    for compiled, expected in zip(torch.compile(drawn, fullgraph=True)(step), drawn(step), strict=True):
        # Compiled, Box-Muller and a range are fused into other roundings.
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)


def test_opcheck(cuda):
    negatives = Negatives.synco(64)
    inputs = exact_inputs(5, 4096, 64).to(device=cuda)
    inputs.q.requires_grad_()
    counts, numbers = ops._counts(negatives), ops._numbers(negatives)
    settings = (counts, numbers, "released", 0.2, 3, 0, torch.tensor(7, device=cuda), 0, None, None, "triton")
    torch.library.opcheck(ops._contrast, (*inputs, *settings))


def test_scratch_is_small(cuda):
    """Beside inputs and outputs, at the published shape: the aim is 64 MiB."""
    inputs = exact_inputs(256, 65536, 128, torch.bfloat16).to(device=cuda)
    compute(inputs, Negatives.synco())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compute(inputs, Negatives.synco())
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


@DTYPES
def test_momentum_in_one_launch(cuda, dtype):
    shapes = [(1000, 2048), (64, 3, 7, 7), (1,), (0,), (4097,)]
    keys, queries = ([torch.randn(shape, device=cuda).to(dtype) for shape in shapes] for _ in range(2))
    expected = [k.clone() for k in keys]
    momentum_update(expected, queries, 0.99)
    momentum_update(keys, queries, torch.tensor(0.99, dtype=torch.float64, device=cuda), backend="triton")
    for k, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(k, wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
