"""The kernels in Triton's interpreter: a process of its own, since the choice is made when Triton is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels import check_interpreted

pytest.importorskip("triton")

FILES = sorted(Path(__file__).parent.glob("interpreted/check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_under_the_interpreter(file):
    check_interpreted(file)
