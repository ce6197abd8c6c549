"""Every kernel compiled as the launcher would launch it, for three generations of devices, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_all.py"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {
        *("sample", "rank", "scan", "select", "fill", "choose", "mix", "reduce", "_update"),
    }
    spilled = [line for line in lines if "stack 0 " not in line]
    assert not spilled, "\n".join(spilled)
