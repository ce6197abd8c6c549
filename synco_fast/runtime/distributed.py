"""The processes of a job: found in what torchrun or Slurm sets, and what they agree on beside the training itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from synco_fast.runtime.errors import ConfigError, LostProcessError

__all__ = ["Control", "Place", "joined", "lost_process"]

#: The port of the first process where Slurm names none: one of the unregistered ones, moved by the job's number.
_PORTS = 20000, 10000
#: While one process evaluates or writes, the others wait this long for it.
_PATIENCE = timedelta(hours=4)
_SIGNS = ("gloo", "nccl", "peer", "timed out", "timeout", "connection")


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job.

    Attributes:
        rank, world: Number of this process, and of all.
        local_rank, local_world: The same on this machine.
        address, port: Where the first process listens.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for the job."""
        return self.rank == 0

    @staticmethod
    def find(environment: Mapping[str, str] | None = None) -> Place:
        """From torchrun's variables, else from Slurm's (``srun`` with one task a GPU), else alone.

        Raises:
            ConfigError: A variable is missing or is no number.
        """
        variables = os.environ if environment is None else environment

        def number(name: str) -> int:
            value = variables.get(name, "")
            if not value.isdigit():
                raise ConfigError(f"{name}: found {value!r} in the environment, expected a whole number")
            return int(value)

        if "RANK" in variables and "WORLD_SIZE" in variables:
            if number("WORLD_SIZE") == 1:
                return Place()
            return Place(
                number("RANK"),
                number("WORLD_SIZE"),
                number("LOCAL_RANK") if "LOCAL_RANK" in variables else 0,
                number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in variables else 1,
                variables.get("MASTER_ADDR", "127.0.0.1"),
                number("MASTER_PORT"),
            )
        # An interactive shell inside an allocation has the job's variables but is no task of it.
        if variables.get("SLURM_STEP_ID", "").isdigit() and int(variables.get("SLURM_NTASKS") or 1) > 1:
            nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
            tasks = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE", "1")
            first, span = _PORTS
            return Place(
                number("SLURM_PROCID"),
                number("SLURM_NTASKS"),
                number("SLURM_LOCALID"),
                int(tasks.split("(")[0].split(",")[0]),
                variables.get("MASTER_ADDR") or _first_node(nodes),
                int(variables.get("MASTER_PORT") or first + number("SLURM_JOB_ID") % span),
            )
        return Place()


def _first_node(nodes: str) -> str:
    """The first name of Slurm's list: ``gpu[03-05,9]`` is ``gpu03``, ``a1,b[2-3]`` is ``a1``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_JOB_NODELIST: found {nodes!r}, expected the names of the job's machines")
    return found[1] + (found[2] or "") + (found[3] or "")


class Control:
    """What processes agree on over the hosts' network, without touching a GPU. Alone, everything is as it is given.

    Args:
        place: Where this process stands.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._group: dist.ProcessGroup | None = None
        if place.world > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Each number's maximum over the processes."""
        if self._group is None:
            return numbers
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return tuple(values.tolist())

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.place.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def of_first(self, value: Any) -> Any:
        """The first process's value, which the others wait for."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


@contextmanager
def joined(place: Place, device: str = "auto", *, timeout: float = 300) -> Iterator[Control]:
    """Take this process's place in the job: its GPU, and the network to the others.

    Args:
        place: From `Place.find`.
        device: ``auto``, ``cpu`` or ``cuda``, as in the configuration.
        timeout: Seconds that a collective operation waits for the others before the job ends.

    Raises:
        ConfigError: More processes on this machine than GPUs.
        LostProcessError: The others do not appear.
    """
    if place.world == 1:
        yield Control(place)
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"processes: found {place.local_world} on this machine, expected {torch.cuda.device_count()}, one a GPU"
            )
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{place.address}:{place.port}" if "RANK" not in os.environ else None,
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", place.local_rank) if cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(
            f"processes: found no {place.world} processes at {place.address}:{place.port} within {timeout:g} s "
            f"({str(error).splitlines()[0]})"
        ) from error
    try:
        yield Control(place)
    finally:
        dist.destroy_process_group()


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
