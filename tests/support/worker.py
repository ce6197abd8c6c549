"""One process of a test's job; run by path, with the capitals below given."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console

from synco_fast.config import build_config, read_mapping
from synco_fast.evaluation.monitor import HealthMonitor
from synco_fast.runtime import dist_env
from synco_fast.runtime.distributed import DistEnv, init_distributed
from synco_fast.runtime.errors import DataError, UserError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer

given = globals()
VARIABLES: dict[str, str] = given["VARIABLES"]
FOLDER: Path = given["FOLDER"]
RESUME: bool = given["RESUME"]
ACT: str = given["ACT"]
TIMEOUT: float = given.get("TIMEOUT", 15)


def leave(run, rank):
    if rank == 1 and run.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop(run, rank):
    if rank == 1 and run.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def differ(run, rank):
    if rank == 1 and run.step == 5:
        run.task.method.queue.rows[3, 2] += 1e-3


def hang(run, rank):
    if rank == 1 and run.step == 5:
        os.kill(os.getpid(), signal.SIGSTOP)


def hang_while_the_others_wait(run, rank):
    """As in an evaluation: the other rank is in no collective that ends after the timeout."""
    if rank == 0 and run.step == 5:
        run.control.broadcast = lambda value: os.kill(os.getpid(), signal.SIGSTOP)


def nothing(run, rank):
    pass


#: By name, what a process does before a step; "graph" replaces CUDA graphs before the first one.
ACTS = {
    "": nothing,
    "graph": nothing,
    "leave": leave,
    "ask to stop": ask_to_stop,
    "differ": differ,
    "hang": hang,
    "hang while the others wait": hang_while_the_others_wait,
}

os.environ.update(VARIABLES)
if ACT == "graph":
    runpy.run_path(str(Path(__file__).with_name("graphs.py")))["install"]()
runpy.run_path(str(Path(__file__).with_name("plots.py")))["render_nothing"]()
torch.set_num_threads(1)
dist_env._TURN = 0.1
env = DistEnv.detect()
words = sys.stderr = (FOLDER / f"rank{env.rank}.txt").open("w")
try:
    with init_distributed(env, "cpu", timeout=TIMEOUT) as control:
        config = build_config(read_mapping(FOLDER / "job.yaml"))
        console = Console(file=words, width=200)
        trainer = Trainer(
            Pretraining(config, control=control, monitor=HealthMonitor()),
            FOLDER,
            resume=FOLDER if RESUME else None,
            console=console,
            before_step=lambda run: ACTS[ACT](run, env.rank),
        )
        trainer.run()
        torch.save({"step": trainer.step, **trainer.task.method.state_dict()}, FOLDER / f"rank{env.rank}.pt")
except (UserError, DataError) as error:
    words.write(f"error: {error}\n")
    words.close()
    sys.stdout.flush()
    os._exit(2)
except BaseException:
    words.write(traceback.format_exc())
    words.close()
    os._exit(1)
words.close()
