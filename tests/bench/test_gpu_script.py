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
from tests.support.kernels import check_interpreted
from tests.support.rotation import day, in_turn

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.mark.slow
@in_turn(1, 3)
def test_stages_under_the_interpreter():
    # All cases take a minute and a half, so they take turns as well, among the days on which this test runs.
    file = Path(__file__).parent / "interpreted" / "check_stages.py"
    check_interpreted(file, SYNCO_FAST_DAY=str(day() // 3))


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


#: Stands in for Python, which the script starts for everything; and for `timeout`, as a function of the script's own
#: shell: every part takes all of its time, and the shell's clock goes on by as much.
PYTHON_STUB = """#!/bin/bash
case " $* " in
  *" -c import $MISSING "*) exit 1 ;;
  *CHECKS*) echo sample ;;
  *bench.summary*) cat "${!#}/parts.txt" ;;
esac
if [ "$1" = - ]; then cat > /dev/null; echo "{}"; fi
"""
TIMEOUT_STUB = """() { echo "$SECONDS $2 ${*:3}" >> "$STUB_LOG"; SECONDS=$((SECONDS + $2)); return 124; }"""


@pytest.fixture
def stubbed(tmp_path):
    """Run the script without Python, and return the start, the limit and the command of each part, and the output."""
    for name in ("python", "ncu", "compute-sanitizer"):
        (tmp_path / name).write_text(PYTHON_STUB)
        (tmp_path / name).chmod(0o755)

    def run(*words, timeout=TIMEOUT_STUB, missing="nothing", **variables):
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "STUB_LOG": str(tmp_path / "log")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MISSING": missing, **variables}
        environment |= {"BASH_FUNC_timeout%%": timeout}
        command = [str(SCRIPT), *words, str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "error" not in done.stderr, done.stderr
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        return [(int(start), int(limit), *rest) for start, limit, *rest in map(str.split, log)], done.stdout

    return run


def test_tests_have_their_time_even_if_every_part_takes_all_of_its(stubbed):
    parts, said = stubbed()
    limits = dict(re.findall(r"part \"?([\w$-]+)\"? (\d+) ", SCRIPT.read_text()))
    beside = [part for part in parts if {"pytest", "pretrain", "--tool"} & set(part)]
    timed = [part for part in parts if part not in beside]
    assert len(beside) == 5
    assert {limit for _, limit, *_ in beside} == {150} == {int(limits[name]) for name in ("tests", "train", "$tool")}
    assert max(start + limit for start, limit, *_ in parts) <= 535
    # Here the limits of what is timed are more than there is, so that the last ones get less, or nothing and a line.
    assert timed[0][:2] == (timed[0][0], 60)
    assert sum(limit for _, limit, *_ in timed) <= 535 - 160
    assert re.search(r"^compare +no time", said, re.M)


def test_every_part_has_its_limit_if_none_takes_more_than_half(stubbed):
    half = TIMEOUT_STUB.replace("SECONDS + $2", "SECONDS + $2 / 2").replace("return 124", "return 0")
    parts, said = stubbed(timeout=half)
    assert "no time" not in said
    assert "time out" not in said
    limits = [limit for _, limit, *_ in parts]
    assert limits[:3] == [60] * 3
    (compare,) = [limit for _, limit, *rest in parts if "linear-ce" in rest]
    assert compare >= 60, "the half of its limit"


def test_without_pydantic_the_demo_run_is_left_out(stubbed):
    parts, said = stubbed("--stage", "tests", "--stage", "train", missing="pydantic")
    ((*_, first, module, name), *_) = [part[2:5] for part in parts]
    assert (module, name) == ("-m", "pytest")
    assert first.endswith("python")
    assert [part[-1] for part in parts] == ["tests/kernels"]
    assert re.search(r"^train +not there", said, re.M)


def test_the_stage_with_data_needs_dali(stubbed):
    parts, said = stubbed("--stage", "data")
    views, train = parts
    assert views[views.index("--pipelines") + 1 :][:3] == ("torchvision", "dali", "dali-fused")
    assert train[train.index("--data.pipeline") + 1] == "dali"
    _, said = stubbed("--stage", "data", missing="nvidia.dali")
    assert re.search(r"^data +not there", said, re.M)


def test_compiled_kernels_come_back_but_for_those_that_were_given(stubbed, tmp_path):
    given, kernel = tmp_path / "given.tar.gz", tmp_path / "OLD" / "kernel.cubin"
    kernel.parent.mkdir()
    kernel.write_bytes(b"old")
    with tarfile.open(given, "w:gz") as archive:
        archive.add(kernel.parent, arcname="OLD")
    compiles = """() { mkdir "$TRITON_CACHE_DIR/NEW"; echo new > "$TRITON_CACHE_DIR/NEW/k.cubin"; }"""
    words = ("--cache", str(given), "--cache", str(given), "--stage", "variants")
    for size, packed in ((40 << 20, {".", "./NEW", "./NEW/k.cubin"}), (41 << 20, None)):
        _, said = stubbed(*words, timeout=compiles, **{"BASH_FUNC_wc%%": f"() {{ echo {size}; }}"})
        with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
            found = "gpu/triton-cache.tar.gz" in archive.getnames()
        assert found == (packed is not None)
        if found:
            with tarfile.open(tmp_path / "gpu" / "triton-cache.tar.gz") as archive:
                assert set(archive.getnames()) == packed
        assert ("triton-cache             not packed: 41 MiB, expected at most 40" in said) == (not found)


def test_the_summary_shows_what_broke(tmp_path):
    (tmp_path / "parts.txt").write_text("stages-bfloat16 exit 1\n")
    lines = [
        {"launch": "sample", "dtype": "bfloat16"},
        {"stage": "sample", "dtype": "bfloat16", "compared": True, "wrong": ["similarity: found 1, expected 1e-06"]},
        {"launch": "rank", "dtype": "bfloat16"},
    ]
    (tmp_path / "stages-bfloat16.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    figures = {"dtype": "bfloat16", "launch": "sample", "microseconds": 4.5, "added_us": 5.5, "cold_us": 7.0}
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
        "4.5        5.5        7.0        3.5",
        "60.0 us  DIFFERS",
        "OutOfResources",
        "tests: 2, 1 failed, 0 skipped",
        "a::bad",
        "triton                       300.0        70.0        60.0",
    ):
        assert words in said, said


#: What pytest says with processes of pytest-xdist and without, until it is killed.
CUT = (
    """
tests/kernels/test_gpu.py::test_a[torch.float32-x y]
tests/kernels/test_gpu.py::test_b
tests/kernels/test_gpu.py::test_c
[gw1] [ 33%] PASSED tests/kernels/test_gpu.py::test_a[torch.float32-x y]
[gw0] [ 66%] FAILED tests/kernels/test_gpu.py::test_b
tests/kernels/test_gpu.py::test_d
[gw0] [ 99%] SKIPPED tests/kernels/test_gpu.py::test_d
""",
    """
tests/kernels/test_gpu.py::test_a[torch.float32-x y] PASSED              [ 33%]
tests/kernels/test_gpu.py::test_b FAILED                                 [ 66%]
tests/kernels/test_gpu.py::test_d SKIPPED (why)                          [ 99%]
tests/kernels/test_gpu.py::test_c """,
)


@pytest.mark.parametrize("log", CUT, ids=["processes", "alone"])
@pytest.mark.parametrize("xml", [None, "<testsuites><testsu"])
def test_the_summary_reads_the_log_of_tests_that_were_cut_off(log, xml, tmp_path):
    (tmp_path / "tests.log").write_text("python -m pytest tests/kernels\n" + log)
    if xml:
        (tmp_path / "tests.xml").write_text(xml)
    said = summarise(tmp_path).splitlines()
    assert said == [
        "tests, cut off: 3 ended, 1 failed, 1 skipped",
        "  tests/kernels/test_gpu.py::test_b",
        "  tests/kernels/test_gpu.py::test_c did not end",
    ]
