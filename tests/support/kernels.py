"""Processes that see the kernels in one way: what Triton does is decided where it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def check_interpreted(file: Path, **variables: str) -> None:
    """Run the checks of a file in Triton's interpreter, with these environment variables."""
    _check(file, {"TRITON_INTERPRET": "1", **variables})


def check_compiled(file: Path, capability: int, *options: str) -> None:
    """Run the checks of a file as compiled for a GPU that is not there, with these options of pytest."""
    # The checks' conftest.py reads the capability.
    _check(file, {"TRITON_INTERPRET": "0", "SYNCO_FAST_CAPABILITY": str(capability)}, *options)


def _check(file: Path, variables: dict[str, str], *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "python_files=check_*.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def lines_of_compiler(script: Path, *words: str) -> list[str]:
    """The lines that a script prints which compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.splitlines()
