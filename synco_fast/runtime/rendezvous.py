"""Rendezvous: a key prefix for each start of a job, since torchrun's store outlives restarts."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from synco_fast.runtime.errors import LostProcessError

__all__ = ["agree_on_prefix"]

#: Seconds between two checks of rank 0 for new ranks.
_CHECK_EVERY = 0.02


def agree_on_prefix(store: Store, rank: int, world: int, timeout: float) -> str:
    """Agree on a prefix for the store's keys that no earlier start of the job has used.

    ``torchrun`` keeps one store over all restarts, with the addresses of dead processes. Its restart count is no
    substitute: on several machines each counts its own failures. Here every other rank publishes a random number, and
    rank 0 answers each number with its own random prefix. Answers of earlier starts match no number of this one.

    Args:
        store: Shared by all ranks.
        rank, world: Rank of this process, and W.
        timeout: Seconds that a rank waits for the others.

    Returns:
        The prefix, the same on every rank.

    Raises:
        LostProcessError: A rank does not arrive in time.
    """
    deadline = time.monotonic() + timeout
    if rank:
        own = secrets.token_hex(8)
        store.set(f"hello/{rank}", own)
        answer = f"answer/{own}"
        try:
            store.wait([answer], timedelta(seconds=timeout))
        except dist.DistStoreError as error:
            raise LostProcessError(
                f"rank {rank} found no rank 0 within {timeout:g} s, expected all {world} processes"
            ) from error
        prefix = store.get(answer).decode()
        store.set(f"here/{prefix}/{rank}", "")
        return prefix
    prefix = f"{os.getpid()}-{secrets.token_hex(8)}"
    missing = set(range(1, world))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", prefix)
                if store.check([f"here/{prefix}/{other}"]):
                    missing.discard(other)
        if missing and time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise LostProcessError(f"rank 0 found no rank {names} within {timeout:g} s, expected all {world} processes")
        if missing:
            time.sleep(_CHECK_EVERY)
    return prefix
