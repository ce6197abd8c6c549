"""Break the kernels in ten ways, one at a time, and see that the tests catch each.

Works on a copy of the folders, never on this one:

    python tests/kernels/mutation.py

Prints a line for each break; the exit code is 1 where one goes unnoticed or can no longer be made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CLOSED = ("tests/kernels/test_blockwise.py",)
OPS = ("tests/kernels/test_ops.py",)
LOSS = ("-o", "python_files=check_*.py", "tests/kernels/triton/interpreted/check_loss.py")
SELECTION = ("-o", "python_files=check_*.py", "tests/kernels/triton/interpreted/check_selection.py")


class Break(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str


BREAKS = (
    Break(
        "blockwise form: ties go to the larger queue index",
        "kernels/topk.py",
        "last = torch.from_numpy(np.partition(packed.numpy(), hard - 1, axis=1)[:, hard - 1 : hard])\n"
        "        kept = packed <= last\n",
        "last = torch.from_numpy(np.partition((packed ^ 0xFFFFFFFF).numpy(), hard - 1, axis=1)[:, hard - 1 : hard])\n"
        "        kept = packed ^ 0xFFFFFFFF <= last\n",
        CLOSED,
        "selection",
    ),
    Break(
        "blockwise form: rows with too many candidates are not selected again",
        "kernels/topk.py",
        "(self._count < needed) | (self._count > self._limit)",
        "self._count < needed",
        CLOSED,
        "selection",
    ),
    Break(
        "blockwise form: vectors are not normalised",
        "kernels/mixing.py",
        "squared.clamp(min=0).sqrt().clamp(min=_SMALLEST).reciprocal()",
        "torch.ones_like(squared)",
        CLOSED,
        "family",
    ),
    Break(
        "blockwise form: the weight of n_j goes to n_i",
        "kernels/mixing.py",
        "Along(self._index[name], part)",
        'Along(self._index["first"], part)',
        CLOSED,
        "family",
    ),
    Break(
        "blockwise form: sums are not rescaled when a larger similarity comes",
        "kernels/blockwise.py",
        "        self.total *= shrink\n",
        "",
        CLOSED,
        "dtypes",
    ),
    Break(
        "operator: the gradient of a row is multiplied by another row's",
        "kernels/ops.py",
        "gradient * loss[:, None]",
        "gradient * loss.flip(0)[:, None]",
        OPS,
        "back_ends",
    ),
    Break(
        "kernels: the last bit of each word of marks is dropped",
        "kernels/triton/scan.py",
        "b_bits = tl.where(kept, ",
        "b_bits = tl.where(kept & ((tl.arange(0, KEYS) % 32) != 31)[None, :], ",
        SELECTION,
        "ordinary or boundary",
    ),
    Break(
        "kernels: ties go to the larger queue index",
        "kernels/triton/select.py",
        "tl.cumsum(b_tie, 0) > tied - spare",
        "tl.cumsum(b_tie, 0) <= spare",
        SELECTION,
        "boundary",
    ),
    Break(
        "kernels: a segment that has run over is not noticed",
        "kernels/triton/select.py",
        " | (longest > SEGMENT)",
        "",
        SELECTION,
        "unevenly",
    ),
    Break(
        "kernels: masked keys stay in the softmax",
        "kernels/triton/scan.py",
        "tl.where(image[:, None] == queue_image[None, :], ",
        "tl.where(image[:, None] < -1, ",
        LOSS,
        "mask",
    ),
)


def noticed(broken: Break) -> bool:
    """Whether the tests fail on a copy with this break."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        package = copy / "synco_fast"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "synco_fast", package, ignore=ignore)
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignore)
        shutil.copytree(ROOT / "tests" / "kernels", copy / "tests" / "kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "synco_fast" / broken.file
        text = file.read_text()
        if text.count(broken.old) != 1:
            raise LookupError(f"{broken.file}: found {text.count(broken.old)} places to break, expected 1")
        file.write_text(text.replace(broken.old, broken.new))
        environment = os.environ | {"PYTHONPATH": name, "OMP_NUM_THREADS": "1"}
        if "-o" in broken.tests:
            environment["TRITON_INTERPRET"] = "1"
        # What an editable install adds would come before PYTHONPATH's copy; taking it out keeps the copy first.
        start = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
        start += "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        command = [sys.executable, "-c", start, "-q", "-x", "-p", "no:cacheprovider", *broken.tests, "-k", broken.only]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1 and "failed" in done.stdout


def main() -> int:
    """Make each break, print what came of it."""
    missed = 0
    for tests, only in ((CLOSED, "selection or family"), (SELECTION, "boundary"), (LOSS, "mask")):
        if noticed(Break("nothing", "kernels/reference.py", "class Contrast", "class Contrast", tests, only)):
            print(f"the tests fail on unbroken code: {' '.join(tests)} -k {only!r}")
            return 1
    for number, broken in enumerate(BREAKS, 1):
        try:
            result = "caught" if noticed(broken) else "NOT CAUGHT"
        except LookupError as error:
            result = f"CANNOT BE MADE: {error}"
        missed += result != "caught"
        print(f"{number:2} {result:10} {broken.what}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
