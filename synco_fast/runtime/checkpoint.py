"""Checkpoints: written beside and renamed, read without running code, the newest good one found."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from synco_fast.runtime.errors import CheckpointError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.migrations import migrate_checkpoint

__all__ = ["checkpoints_in", "find_checkpoint", "load_checkpoint", "load_weights", "read_tensors", "save_checkpoint"]

#: Raised when the layout changes in a way that older code or newer code cannot read.
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX.pt`` whole or not at all, then drop all but the newest ``keep``.

    Args:
        folder: Made where it is missing.
        step: How many steps are done.
        state: Tensors and plain values only, so that `load_checkpoint` can refuse everything else.
        keep: How many checkpoints stay.
    """
    target = folder / f"step-{step:08d}.pt"
    with atomic_write(target) as temporary:
        torch.save({"format": FORMAT, "step": step, **state}, temporary)
    for old in checkpoints_in(folder)[keep:]:
        old.unlink()
    for leftover in folder.glob(".step-*"):
        leftover.unlink()
    return target


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def read_tensors(path: Path) -> Any:
    """Whatever `torch.save` wrote, if it is tensors and plain values alone, on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, or carries code.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: found no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("Unsupported global: GLOBAL ")[2].split(" ")[0]
        what = f"found {wanted} in its pickle" if wanted else "found a pickle that cannot be read safely"
        raise CheckpointError(f"{path}: {what}, expected tensors and plain values: a pickle can carry code") from error
    except Exception as error:  # a damaged archive raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:120]
        raise CheckpointError(f"{path}: found a file that is cut short or damaged ({reason})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: The file is missing, cut short, holds more than tensors and plain values, or is no checkpoint
            of this program.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: found no synco-fast checkpoint of format {FORMAT}")
    return migrate_checkpoint(state)


def find_checkpoint(path: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The checkpoint that ``path`` means: a file, or the newest good one of a run folder.

    Returns:
        Its content, its path, and a line about each newer one that was damaged.

    Raises:
        CheckpointError: There is none that can be read.
    """
    if path.is_file():
        return load_checkpoint(path), path, []
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: found no file or run folder {path}")
    problems: list[str] = []
    for candidate in checkpoints_in(path / "checkpoints") or checkpoints_in(path):
        try:
            return load_checkpoint(candidate), candidate, problems
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(problems[0] if problems else f"checkpoint: found none in {path}")


def load_weights(module: torch.nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load a module's state strictly.

    Raises:
        CheckpointError: Names or shapes differ: the checkpoint is one of another architecture.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]} besides"
        count = len(missing) + len(extra)
        raise CheckpointError(f"{path}: found a checkpoint of another architecture: it {what} ({count} names differ)")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(
                f"{path}: found a checkpoint of another architecture: {name} has shape {tuple(weights[name].shape)}, "
                f"the model {tuple(tensor.shape)}"
            )
    module.load_state_dict(weights)
