"""Every kernel compiled as the launcher would launch it, without a device: one of three generations each day.

``SYNCO_FAST_ALL=1`` takes all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rotation import todays

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_all.py"
KERNELS = {"partial_statistics", "finish_statistics", "normalise", "partial_sums", "finish_sums", "of_input"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays([80, 90, 100]))
def test_no_local_memory_at_any_layer_of_a_resnet(capability):
    """In bfloat16 and eight groups; `--wide` adds float16, float32, one group and odd channel counts."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    compiled = [line for line in lines if not line.startswith("done")]
    assert {line.split()[0] for line in compiled} == KERNELS
    assert len(lines) - len(compiled) == 10, "every shape of ResNet-18 and ResNet-50"
    spilled = [line for line in compiled if "stack 0 local 0 " not in line]
    assert not spilled, "\n".join(spilled)
