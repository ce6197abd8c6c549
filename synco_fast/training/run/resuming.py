"""Agreement of the processes on what a run resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from synco_fast.runtime.checkpoint import find_checkpoint, newest_checkpoint
from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.runtime.spans import name_ranks

__all__ = ["check_same_start", "find_start"]


def find_start(
    control: HostGroup, resume: Path, accept: Callable[[dict[str, Any], Path], object]
) -> tuple[dict[str, Any], Path, list[str]] | None:
    """What `find_checkpoint` finds, the same on all processes; None where a run has no checkpoint yet.

    Args:
        control: Communication between the processes, all of which call this.
        resume: A checkpoint or run folder.
        accept: As `find_checkpoint` says.

    Raises:
        CheckpointError: There is none that can be read.
        ConfigError: They found checkpoints of different steps, or ``accept`` raised it.
    """
    begun = (resume / "config.yaml").exists() and newest_checkpoint(resume) is None
    found: tuple[dict[str, Any], Path, list[str]] | None = None
    refusal: UserError | None = None
    try:
        found = None if begun else find_checkpoint(resume, accept)
    except UserError as error:
        refusal = error
    without = "no checkpoint yet" if begun else "no checkpoint to resume from"
    check_same_start(control, without if found is None else f"step {found[0]['step']}")
    if refusal is not None:
        raise refusal
    return found


def check_same_start(control: HostGroup, found: str) -> None:
    """Check that all processes found the same to start from; called by all of them.

    Args:
        control: Communication between the processes.
        found: What this one found, in words, such as ``step 8``.

    Raises:
        ConfigError: They differ, as where a machine does not see the run folder; the message names the ranks.
    """
    words = control.gather(found)
    if len(set(words)) == 1:
        return
    ranks = {word: [rank for rank, said in enumerate(words) if said == word] for word in dict.fromkeys(words)}
    listed = ", ".join(f"{word} on {name_ranks(of)}" for word, of in ranks.items())
    raise ConfigError(f"resume: found {listed}, expected the same on every rank: machines must share the run folder")
