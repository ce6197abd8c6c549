"""Jobs of several processes on this machine, without an import of PyTorch in each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from synco_fast.cli import main
from synco_fast.config import Config
from synco_fast.runtime import dist_env
from synco_fast.training.run.metrics import read_metrics

WORKER = Path(__file__).with_name("worker.py")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["synco_fast.training.run.loop", "synco_fast.training.pretraining"])


@dataclass
class Job:
    """What came of a job: exit code (None where it hangs), last words and final state by rank, and how long it took."""

    codes: list[int | None]
    words: list[str]
    states: list[dict[str, Any] | None]
    seconds: float


def run_job(
    world: int,
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    act: str = "",
    timeout: float = 15,
    within: float = 60,
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
        given = {"VARIABLES": variables, "FOLDER": folder, "RESUME": resume, "ACT": act, "TIMEOUT": timeout}
        process = CONTEXT.Process(target=runpy.run_path, args=(str(WORKER), given))
        process.start()
        processes.append(process)
    begun = time.monotonic()
    try:
        while time.monotonic() < begun + within and any(map(_runs, processes)):
            time.sleep(0.02)
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


def _runs(process: Any) -> bool:
    """Whether a process has neither ended nor been stopped."""
    if process.exitcode is not None:
        return False
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    except (FileNotFoundError, ProcessLookupError):
        return True  # its exit code is on the way


def under_torchrun(words: list[str], folder: Path, world: int, restarts: int) -> None:
    """What ``torchrun --standalone --nproc-per-node WORLD --max-restarts RESTARTS`` does with ``synco-fast WORDS``.

    In the first start rank 1 is killed once there is a checkpoint. In the second one rank 0 comes late, so that rank 1
    meets what the first has left in the store. ``{rank}`` in a word is the rank.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="job",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        elastic_launch(config, start_under_torchrun)(words, folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_under_torchrun(words: list[str], folder: Path) -> None:
    """One process of such a job."""
    rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    os.environ["COLUMNS"] = "400"
    torch.set_num_threads(1)
    dist_env._TURN = 0.5
    if (rank, start) == ("1", "0"):
        Thread(target=_die_after_a_checkpoint, args=(folder,), daemon=True).start()
    if (rank, start) == ("0", "1"):
        time.sleep(1)
    with folder.with_name(f"rank{rank}-{start}.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        code = main([word.format(rank=rank) for word in words])
    if code:
        raise SystemExit(code)


def _die_after_a_checkpoint(folder: Path) -> None:
    while not list(folder.glob("checkpoints/step-*.pt")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def losses(folder: Path) -> torch.Tensor:
    """The logged losses of a run, in order."""
    return torch.tensor([line["loss"] for line in read_metrics(folder) if line["kind"] == "train"])
