"""The kernels of views, batch norm and EMA update as they are compiled for a device, run without one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from synco_fast.kernels.norm import ops, triton, validation
from synco_fast.kernels.norm.validation import NormCase, validate_norm
from synco_fast.kernels.triton import momentum
from synco_fast.kernels.views import launch
from synco_fast.kernels.views.validation import ViewsCase, validate_views
from tests.support.ptx_machine import Fault, emulated
from tests.support.rotation import todays

CPU = torch.device("cpu")
CAPABILITIES = [80, 90]
NORMS = [
    NormCase((8, 24, 5, 5), 2, True, True, torch.bfloat16),
    NormCase((6, 70, 3, 3), 3, True, False, torch.float32, mean=1000.0),
    NormCase((6, 70, 3, 3), 1, False, True, torch.float16, training=False),
]
VIEWS = [
    ViewsCase(size=24, views=4, dtype=torch.uint8, image=(30, 41)),
    ViewsCase(size=23, views=3, dtype=torch.bfloat16, image=(20, 50), channels=1, planar=True),
    ViewsCase(size=16, views=4, dtype=torch.float32, image=(33, 9), planar=True),
]


@pytest.mark.parametrize("capability", todays(CAPABILITIES))
@pytest.mark.parametrize("case", todays(NORMS), ids=str)
def test_the_batch_norm(monkeypatch, capability, case):
    for module in (ops, validation):
        monkeypatch.setattr(module, "unserved_by_triton", lambda x: None)
    with emulated(capability) as emulator:
        # The running statistics, read and updated in place.
        emulator.copies = {"partial_statistics", "finish_statistics"}
        (verdict,) = validate_norm([case], CPU, ["triton"])
    assert not verdict.misses, verdict.as_dict()
    assert {name for name, _, _ in emulator.launches} >= {"normalise", "partial_sums", "finish_sums", "of_input"}


def test_programs_do_not_read_the_batch_counter_that_one_of_them_writes():
    """Copies within a program are allowed for; other programs would read what may have been written already."""
    x = torch.randn(8, 24, 5, 5).contiguous(memory_format=torch.channels_last)
    with emulated(80) as emulator:
        emulator.copies = {"partial_statistics", "finish_statistics"}
        tracked = torch.zeros((), dtype=torch.int64)
        mean, _ = triton.statistics(x, None, None, tracked, groups=2, momentum=0.1)
    assert tracked == 1
    torch.testing.assert_close(mean, x.view(2, 4, 24, 25).mean((1, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("capability", todays(CAPABILITIES[::-1]))
@pytest.mark.parametrize("case", todays(VIEWS), ids=str)
def test_views(monkeypatch, capability, case):
    monkeypatch.setattr(launch, "unserved_by_triton", lambda pixels: None)
    with emulated(capability):
        verdict = validate_views(case, CPU)
    assert not verdict.misses, verdict.as_dict()


def test_a_crop_out_of_the_pixels_is_noticed(monkeypatch):
    monkeypatch.setattr(launch, "unserved_by_triton", lambda pixels: None)
    real = launch.as_words

    def moved(parameters):
        return real(parameters | {"crop": parameters["crop"] + torch.tensor([10_000, 0, 0, 0])})

    monkeypatch.setattr(launch, "as_words", moved)
    with emulated(90), pytest.raises(Fault, match="out of bounds"):
        validate_views(VIEWS[0], CPU)


@pytest.mark.parametrize("dtype", todays([torch.float32, torch.bfloat16, torch.float16]), ids=str)
@pytest.mark.parametrize("capability", todays(CAPABILITIES))
def test_the_update_of_the_momentum_encoder(capability, dtype):
    sizes = [1, 4096, 5001]
    odd = [torch.randn(size + 1).to(dtype)[1:] for size in sizes]
    targets, sources = (
        [torch.randn(size).to(dtype) for size in sizes] + odd,
        [torch.randn(size).to(dtype) for size in 2 * sizes],
    )
    exact = [(k.float() + 0.25 * (q.float() - k.float())).to(dtype) for k, q in zip(targets, sources, strict=True)]
    plan = momentum.Plan(targets, sources)
    with emulated(capability) as emulator:
        # The tables hold addresses.
        known = {tensor.data_ptr(): emulator.address(tensor) for tensor in (*targets, *sources)}
        for aligned, tables in plan.tables.items():
            found = (torch.tensor([known[at] for at in column.tolist()]) for column in tables[:2])
            plan.tables[aligned] = tables._replace(**dict(zip(("targets", "sources"), found, strict=True)))
        momentum.update(plan, 0.25)
    for found, wanted in zip(targets, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0)
