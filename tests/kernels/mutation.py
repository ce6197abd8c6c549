"""Break the kernels, one way at a time, and see that the tests notice each. The ways are in `breaks.py`.

Works on a copy of the folders, never on this one:

    python tests/kernels/mutation.py                # all of them
    python tests/kernels/mutation.py --sample 4     # four, others each day; --seed N for the same ones again

Prints a line for each break; the exit code is 1 where one goes unnoticed or can no longer be made.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from breaks import BLOCKWISE, BREAKS, LOSS, SELECTION, Break

from tests.support.layout import WITHOUT_EDITABLE, copy_package

#: A broken kernel that writes beyond its buffers may take the interpreter with it.
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}

ROOT = Path(__file__).resolve().parents[2]
#: Tests with their -k that pass where nothing is broken.
RUNS = ((BLOCKWISE, "selection or family"), (SELECTION, "boundary"), (LOSS, "mask"))


def noticed(broken: Break) -> bool:
    """Whether the tests fail on a copy with this break."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        package = copy_package(copy)
        ignore = shutil.ignore_patterns("__pycache__")
        for folder in ("kernels", "data", "support"):
            shutil.copytree(ROOT / "tests" / folder, copy / "tests" / folder, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = package / broken.file
        text = file.read_text()
        if text.count(broken.old) != 1:
            raise LookupError(f"{broken.file}: found {text.count(broken.old)} places to break, expected 1")
        file.write_text(text.replace(broken.old, broken.new))
        environment = os.environ | {"PYTHONPATH": name, "OMP_NUM_THREADS": "1", "SYNCO_FAST_ALL": "1"}
        if "-o" in broken.tests:
            environment["TRITON_INTERPRET"] = "1"
        start = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        command = [
            sys.executable,
            "-c",
            WITHOUT_EDITABLE + start,
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *broken.tests,
            "-k",
            broken.only,
        ]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode in _CRASHES:
            return True
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1 and "failed" in done.stdout


def chosen(sample: int | None, seed: int | None) -> list[Break]:
    """All breaks, or a few by seed, which is today's date where none is given."""
    if sample is None:
        return list(BREAKS)
    seed = datetime.date.today().toordinal() if seed is None else seed
    return random.Random(seed).sample(BREAKS, min(sample, len(BREAKS)))


def unbroken(runs: Sequence[tuple[tuple[str, ...], str]] = RUNS) -> bool:
    """Whether the tests pass where nothing is broken: else what they notice says nothing."""
    for tests, only in runs:
        if noticed(Break("nothing", "kernels/reference.py", "class Contrast", "class Contrast", tests, only)):
            print(f"the tests fail on unbroken code: {' '.join(tests)} -k {only!r}")
            return False
    return True


def report(breaks: Sequence[Break]) -> int:
    """Make each break, print what came of it; 1 where one goes unnoticed or cannot be made."""
    missed = 0
    for broken in breaks:
        try:
            result = "caught" if noticed(broken) else "NOT CAUGHT"
        except LookupError as error:
            result = f"CANNOT BE MADE: {error}"
        except RuntimeError as error:
            result = f"PROVES NOTHING: {str(error).strip().splitlines()[-1]}"
        missed += result != "caught"
        print(f"{result:10} {broken.what}", flush=True)
    return int(missed > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all breaks, or a sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="how many breaks to make; all by default")
    parser.add_argument("--seed", type=int, help="of the sample; the date by default")
    options = parser.parse_args(arguments)
    if options.sample is None and not unbroken():
        return 1
    return report(chosen(options.sample, options.seed))


if __name__ == "__main__":
    sys.exit(main())
