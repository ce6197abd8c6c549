"""The distributed environment: ranks from torchrun or Slurm."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from synco_fast.runtime.errors import ConfigError, UserError

__all__ = ["DistEnv"]

#: Slurm gives no port: it is the lowest one plus the job number modulo the range.
_PORTS = 20000, 10000
#: Seconds until the first rank of another machine may print an error; twice as long until every other rank may.
_TURN = 2.0
_LOOK = 0.05


@dataclass(frozen=True)
class DistEnv:
    """The distributed environment of this process.

    Attributes:
        rank, world: Rank of this process in [0, W), and W.
        local_rank, local_world: The same within this machine.
        address, port: Where rank 0 listens.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def place(self) -> str:
        """Rank and machine, as the end of an error's line; empty where only one process can have met it."""
        if self.rank == 0 and self.world == self.local_world:
            return ""
        return f" (rank {self.rank} on {socket.gethostname()})"

    def wait_for_turn(self, error: UserError, said: Callable[[], bool] = lambda: False) -> None:
        """Wait until this rank may print an error: rank 0 at once, then the first rank of each machine, then all.

        Most errors are met by every rank. When one process of a job has printed such an error and has ended, torchrun
        and ``srun --kill-on-bad-exit`` end the others, which then have printed nothing. An error that one rank alone
        has met is printed all the same, a few seconds later. Each error waits once.

        Args:
            error: The error.
            said: Whether another rank has printed the same, where the ranks can tell each other.
        """
        if error.waited:
            return
        error.waited = True
        end = time.monotonic() + _TURN * ((self.rank > 0) + (self.local_rank > 0))
        while time.monotonic() < end:
            # To the end also where it was said: whoever says it may not have printed it yet.
            error.said = error.said or said()
            time.sleep(_LOOK)

    @staticmethod
    def detect(environment: Mapping[str, str] | None = None) -> DistEnv:
        """Read torchrun's variables, else Slurm's (``srun`` with one task per GPU), else assume one process.

        Raises:
            ConfigError: A variable is missing or is not a whole number.
        """
        variables = os.environ if environment is None else environment
        if "RANK" in variables and "WORLD_SIZE" in variables:
            if _number(variables, "WORLD_SIZE") == 1:
                return DistEnv()
            return DistEnv(
                _number(variables, "RANK"),
                _number(variables, "WORLD_SIZE"),
                _number(variables, "LOCAL_RANK", "0"),
                _number(variables, "LOCAL_WORLD_SIZE", "1"),
                variables.get("MASTER_ADDR", "127.0.0.1"),
                _number(variables, "MASTER_PORT"),
            )
        # An interactive shell has its allocation's SLURM_NTASKS, but is in no step, or the only task of its own step.
        tasks = "SLURM_STEP_NUM_TASKS" if variables.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        if variables.get("SLURM_STEP_ID", "").isdigit() and _number(variables, tasks, "1") > 1:
            world = _number(variables, tasks)
            nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
            local = "SLURM_STEP_TASKS_PER_NODE"
            local = local if variables.get(local) else "SLURM_TASKS_PER_NODE"
            first, span = _PORTS
            return DistEnv(
                _number(variables, "SLURM_PROCID"),
                world,
                _number(variables, "SLURM_LOCALID"),
                _number({local: re.split(r"[(,]", variables.get(local) or "1")[0]}, local),
                variables.get("MASTER_ADDR") or _first_node(nodes),
                _number(variables, "MASTER_PORT")
                if variables.get("MASTER_PORT")
                else first + _number(variables, "SLURM_JOB_ID") % span,
            )
        return DistEnv()


def _number(variables: Mapping[str, str], name: str, default: str = "") -> int:
    value = variables.get(name) or default
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}: found {value!r} in the environment, expected a whole number")
    return int(value)


def _first_node(nodes: str) -> str:
    """The first name of Slurm's list: ``gpu[03-05,9]`` is ``gpu03``, ``a1,b[2-3]`` is ``a1``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_JOB_NODELIST: found {nodes!r}, expected the names of the job's machines")
    return found[1] + (found[2] or "") + (found[3] or "")
