"""Every buffer of the launcher starts as poison, NaN or a whole number that no result may be, between guards.

With ``SYNCO_FAST_CAPABILITY`` the kernels run as they are compiled for that device, by `tests.support.ptx_machine`,
which knows what is unwritten and where buffers end.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import triton

from synco_fast.kernels.triton import config, launch

GUARD = 4096
#: As a count or an index it lies outside of everything; as bits, some are set far behind any queue of these checks.
NUMBER = -(2**30) - 7


def poison_of(dtype):
    return math.nan if dtype.is_floating_point else NUMBER


CAPABILITY = int(os.environ.get("SYNCO_FAST_CAPABILITY", "0"))


@pytest.fixture(autouse=True)
def _compiled():
    """The machine, where a capability is given."""
    if not CAPABILITY:
        yield
        return
    from tests.support.ptx_machine import emulated

    with emulated(CAPABILITY) as emulator:
        # Where a segment overflows, its candidates overwrite others of a row that takes the slow path.
        emulator.overlaps = {"scan"}
        # A fault of Triton, mended in 3.8.
        emulator.unfenced_copies = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
        yield


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Poison instead of uninitialised memory; whoever writes past a buffer fails the check."""
    if CAPABILITY:
        yield
        return
    assert config.interpreted(), "these checks run through test_interpreter.py"
    rooms = []

    def poisoned(*shape, dtype=torch.float32, device):
        size = math.prod(shape)
        room = torch.full((size + 2 * GUARD,), poison_of(dtype), dtype=dtype, device=device)
        rooms.append(room)
        return room[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(launch, "empty", poisoned)
    yield
    for room in rooms:
        for guard in (room[:GUARD], room[-GUARD:]):
            intact = guard.isnan() if room.dtype.is_floating_point else guard == NUMBER
            assert intact.all(), f"written past a buffer of {len(room) - 2 * GUARD} numbers of {room.dtype}"


@pytest.fixture(autouse=True)
def _guard_the_mask(monkeypatch):
    """The names of images lie between names that would mask keys."""
    true = launch.compact_ids

    def guarded(image_ids, queue_ids):
        def within(names):
            room = names.new_zeros(len(names) + 2 * GUARD)
            room[GUARD:-GUARD] = names
            return room[GUARD:-GUARD]

        return tuple(within(names) for names in true(image_ids, queue_ids))

    monkeypatch.setattr(launch, "compact_ids", guarded)
