"""Every kernel compiled as the launcher would launch it, without a device: one of three generations each day.

``SYNCO_FAST_ALL=1`` takes all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels import lines_of_compiler
from tests.support.rotation import todays

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_all.py"
KERNELS = {"partial_statistics", "finish_statistics", "normalise", "partial_sums", "finish_sums", "of_input"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays([80, 90, 100]))
def test_no_local_memory_at_any_layer_of_a_resnet(capability):
    """In bfloat16 and eight groups; `--wide` adds float16, float32, one group and odd channel counts."""
    lines = lines_of_compiler(SCRIPT, str(capability))
    compiled = [line for line in lines if not line.startswith("done")]
    assert {line.split()[0] for line in compiled} == KERNELS
    assert len(lines) - len(compiled) == 10, "every shape of ResNet-18 and ResNet-50"
    spilled = [line for line in compiled if "stack 0 local 0 " not in line]
    assert not spilled, "\n".join(spilled)
