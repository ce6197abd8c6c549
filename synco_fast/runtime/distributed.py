"""Distributed jobs: ranks from torchrun or Slurm, initialisation, and exchanges between ranks.

With one process, every function returns its input. A global batch of B rows is divided among W ranks in blocks of
B / W: row i is on rank i // (B / W).
"""

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
from torch import Tensor

from synco_fast.runtime.errors import ConfigError, LostProcessError

__all__ = [
    "DistEnv",
    "HostGroup",
    "barrier",
    "exchange_rows",
    "gather_lists",
    "gather_rows",
    "init_distributed",
    "lost_process",
    "mean_over_ranks",
    "rank",
    "sum_over_ranks",
    "world",
]

#: Slurm gives no port: it is the lowest one plus the job number modulo the range.
_PORTS = 20000, 10000
#: Time limit of the other ranks while rank 0 evaluates or writes.
_PATIENCE = timedelta(hours=4)
#: Words in an error message that indicate a lost process.
_LOST = ("gloo", "nccl", "peer", "timed out", "timeout", "connection")
#: Renamed after PyTorch 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        # An interactive shell inside an allocation has the job's variables but is not one of its tasks.
        if variables.get("SLURM_STEP_ID", "").isdigit() and _number(variables, "SLURM_NTASKS", "1") > 1:
            nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
            tasks = "SLURM_STEP_TASKS_PER_NODE"
            tasks = tasks if variables.get(tasks) else "SLURM_TASKS_PER_NODE"
            first, span = _PORTS
            return DistEnv(
                _number(variables, "SLURM_PROCID"),
                _number(variables, "SLURM_NTASKS"),
                _number(variables, "SLURM_LOCALID"),
                _number({tasks: re.split(r"[(,]", variables.get(tasks) or "1")[0]}, tasks),
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


class HostGroup:
    """Communication between ranks over the hosts' network (gloo), without a GPU.

    Args:
        env: Environment of this process.
    """

    def __init__(self, env: DistEnv) -> None:
        self.env = env
        self._group: dist.ProcessGroup | None = None
        if env.world > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def max(self, *numbers: int) -> tuple[int, ...]:
        """The maximum of each number over the ranks."""
        if self._group is None:
            return numbers
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return tuple(values.tolist())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.env.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


@contextmanager
def init_distributed(env: DistEnv, device: str = "auto", *, timeout: float = 300) -> Iterator[HostGroup]:
    """Join the job: set this process's GPU, connect to the others, and leave at the end of the block.

    Args:
        env: From `DistEnv.detect`.
        device: ``auto``, ``cpu`` or ``cuda``, as in the configuration.
        timeout: Seconds that a collective waits for the other ranks before the job ends.

    Raises:
        ConfigError: There are more processes on this machine than GPUs.
        LostProcessError: The other processes do not connect.
    """
    if env.world == 1:
        yield HostGroup(env)
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        if env.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"processes: found {env.local_world} on this machine, expected {torch.cuda.device_count()}, one per GPU"
            )
        torch.cuda.set_device(env.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{env.address}:{env.port}" if "RANK" not in os.environ else None,
            rank=env.rank,
            world_size=env.world,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", env.local_rank) if cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(
            f"could not connect {env.world} processes at {env.address}:{env.port} within {timeout:g} s "
            f"({str(error).splitlines()[0]})"
        ) from error
    try:
        yield HostGroup(env)
    finally:
        dist.destroy_process_group()


def lost_process(error: BaseException) -> bool:
    """Whether an error indicates that another process is gone or does not respond."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def world() -> int:
    """W, the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, in [0, W)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def mean_over_ranks(tensors: list[Tensor]) -> None:
    """Replace floating-point tensors by their mean over the ranks, in place, with one all-reduce for each dtype."""
    if world() == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        parts = flat.div_(world()).split([tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists of all ranks, concatenated in order of rank; lengths may differ."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, (b, ...) to (W b, ...), in order of rank; without gradient."""
    if world() == 1:
        return rows
    gathered = rows.new_empty(world() * len(rows), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous())
    return gathered


def exchange_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Rows ``order[rank b : (rank + 1) b]`` of a permuted global batch, by one all-to-all.

    Args:
        rows: This rank's block of the batch, (b, ...).
        order: A permutation of the global batch, (W b,) int64, the same on every rank; on the CPU if W is above 1,
            since message sizes follow from it.

    Returns:
        (b, ...).
    """
    if world() == 1:
        return rows[order]
    block = len(rows)
    wanted = order.view(world(), block)
    owner = wanted // block
    leaving = owner == rank()
    sent = leaving.sum(dim=1).tolist()
    received = owner[rank()].bincount(minlength=world()).tolist()
    source = (wanted % block)[leaving].to(rows.device, non_blocking=True)
    # Received rows are sorted by source rank, and within one rank in the requested order.
    place = owner[rank()].argsort(stable=True).to(rows.device, non_blocking=True)
    outgoing = rows[source].contiguous()
    incoming = torch.empty_like(outgoing[:1].expand(block, *rows.shape[1:]), memory_format=torch.contiguous_format)
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return torch.empty_like(incoming).index_copy_(0, place, incoming)
