"""What the benchmarks import, and what of them is installed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from synco_fast.bench import subjects
from tests.support.layout import folders

ROOT = Path(__file__).resolve().parents[2]
#: A finder that knows of no pydantic, and of no configuration, which rests on it.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core") or name == "synco_fast.config":
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
from synco_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(code, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_choices_are_parsed_without_pytorch():
    done = run("import sys, synco_fast.bench.subjects; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    done = run("import sys, synco_fast.api, synco_fast.commands; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_subject_has_a_text_and_no_name_twice():
    assert all(subjects.BACKENDS.values())
    assert not set(subjects.BACKENDS) & set(subjects.FIELD)
    assert set(subjects.VALIDATED) <= set(subjects.BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["validate", "--device", "cpu", "--rows", "2", "--length", "64", "--dim", "8", "--hard", "5"],
        ["bench", "loss", "--device", "cpu", "--rows", "2", "--length", "64", "--backends", "topk", "--rounds", "1"],
    ],
    ids=["validate", "bench loss"],
)
def test_validation_and_the_loss_need_no_pydantic(words):
    done = run(BLOCKED, *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_studies_are_not_installed(monkeypatch):
    import setuptools

    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **named: found.update(named))
    runpy.run_path(str(ROOT / "setup.py"))
    assert found["package_dir"] == folders(), "what links and copies are made by is what is installed"
    packages = [name for name in found["packages"] if name.startswith("synco_fast.bench")]
    assert packages == ["synco_fast.bench", "synco_fast.bench.baselines", "synco_fast.bench.cost"]
