"""Rendezvous: a key prefix for each start of a job, since torchrun's store outlives restarts, and who cannot start."""

from __future__ import annotations

import json
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


def agree_on_prefix(
    store: Store, rank: int, world: int, timeout: float, refusal: str | None = None
) -> tuple[str, dict[int, str]]:
    """Agree on a prefix for the store's keys that no earlier start of the job has used.

    ``torchrun`` keeps one store over all restarts, with the addresses of dead processes. Its restart count is no
    substitute: on several machines each counts its own failures. Here every other rank publishes a random number, and
    rank 0 answers each number with its own random prefix. Answers of earlier starts match no number of this one.

    Args:
        store: Shared by all ranks.
        rank, world: Rank of this process, and W.
        timeout: Seconds that a rank waits for the others.
        refusal: Why this rank cannot start; None if it can.

    Returns:
        The prefix, and by rank why it cannot start; both the same on every rank. If one cannot, the job must end.

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
        store.set(f"here/{prefix}/{rank}", json.dumps(refusal))
        try:
            store.wait([f"all/{prefix}"], timedelta(seconds=timeout))
        except dist.DistStoreError as error:
            raise LostProcessError(
                f"rank {rank} waited {timeout:g} s for the other ranks, expected all {world} processes"
            ) from error
        return prefix, _refusals(json.loads(store.get(f"all/{prefix}")))
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
    said = [refusal, *(json.loads(store.get(f"here/{prefix}/{other}")) for other in range(1, world))]
    store.set(f"all/{prefix}", json.dumps(said))
    return prefix, _refusals(said)


def _refusals(said: list[str | None]) -> dict[int, str]:
    return {rank: refusal for rank, refusal in enumerate(said) if refusal is not None}
