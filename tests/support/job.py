"""Jobs of several processes on this machine, without an import of PyTorch in each."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from synco_fast.config import Config
from synco_fast.training.metrics import read_metrics

WORKER = Path(__file__).with_name("worker.py")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["synco_fast.training.loop", "synco_fast.training.pretraining"])


@dataclass
class Job:
    """What came of a job: by rank, exit code, last words and final state; and how long it took."""

    codes: list[int | None]
    words: list[str]
    states: list[dict[str, Any] | None]
    seconds: float
    alive_after: list[float] = field(default_factory=list)


def run_job(
    world: int, config: Config, folder: Path, *, resume: bool = False, act: str = "", within: float = 60
) -> Job:
    """Train with ``world`` processes over gloo; ``act`` is one of the worker's ``ACTS``."""
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(config.to_yaml())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(world):
        (folder / f"rank{rank}.pt").unlink(missing_ok=True)
    processes = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        given = {"VARIABLES": variables, "FOLDER": folder, "RESUME": resume, "ACT": act}
        process = CONTEXT.Process(target=runpy.run_path, args=(str(WORKER), given))
        process.start()
        processes.append(process)
    begun = time.monotonic()
    try:
        for process in processes:
            process.join(max(0.0, begun + within - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    states = [folder / f"rank{rank}.pt" for rank in range(world)]
    return Job(
        codes,
        [(folder / f"rank{rank}.txt").read_text() for rank in range(world)],
        [torch.load(path, weights_only=True) if path.exists() else None for path in states],
        time.monotonic() - begun,
    )


def losses(folder: Path) -> torch.Tensor:
    """The logged losses of a run, in order."""
    return torch.tensor([line["loss"] for line in read_metrics(folder) if line["kind"] == "train"])
