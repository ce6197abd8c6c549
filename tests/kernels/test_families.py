"""Further families are a row of the table each: every backend then computes them, on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import synco_fast.kernels

ROOT = Path(__file__).resolve().parents[2]

ROW = """    Family(
        "swung",
        41,
        "Away from one hard negative towards another, the query and noise",
        "t n_i - n_j / 2 + 0.1 e + kappa (q + sign(q))",
        vector=lambda q, n_i, n_j, t, e, negatives: (
            t * n_i - n_j / 2 + 0.1 * e + negatives.kappa * q + negatives.kappa * q.sign()
        ),
        mixture=lambda negatives: Mixture(
            q=Affine(negatives.kappa, 0),
            first=Affine(0, 1),
            second=Affine(-0.5, 0),
            noise=0.1,
            sign=negatives.kappa,
        ),
        range=(0.2, 0.8),
        strength=("kappa", 0.3),
        paired=True,
        noisy=True,
    ),
    Family(
        "turned",
        42,
        "The same without noise and sign",
        "t n_i - n_j / 2 + 0.3 q",
        vector=lambda q, n_i, n_j, t, e, negatives: t * n_i - n_j / 2 + 0.3 * q,
        mixture=lambda negatives: Mixture(q=Affine(0.3, 0), first=Affine(0, 1), second=Affine(-0.5, 0)),
        range=(0.2, 0.8),
        paired=True,
    ),
)


if TYPE_CHECKING:
"""

SCRIPT = """
import importlib.util, os, sys
import torch
import synco_fast.kernels
assert synco_fast.kernels.__file__.startswith(os.getcwd()), synco_fast.kernels.__file__
from synco_fast.kernels import FAMILIES, Negatives, blockwise, ops, synthetic_contrast, validation
from synco_fast.kernels.validation import Case, validate

assert [family.name for family in FAMILIES][-2:] == ["swung", "turned"]
assert Negatives.synco().swung == 0 and Negatives.synco().synthetic == 960
swung = Negatives(hard=9, mixed=3, swung=11, swung_range=(0.3, 0.4), kappa=0.25)
assert ops._describe(ops._counts(swung), ops._numbers(swung), "released") == swung
backends = ["reference", "blockwise"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
turned = Negatives(hard=9, mixed=3, turned=21)
for negatives in (swung, Negatives(hard=9, swung=11), turned):
    # In bfloat16 tensor cores sum those without noise and sign.
    dtype = torch.bfloat16 if negatives.turned else torch.float32
    case = Case(2, 130, 24, 9, negatives, "further", dtype, 0.2, peaked=False)
    for verdict in validate(backends, [case], torch.device("cpu")):
        assert not verdict.misses, verdict.as_dict()
        print(verdict.backend)
inputs = validation.exact_inputs(2, 130, 24)
settings = dict(temperature=0.2, seed=3, step=7)
plain = synthetic_contrast(*inputs, Negatives(hard=9, mixed=3), **settings)
for backend in backends:
    found = synthetic_contrast(*inputs, swung, **settings, backend=backend)
    assert found.statistics.synthetic.shape == (2, 8)
    assert found.statistics.synthetic[:, -2].isfinite().all() and (found.loss > plain.loss).all()
by_vectors = blockwise.contrast_and_gradient(*inputs, swung, **settings, by_vectors=True)
torch.testing.assert_close(by_vectors.loss, found.loss)
"""


@pytest.mark.slow
def test_one_row_makes_a_family(tmp_path):
    package, ignore = tmp_path / "synco_fast", shutil.ignore_patterns("__pycache__")
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(Path(synco_fast.kernels.__file__).parent, package / "kernels", ignore=ignore)
    table = package / "kernels" / "negatives.py"
    text, end = table.read_text(), ")\n\n\nif TYPE_CHECKING:\n"
    assert text.count(end) == 1
    table.write_text(text.replace(end, ROW))
    # What an editable install adds would come before the copy.
    start = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", start + SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = {"reference", "blockwise"}
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    else:
        expected.add("triton")
    assert set(done.stdout.split()) == expected
