from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synco_fast.bench import loss, roofline
from synco_fast.bench.loss import Shape, failure, measure, prepare, sweep
from synco_fast.bench.loss_report import best_seconds, draw_loss
from synco_fast.bench.profile_loss import profile_loss
from synco_fast.bench.roofline import Ceilings, floor_seconds, measure_ceilings
from tests.support.rotation import in_turn

CPU = torch.device("cpu")
SMALL = Shape(4, 2048, 16, 64)
ROOT = Path(__file__).resolve().parents[2]


def test_every_back_end_computes_what_the_reference_does():
    expected = prepare("reference", SMALL, CPU)()
    torch.testing.assert_close(prepare("blockwise", SMALL, CPU)(), expected, rtol=1e-3, atol=1e-4)
    # PyTorch's own draws: equal in size, not in digits.
    released = prepare("released", SMALL, CPU)()
    assert released.shape == expected.shape
    assert 0.8 < (released.norm() / expected.norm()).item() < 1.25


def test_measure_counts_memory_and_time():
    found = measure("blockwise", SMALL, device=CPU, repeats=3)
    assert len(found["seconds"]) == 3
    assert sorted(found["seconds"])[1] == found["median_s"] > 0
    assert found["extra_mib"] >= 0
    # The baseline holds B x K logits several times over: 64 MiB each here.
    large = Shape(1024, 16384, 16, 64)
    assert measure("released", large, device=CPU, repeats=1)["extra_mib"] > 64


@pytest.mark.slow
@in_turn(2, 3)
def test_sweep_says_why_a_figure_is_missing(monkeypatch):
    shapes = [Shape(4, 64, 16, 64)]
    found = list(sweep(["blockwise", "triton"], shapes, device=CPU, repeats=1, rounds=2, threads=1))
    assert [len(result["seconds"]) for result in found if "failed" not in result] == [2]
    assert [(result["backend"], result["length"]) for result in found] == [
        ("blockwise", 64),
        ("triton", 64),
    ]
    assert all("failed" not in result for result in found if result["backend"] == "blockwise")
    assert all(
        "the kernels run on CUDA devices" in result["failed"] for result in found if result["backend"] == "triton"
    )
    monkeypatch.setattr(loss, "_available", lambda: 1 << 20)
    (result,) = sweep(["reference"], [Shape(4096, 262144)], device=CPU)
    assert "not run: takes about" in result["failed"]


def test_floor():
    ceilings = Ceilings(flops=790e12, bytes=3.0e12)
    # The floors of docs/kernels.md.
    assert floor_seconds(256, 65536, 128, 2, ceilings) == pytest.approx(10.9e-6, rel=0.01)
    assert floor_seconds(1, 65536, 128, 2, ceilings) == pytest.approx(5.6e-6, rel=0.01)
    measured = measure_ceilings(CPU, torch.float32)
    assert 1e9 < measured.flops < 1e15
    assert 1e8 < measured.bytes < 1e13


def test_the_floor_of_float32_on_a_gpu_allows_for_three_half_precision_products(monkeypatch):
    rates = {torch.float32: 60.0, torch.float16: 720.0, torch.bfloat16: 780.0}
    monkeypatch.setattr(roofline, "_measured_rate", lambda device, dtype: rates[dtype])
    gpu = torch.device("cuda")
    assert roofline._product_rate(gpu, torch.float32) == 260
    assert roofline._product_rate(gpu, torch.bfloat16) == 780
    assert roofline._product_rate(CPU, torch.float32) == 60
    rates[torch.float32] = 390.0  # with TF32
    assert roofline._product_rate(gpu, torch.float32) == 390


def test_best_effort_is_the_graph_where_it_is_faster():
    assert best_seconds({"median_s": 2.0}) == 2.0
    assert best_seconds({"median_s": 2.0, "graph_s": 1.0}) == 1.0


def test_a_failure_keeps_its_whole_message():
    found = failure(RuntimeError("at 14:11:\n  tmp4 = tmp3\n  wrong type\n"))
    assert found == {"failed": "RuntimeError: at 14:11:", "message": "at 14:11:\n  tmp4 = tmp3\n  wrong type"}


@pytest.mark.usefixtures("rendered")
def test_picture_leaves_out_what_failed(tmp_path):
    results = [
        {
            "backend": "blockwise",
            "rows": rows,
            "length": 64,
            "median_s": rows / 1e3,
            "extra_mib": 0.0,
            "floor_s": 1e-4,
        }
        for rows in (2, 4)
    ] + [{"backend": "triton", "rows": 2, "length": 64, "failed": "no"}]
    draw_loss(results, "here", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_profile_counts_the_two_products_of_the_scan(tmp_path):
    lines = profile_loss(prepare("blockwise", SMALL, CPU), SMALL, CPU, tmp_path / "trace.json", runs=2)
    assert lines == sorted(lines, key=lambda line: -line.seconds)
    by_name = {line.name: line for line in lines}
    values = by_name["aten::addmm_"]
    assert values.flops == 2 * SMALL.rows * SMALL.length * SMALL.dim
    assert values.bytes == 4 * (SMALL.rows * SMALL.length + SMALL.length * SMALL.dim + SMALL.rows * SMALL.dim)
    assert by_name["aten::mm"].flops >= 2 * SMALL.rows * SMALL.length * SMALL.dim
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_suites_run():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--benchmark-disable"]
    command += [str(ROOT / "bench" / "suites"), "-k", "blockwise and 4096 or triton and 4096 or momentum"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert ("5 passed" if torch.cuda.is_available() else "3 passed, 2 skipped") in done.stdout


def test_blocks_of_rows_are_the_rows_of_the_whole(monkeypatch):
    pytest.importorskip("triton")
    from synco_fast.bench import variants

    seen = []

    def contrast_and_gradient(q, k, queue, negatives, **settings):
        seen.append((settings["first_row"], len(q), len(k), len(queue)))
        return torch.arange(len(q)) + settings["first_row"], q.sum(dim=1)

    monkeypatch.setattr(variants, "contrast_and_gradient", contrast_and_gradient)
    shape, cpu = Shape(10, 30, 8, 4, synthetic=12), torch.device("cpu")
    whole, parts = variants._outputs(shape, cpu), variants._outputs(shape, cpu, 4)
    assert seen == [(0, 10, 10, 30), (0, 3, 3, 30), (3, 3, 3, 30), (6, 2, 2, 30), (8, 2, 2, 30)]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
