"""CONTRIBUTING.md's recipes for an export format and an evaluation protocol, carried out on a copy of the package."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .support.layout import WITHOUT_EDITABLE, copy_package

FORMAT = '''
"""Names: a line for each tensor of the backbone."""

from pathlib import Path

from synco_fast.export.formats import Written
from synco_fast.export.load import Weights


def write(weights: Weights, folder: Path) -> Written:
    """Write ``names.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names.txt").write_text("\\n".join(weights.backbone))
    return ("names.txt",), {"tensors": float(len(weights.backbone))}, "open('names.txt').read()"
'''

PROTOCOL = '''
"""Spread: the mean standard deviation of the features of the held-out images."""

from synco_fast.evaluation.context import EvalOptions, open_context
from synco_fast.evaluation.features import extract_features


def evaluate_spread(checkpoint, options: EvalOptions, *, console):
    """The figures."""
    context = open_context(checkpoint, options)
    features = extract_features(context.backbone, context.held_out, context.recipe, device=context.device, workers=0)
    return {"spread": float(features.values.std(dim=0).mean())}
'''

COMMAND = '''
"""``synco-fast evaluate spread``."""

from synco_fast.commands.options import add_eval_options, eval_options


def add(commands):
    """Add ``synco-fast evaluate spread``."""
    command = commands.add("evaluate spread", _run, "Spread of the features.", "synco-fast evaluate spread runs/demo")
    add_eval_options(command)


def _run(options, console):
    from synco_fast.evaluation.spread import evaluate_spread

    console.print(f"spread {evaluate_spread(options.checkpoint, eval_options(options), console=console)['spread']:.4f}")
    return 0
'''


@pytest.fixture
def copy(tmp_path):
    """The package as a wheel lays it out, to be changed at will; and the command in it."""
    package = copy_package(tmp_path / "copy")
    start = (
        f"{WITHOUT_EDITABLE}"
        "import synco_fast; from synco_fast.cli import main\n"
        f"assert synco_fast.__file__.startswith({str(package)!r}), synco_fast.__file__\n"
        "sys.exit(main(sys.argv[1:]))"
    )

    def run(*words: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-c", start, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return package, run


@pytest.mark.slow
def test_a_file_makes_an_export_format(copy, make_run, tmp_path):
    package, run = copy
    (package / "export" / "formats" / "names.py").write_text(FORMAT.lstrip())
    run("export", make_run(), "--format", "names", "--out", tmp_path / "out")
    assert "conv1.weight" in (tmp_path / "out" / "names.txt").read_text().splitlines()
    assert "names.txt" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_two_files_and_a_name_make_an_evaluation_protocol(copy, make_run, image_folder):
    package, run = copy
    (package / "evaluation" / "spread.py").write_text(PROTOCOL.lstrip())
    (package / "commands" / "evaluate_spread.py").write_text(COMMAND.lstrip())
    table = package / "commands" / "__init__.py"
    table.write_text(
        table.read_text().replace("    evaluate_linear,\n", "    evaluate_linear,\n    evaluate_spread,\n")
    )
    said = run("evaluate", "spread", make_run(), "--data", image_folder)
    assert float(said.split()[-1]) > 0
    assert "spread" in run("evaluate", "--help")
