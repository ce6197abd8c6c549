"""Helpers of the experiments: calling ``synco-fast``, statistics over seeds, and the record."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from synco_fast.methods import METHODS as _REGISTRY
from synco_fast.methods import with_queue
from synco_fast.report.runs import mean_and_deviation
from synco_fast.runtime.files import read_json, write_json, write_text

__all__ = [
    "FASHION_MNIST",
    "METHODS",
    "OverSeeds",
    "call",
    "evaluate",
    "measured_on",
    "must",
    "over_seeds",
    "write_record",
]

#: Debian's location of the files.
FASHION_MNIST = "idx:/usr/share/datasets/fashion-mnist"
#: Titles of the compared methods.
METHODS = {name: _REGISTRY[name].title for name in with_queue()}
#: Mean, standard deviation and values over seeds.
OverSeeds = dict[str, Any]


def call(*words: object, threads: int = 1) -> tuple[int, str, float]:
    """Run ``synco-fast``. Returns its exit code, its standard error and the seconds it took."""
    said = [str(word) for word in words]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "synco_fast", *said],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"},
    )
    seconds = time.monotonic() - started
    print(f"{seconds:6.1f} s  {' '.join(said)}", flush=True)
    return done.returncode, done.stderr.strip(), seconds


def must(*words: object, threads: int = 1) -> None:
    """Run ``synco-fast``, and exit with its error if it fails."""
    code, said, _ = call(*words, threads=threads)
    if code:
        raise SystemExit(f"exit code {code}: {said}")


def evaluate(folder: Path, file: str, words: list[str]) -> dict[str, Any]:
    """Evaluate a run, unless the result exists.

    Args:
        folder: The run folder.
        file: Name of the result file of ``synco-fast evaluate``.
        words: Arguments after ``evaluate``, without the checkpoint.
    """
    result = folder / "evaluation" / f"{file}.json"
    if not result.exists():
        must("evaluate", words[0], folder, *words[1:], "--workers", 0)
    return read_json(result)


def over_seeds(values: list[float]) -> OverSeeds:
    """Mean, sample standard deviation and values."""
    mean, deviation = mean_and_deviation(values) or (None, None)
    return {"mean": mean, "deviation": deviation, "values": values}


def measured_on(environment: dict[str, Any], how: str, *packages: str) -> str:
    """The last sentence of a page, up to the commit.

    Args:
        environment: From `synco_fast.runtime.environment.describe_environment`.
        how: How the cores were used.
        packages: Further packages with their versions.
    """
    versions = ", ".join([f"torch {environment['torch']}", *packages, f"Python {environment['python']}"])
    commit = environment.get("commit", "unknown")
    return f"Measured on {environment['device']}, {environment['cores']} cores{how}; {versions}; commit {commit}"


def write_record(folder: Path, record: dict[str, Any], page: str) -> None:
    """Write ``record.json`` and ``README.md`` into a folder, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "record.json", record)
    write_text(folder / "README.md", page)
    print(page)
