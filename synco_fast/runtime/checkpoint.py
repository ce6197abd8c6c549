"""Checkpoints: atomic saving, loading without running code, finding the newest good one, strict weight loading."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from synco_fast.runtime.errors import CheckpointError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.migrations import migrate_checkpoint

__all__ = ["checkpoints_in", "find_checkpoint", "load_checkpoint", "load_weights", "read_tensors", "save_checkpoint"]

#: Incremented when the layout changes incompatibly.
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")
#: Names that a message lists.
_LISTED = 6


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX.pt`` atomically, then delete all but the newest ``keep``.

    Args:
        folder: Created if missing.
        step: Completed steps.
        state: Tensors and plain values only; `load_checkpoint` refuses everything else.
        keep: Checkpoints to keep.
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
    """Load a file of `torch.save` onto the CPU, if it holds only tensors and plain values.

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
    """Load the checkpoint at ``path``: a file, or the newest good one of a run folder.

    Returns:
        Content, path, and a line about each newer one that is damaged.

    Raises:
        CheckpointError: None can be read.
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


def load_weights(
    module: torch.nn.Module, state: Mapping[str, Any], file: Path | str, *, name: str = "the model", cast: bool = False
) -> None:
    """Load a module's state strictly: the same names, shapes and dtypes.

    Args:
        module: The module; unchanged if anything differs.
        state: Tensors by name.
        file: The file they were read from, for the message.
        name: The architecture's name in the message.
        cast: Accept another floating-point dtype, as in published weights; the module keeps its own.

    Raises:
        CheckpointError: The weights belong to another architecture; the message lists missing, unexpected and
            differing tensors.
    """
    own = module.state_dict()
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: found {type(state).__name__} for the weights, expected tensors by name")
    problems = []
    for what, names in (("lacks", own.keys() - state.keys()), ("has besides", state.keys() - own.keys())):
        if names:
            problems.append(f"{what} {_listed(sorted(map(str, names)))}")
    shared = [key for key in own if key in state]
    wrong = [key for key in shared if not isinstance(state[key], torch.Tensor)]
    if wrong:
        problems.append(f"holds {type(state[wrong[0]]).__name__} instead of a tensor in {_listed(wrong)}")
    shared = [key for key in shared if key not in wrong]
    shapes = [key for key in shared if own[key].shape != state[key].shape]
    if shapes:
        first = shapes[0]
        problems.append(
            f"has other shapes in {_listed(shapes)}: {first} is {tuple(state[first].shape)}, "
            f"the model's {tuple(own[first].shape)}"
        )
    dtypes = [key for key in shared if not _fits(state[key].dtype, own[key].dtype, cast=cast)]
    if dtypes:
        first = dtypes[0]
        problems.append(
            f"has other dtypes in {_listed(dtypes)}: {first} is {state[first].dtype}, the model's {own[first].dtype}"
        )
    if problems:
        raise CheckpointError(f"{file}: found weights of another architecture than {name}: it {'; it '.join(problems)}")
    module.load_state_dict(dict(state))


def _fits(found: torch.dtype, own: torch.dtype, *, cast: bool) -> bool:
    return found == own or (cast and found.is_floating_point and own.is_floating_point)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
