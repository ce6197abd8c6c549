"""Shapes that are multiples of nothing, between guards: a number read past an input makes the result NaN.

SYNCO_FAST_CASES=100 checks that many shapes; SYNCO_FAST_SEED=7 others.
"""

from __future__ import annotations

import os

import pytest
import torch

from synco_fast.kernels.validation import random_cases, validate
from tests.support.rotation import todays

CPU = torch.device("cpu")
COUNT, SEED = int(os.environ.get("SYNCO_FAST_CASES", "5")), int(os.environ.get("SYNCO_FAST_SEED", "0"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name(case):
    return f"B={case.rows} K={case.length} D={case.dim} N={case.hard} {case.dtype} {'masked' * case.masked}"


CASES = random_cases(COUNT, DTYPES, rows=3, length=400, dim=128, seed=SEED)


@pytest.mark.parametrize("case", todays(CASES, 2) if COUNT == 5 else CASES, ids=name)
def test_random_shapes(case):
    (verdict,) = validate(["triton"], [case], CPU)
    assert not verdict.misses, verdict.as_dict()
