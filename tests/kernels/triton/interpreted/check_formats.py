"""Float32 multiplied in three products of halves, as on devices that have tensor cores for them.

The interpreter multiplies no bfloat16, so that the weights are multiplied as they are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from torch.nn.functional import normalize

from synco_fast.kernels import Negatives
from synco_fast.kernels.triton import config, launch
from synco_fast.kernels.validation import Inputs
from tests.support.rotation import todays


# At 24 numbers q is split beforehand, at 80 a piece at a time.
@pytest.mark.parametrize("dim", todays([24, 80]))
def test_three_products(monkeypatch, answer, within, dim):
    q, queue = (normalize(torch.randn(rows, dim), dim=1) for rows in (2, 200))
    queue[::50] = q[0]
    inputs = Inputs(q, normalize(q + 0.1 * torch.randn(2, dim), dim=1), queue).guarded()
    negatives, settings = Negatives(hard=8, mixed=2), {"temperature": 0.07, "seed": 3, "step": 7}
    exact, plain = (answer(inputs, negatives, dtype, **settings) for dtype in (torch.float64, torch.float32))
    seen = []
    formats = replace(config.FORMATS["ieee"], three=tl.float16, margin=config.FORMATS["three"].margin)
    monkeypatch.setitem(config.FORMATS, "ieee", formats)
    monkeypatch.setattr(launch, "form_of", lambda *given: seen.append(config.form_of(*given)) or seen[-1])
    found = launch.contrast_and_gradient(*inputs, negatives, **settings)
    assert [form.three for form in seen] == [tl.float16]
    assert (seen[0].piece >= dim) == (dim == 24)
    within(found.loss, plain.contrast.loss, exact.contrast.loss, "loss", 16)
    within(found.gradient, plain.gradient, exact.gradient, "gradient", 64)
    assert torch.equal(found.queue_rank, exact.contrast.statistics.queue_rank)
