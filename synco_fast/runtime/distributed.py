"""Distributed jobs: initialisation, and exchanges between ranks.

With one process, every function returns its input. A global batch of B rows is divided among W ranks in blocks of
B / W: row i is on rank i // (B / W).
"""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from threading import Event
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from synco_fast.data.transfer import to_device
from synco_fast.runtime.dist_env import DistEnv
from synco_fast.runtime.errors import ConfigError, LostProcessError, UserError, first_line
from synco_fast.runtime.heartbeat import Heartbeat
from synco_fast.runtime.rendezvous import agree_on_prefix
from synco_fast.runtime.spans import name_ranks

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
    "refuse",
    "sum_over_ranks",
    "world",
]

T = TypeVar("T")

#: Time limit of the other ranks while rank 0 evaluates or writes.
_PATIENCE = timedelta(hours=4)
#: Seconds in which a rank that cannot join tries to tell the others.
_REFUSING = 60.0
#: Set once this process goes to meet the others.
_MET = Event()
#: Timeouts until NCCL's own watch ends a process by SIGABRT: after `Heartbeat`, which says in a line why.
_OF_NCCL = 1.5
#: Words in an error message that indicate a lost process.
_LOST = ("gloo", "nccl", "peer", "timed out", "timeout", "connection")
#: Renamed after PyTorch 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class HostGroup:
    """Communication between ranks over the hosts' network (gloo), without a GPU.

    Args:
        env: Environment of this process.

    Attributes:
        last_words: The end of the message when this process gives up on another one: its step and checkpoint.
    """

    def __init__(self, env: DistEnv) -> None:
        self.env = env
        self.last_words: Callable[[], str] = str
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

    def from_main(self, find: Callable[[], T]) -> T:
        """What a function returns on rank 0, which alone calls it, on every rank.

        Raises:
            UserError: The function raised it; every rank raises it.
        """
        found: Any = None
        if self.env.is_main:
            try:
                found = find()
            except UserError as error:
                found = error
        found = self.broadcast(found)
        if isinstance(found, UserError):
            raise found
        return cast(T, found)


@contextmanager
def init_distributed(env: DistEnv, device: str, *, timeout: float) -> Iterator[HostGroup]:
    """Join the job: set this process's GPU, connect to the others, and leave at the end of the block.

    Within the block, a rank that is silent for 1.25 timeouts ends this process with one line on standard error and exit
    code 2, also during a blocking operation.

    Args:
        env: From `DistEnv.detect`.
        device: ``auto``, ``cpu`` or ``cuda``, as in the configuration.
        timeout: Seconds that a collective waits for the other ranks before the job ends; 1.5 times as long over NCCL.

    Raises:
        ConfigError: There are more processes on this machine than GPUs, or another rank cannot start (`refuse`).
        LostProcessError: The other processes do not connect, or a collective failed. At its exit this process then
            does not wait for connections, and its exit code is 2.
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
    _MET.set()
    control: HostGroup | None = None

    def give_up(silent: list[int], seconds: float) -> None:
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        line = f"rank {env.rank} heard nothing from {ranks} for {seconds:g} s"
        words = control.last_words() if control else ""
        sys.stderr.write(f"error: {line}{words or f', expected all {env.world} to the end'}\n")
        sys.stderr.flush()
        os._exit(2)

    wait = timedelta(seconds=timeout)
    heartbeat: Heartbeat | None = None
    finished = False
    try:
        try:
            store = _open_store(env, wait)
            prefix, refusals = agree_on_prefix(store, env.rank, env.world, timeout)
            if refusals:
                first = next(iter(refusals.values()))
                raise ConfigError(f"job: found {name_ranks([*refusals])} unable to start, on {first}")
            beats = TCPStore(env.address, env.port, is_master=False, timeout=wait)
            heartbeat = Heartbeat(PrefixStore(f"{prefix}/beats", beats), env.rank, env.world, timeout, give_up)
            heartbeat.start()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=PrefixStore(prefix, store),
                rank=env.rank,
                world_size=env.world,
                timeout=_OF_NCCL * wait if cuda else wait,
                device_id=torch.device("cuda", env.local_rank) if cuda else None,
            )
            control = HostGroup(env)
        except (RuntimeError, ValueError) as error:
            # A port that another program has is noticed at once.
            within = "" if "EADDRINUSE" in str(error) else f" within {timeout:g} s"
            raise LostProcessError(
                f"could not connect {env.world} processes at {env.address}:{env.port}{within} ({first_line(error)})"
            ) from error
        yield control
        finished = True
    except RuntimeError as error:
        if not lost_process(error):
            raise
        atexit.register(_leave)
        raise LostProcessError(
            f"rank {env.rank} lost the connection to the other processes ({first_line(error)}), expected all "
            f"{env.world} to the end"
        ) from error
    except LostProcessError:
        atexit.register(_leave)
        raise
    except UserError as error:
        # While still in the job: the others would end by the lost connection, and this one with them, unheard.
        _take_turn(env, store, prefix, error)
        raise
    finally:
        if dist.is_initialized():
            with nullcontext() if finished else suppress(RuntimeError):
                dist.destroy_process_group()
        if heartbeat is not None:
            heartbeat.stop(finished=finished)


def refuse(env: DistEnv, error: UserError) -> None:
    """End the other ranks, which wait for this one to join: they raise a line about its error.

    ``error.said`` is set if a lower rank prints the same. Once this process has joined, nothing is done.

    Args:
        env: From `DistEnv.detect`.
        error: Why this rank cannot join.
    """
    if _MET.is_set():
        return
    said = f"{socket.gethostname()}: {error}"
    with suppress(RuntimeError, ValueError, LostProcessError):  # nobody is there who would wait
        store = _open_store(env, timedelta(seconds=_REFUSING))
        _, refusals = agree_on_prefix(store, env.rank, env.world, _REFUSING, said)
        error.said = any(rank < env.rank and other.partition(": ")[2] == str(error) for rank, other in refusals.items())


def _take_turn(env: DistEnv, store: Store, prefix: str, error: UserError) -> None:
    """Wait until this rank may print an error, and note whether another rank has printed the same."""
    key = f"{prefix}/said/{hashlib.sha256(str(error).encode()).hexdigest()}"
    with suppress(RuntimeError):  # the process that hosts the store has left
        env.wait_for_turn(error, lambda: store.check([key]))
        error.said = error.said or store.add(key, 1) > 1


def _leave() -> None:
    """Exit at once: closing connections to a stopped process can block for half a minute over gloo."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(2)


def _open_store(env: DistEnv, timeout: timedelta) -> Store:
    """Connect to the store that all ranks share: torchrun's, or one that rank 0 hosts."""
    method = "env://" if "RANK" in os.environ else f"tcp://{env.address}:{env.port}"
    store, _, _ = next(rendezvous(method, env.rank, env.world, timeout=timeout))
    return cast(Store, store)


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
    source = to_device((wanted % block)[leaving], rows.device)
    # Received rows are sorted by source rank, and within one rank in the requested order.
    place = to_device(owner[rank()].argsort(stable=True), rows.device)
    outgoing = rows[source].contiguous()
    incoming = torch.empty_like(outgoing[:1].expand(block, *rows.shape[1:]), memory_format=torch.contiguous_format)
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return torch.empty_like(incoming).index_copy_(0, place, incoming)
