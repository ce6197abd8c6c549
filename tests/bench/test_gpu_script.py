"""What a GPU is asked first, gone through on a CPU: stages in the interpreter, and the whole script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from synco_fast.bench.summary import summarise
from tests.support.rotation import day, in_turn

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.mark.slow
@in_turn(1, 3)
def test_stages_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-o", "python_files=check_*.py"]
    command += ["-p", "no:cacheprovider", str(Path(__file__).parent / "interpreted" / "check_stages.py")]
    # All cases take a minute and a half, so they take turns as well, among the days on which this test runs.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "SYNCO_FAST_DAY": str(day() // 3)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@in_turn(0, 3)
def test_a_dry_run_brings_everything_back(tmp_path):
    """From a folder that is not the checkout's, with nothing of it installed on the path."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(SCRIPT), "--dry", str(tmp_path / "out")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.tar.gz", "summary.txt"}
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "gpu"
    assert "time out" not in (folder / "parts.txt").read_text()
    stages = [json.loads(line) for line in (folder / "stages-float32.jsonl").read_text().splitlines()]
    assert not [line for line in stages if line.get("wrong")]
    assert json.loads((folder / "environment.json").read_text())["torch"]
    for name in ("launches-float32", "variants", "sanitizers", "selection", "compare"):
        assert (folder / f"{name}.jsonl").read_text().count("\n") >= 1
    assert "<testsuite" in (folder / "tests.xml").read_text()
    assert (tmp_path / "out" / "summary.txt").read_text() == (folder / "summary.txt").read_text()
    assert "each launch against float64" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: bench/gpu.sh"),
        (["--stage", "nonsense", "out"], "stage: found nonsense, expected one of stages launches"),
        (["--cache", "/no/cache", "out"], "cache: found no file /no/cache"),
    ],
)
def test_bad_words_are_one_line(words, says, tmp_path):
    done = subprocess.run([str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_missing_package_is_named_before_anything_runs(tmp_path):
    """A Python that has no PyTorch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no PyTorch here')")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [str(SCRIPT), "--dry", "--stage", "stages", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "found no working torch (ImportError: no PyTorch here)" in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_limits_leave_time_for_what_comes_last():
    """None gets more than what is left of the whole; and the limits of what is timed leave time for the rest."""
    text = SCRIPT.read_text()
    assert "DEADLINE=$((SECONDS + 535 * SLOWER))" in text
    limits = {name: int(limit) for name, limit in re.findall(r"part \"?([\w$-]+)\"? (\d+) ", text)}
    times = {"stages-$dtype": 3, "launches-$dtype": 2, "step": 0}
    beside = {"tests", "$tool", "train", "sanitizers"}
    assert {*times, *beside} < set(limits)
    timed = sum(times.get(name, 1) * limit for name, limit in limits.items() if name not in beside)
    # Limits are generous, since a stage that is cut off loses its figures: half of them must leave time for the rest.
    assert timed / 2 + max(limits[name] for name in beside) < 535


def test_the_summary_shows_what_broke(tmp_path):
    (tmp_path / "parts.txt").write_text("stages-bfloat16 exit 1\n")
    lines = [
        {"launch": "sample", "dtype": "bfloat16"},
        {"stage": "sample", "dtype": "bfloat16", "compared": True, "wrong": ["similarity: found 1, expected 1e-06"]},
        {"launch": "rank", "dtype": "bfloat16"},
    ]
    (tmp_path / "stages-bfloat16.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    figures = {"dtype": "bfloat16", "launch": "sample", "microseconds": 4.5, "cold_us": 7.0}
    (tmp_path / "launches-bfloat16.jsonl").write_text(json.dumps(figures) + "\n")
    differs = {"variant": "mix in 4 parts", "dtype": "bfloat16", "agrees": False, "microseconds": 60.0}
    failed = {"variant": "other", "dtype": "bfloat16", "failed": "OutOfResources: shared memory"}
    (tmp_path / "variants.jsonl").write_text(json.dumps(differs) + "\n" + json.dumps(failed) + "\n")
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        "</testcase></testsuite></testsuites>"
    )
    compared = {"backend": "triton", "median_s": 3e-4, "graph_s": 7e-5, "bare_s": 6e-5}
    (tmp_path / "compare.jsonl").write_text(json.dumps(compared) + "\n")
    model = tmp_path / "record.json"
    launches = [{"name": "sample", "microseconds": 3.5}]
    model.write_text(json.dumps({"shapes": [{"launches": launches, "total": {"microseconds": 200.0}}]}))
    said = summarise(tmp_path, model)
    for words in (
        "sample       similarity: found 1",
        "rank         never came back",
        "4.5        7.0        3.5",
        "60.0 us  DIFFERS",
        "OutOfResources",
        "tests: 2, 1 failed, 0 skipped",
        "a::bad",
        "triton                       300.0        70.0        60.0",
    ):
        assert words in said, said
