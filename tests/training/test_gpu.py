"""Engines on a GPU: each trains as eager does, with every optimizer that skips on the device, and in DDP over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.training.step import engine as engine_module
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.parallel import DDP_GRAPH_WARMUP, on_all_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 8


def losses(config, steps=STEPS):
    """Of some steps, each on another batch; the engine that was asked for is the one that ran."""
    notes: list[str] = []
    engine, found = Engine(config, steps_per_epoch=4, note=notes.append), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        first, second = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
        engine.step(Batch(first, second, torch.arange(8) + 8 * step), step, 1)
        found.append(engine.means.pop()["loss"])
    assert engine.form == config.training.engine, notes
    engine.release()
    return torch.tensor(found)


@pytest.mark.parametrize("engine", ["graph", "compile", "compile+graph"])
def test_each_engine_trains_as_eager_does(tiny, engine):
    # In float32, since a compiler that fuses operations rounds 16-bit numbers elsewhere. With maps above 1 x 1, for
    # which torch 2.11 compiles a convolution's backward pass to another layout than it has.
    larger = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16}
    cuda = {"training.device": "cuda", "training.precision": "fp32", "optimizer.lr": 0.1, "model.backbone_args": larger}
    eager = losses(tiny({**cuda, "training.engine": "eager"}))
    assert torch.allclose(losses(tiny({**cuda, "training.engine": engine})), eager, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
def test_each_optimizer_is_captured(tiny, optimizer):
    cuda = {"training.device": "cuda", "optimizer.name": optimizer, "optimizer.lr": 0.1}
    eager = losses(tiny({**cuda, "training.engine": "eager"}))
    assert torch.allclose(losses(tiny({**cuda, "training.engine": "graph"})), eager, rtol=1e-3)


def test_ddp_over_nccl_is_captured(tiny, monkeypatch):
    """One rank: its exchange is real, and what it receives is its own."""
    cuda = {"training.device": "cuda", "optimizer.lr": 0.1}
    steps = DDP_GRAPH_WARMUP + 4
    eager = losses(tiny({**cuda, "training.engine": "eager"}), steps)
    monkeypatch.setattr(engine_module, "GRAPH_WARMUP", DDP_GRAPH_WARMUP)
    monkeypatch.setattr(
        engine_module, "on_all_processes", lambda module, device, **_: on_all_processes(module, device, processes=2)
    )
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = losses(tiny({**cuda, "training.engine": "graph"}), steps)
    finally:
        dist.destroy_process_group()
    assert torch.allclose(found, eager, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_job_of_captured_steps_ends(tiny, tmp_path):
    """NCCL waits without end for the graphs of its exchanges, if any is left."""
    cuda = {"training.device": "cuda", "training.engine": "graph", "training.epochs": DDP_GRAPH_WARMUP // 4 + 3}
    (tmp_path / "job.yaml").write_text(tiny(cuda).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "synco_fast", "pretrain"]
    command += ["--config", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["forms"]["engine"]["name"] == "graph"


#: A step that draws, and waits for the device, which no capture can hold.
FAILS = """
import torch
from synco_fast.methods.base import StepInputs
from synco_fast.training.step.compiled import GRAPH_WARMUP, GraphedStep

device, notes, drawn = torch.device("cuda", 0), [], []

def compute(inputs, step, key, momentum):
    drawn.append(torch.rand(3, device=device))
    int(step)

run, one = GraphedStep(compute, device, notes.append), torch.zeros(2, device=device)
for number in range(GRAPH_WARMUP + 2):
    run(StepInputs((one,), (one,), (), one.long()), number, 0, 0.9)
assert len(notes) == 1, notes
assert torch.cuda.current_stream() == torch.cuda.default_stream()
assert torch.stack(drawn[-2:]).sum() > 0
print("eager")
"""


def test_eager_steps_go_on_after_a_failed_capture():
    """In a process of its own, which ends with what the capture left behind."""
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True)
    assert done.stdout == "eager\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_view_is_normalised_in_one_launch(dtype):
    views, recipe = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), Recipe()
    found = normalise(views.cuda(), recipe, torch.channels_last, dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = normalise(views, recipe)
    assert torch.allclose(found.float().cpu(), expected, atol=4 * torch.finfo(dtype).eps)
