"""Checkpoints: atomic saving, loading without running code, finding the newest good one, strict weight loading."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.runtime.errors import CheckpointError, first_line
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.finite import not_finite
from synco_fast.runtime.migrations import migrate_checkpoint

__all__ = [
    "BEST",
    "check_checkpoint",
    "checkpoints_in",
    "find_checkpoint",
    "is_checkpoint",
    "keep_best",
    "load_checkpoint",
    "load_optimizer",
    "load_weights",
    "newest_checkpoint",
    "read_tensors",
    "save_checkpoint",
    "set_aside",
    "step_of",
]

#: Incremented when the layout changes incompatibly.
FORMAT = 1
#: Words by which `torch.save` says that a file could not be written.
_UNWRITTEN = ("PytorchStreamWriter", "inline_container", "iostream", "file write")
#: The checkpoint of the highest score, beside the newest ones.
BEST = "best.pt"
_NAME = re.compile(r"step-(\d{8,})\.pt")
#: Settings of a group by which PyTorch decides on which device an optimizer's ``step`` lies.
_PLACES_STEP = ("fused", "capturable")
#: Names that a message lists.
_LISTED = 6


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX.pt`` atomically, then delete older ones, so that ``keep`` are left with it.

    Args:
        folder: Created if missing.
        step: Completed steps.
        state: Tensors and plain values only; `load_checkpoint` refuses everything else.
        keep: Checkpoints to keep.

    Raises:
        CheckpointError: It cannot be written, such as on a full disk; the room that it needs is named, and the older
            ones stay.
    """
    target = folder / f"step-{step:08d}.pt"
    for leftover in (*folder.glob(".step-*"), *folder.glob(".best.*")):  # of a killed process, on a full disk
        leftover.unlink()
    try:
        with atomic_write(target) as temporary:
            torch.save({"format": FORMAT, "step": step, **state}, temporary)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(word in str(error) for word in _UNWRITTEN):
            raise
        raise CheckpointError(f"{target}: {_unwritten(error, folder, state)}") from error
    # A file of a later step, such as a damaged one that this run started below, is none that was kept.
    older = [path for path in checkpoints_in(folder) if step_of(path) < step]
    for old in older[max(keep, 1) - 1 :]:
        old.unlink()
    return target


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, which could not be read, to ``NAME.damaged``; returns them as they were.

    A later resume then does not try them first, and nobody takes them for the newest good one. A file that cannot be
    renamed stays.
    """
    moved = []
    for path in checkpoints_in(folder):
        if step_of(path) > step:
            with suppress(OSError):
                path.replace(path.with_name(f"{path.name}.damaged"))
                moved.append(path)
    return moved


def keep_best(checkpoint: Path) -> Path:
    """Keep a checkpoint as ``best.pt`` beside it, atomically; it stays when `save_checkpoint` deletes older ones.

    It is a hard link, which takes no further room until then, or a copy where the file system has no links.

    Raises:
        CheckpointError: It cannot be written.
    """
    target = checkpoint.with_name(BEST)
    if target.exists() and target.samefile(checkpoint):
        return target
    try:
        with atomic_write(target) as temporary:
            try:
                os.link(checkpoint, temporary)
            except OSError:
                shutil.copyfile(checkpoint, temporary)
    except OSError as error:
        raise CheckpointError(
            f"{target}: found no way to write it ({error.strerror or error}); {checkpoint.name} holds the same"
        ) from error
    return target


def _unwritten(error: Exception, folder: Path, state: dict[str, Any]) -> str:
    """Why a checkpoint could not be written, and what to do."""
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in _tensors(state)}
    needed, free = sum(storages.values()) / 2**20, shutil.disk_usage(folder).free / 2**20
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error, 80)
    kept = checkpoints_in(folder)
    return (
        f"found no way to write it ({reason}), expected space for {needed:,.1f} MiB, of which {free:,.1f} are free; "
        + (f"the newest good checkpoint is {kept[0].name}" if kept else "there is no older one")
        + f": free some space, then --resume {folder.parent}"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder; None if it has none yet."""
    return next(iter(checkpoints_in(run / "checkpoints")), None)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint among `checkpoints_in`."""
    return int(path.stem.removeprefix("step-"))


def read_tensors(path: Path) -> Any:
    """Load a file of `torch.save` onto the CPU, if it holds only tensors and plain values.

    Raises:
        CheckpointError: The file is missing or damaged, or carries code.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: found no file {path}")
    if not _begins_as_saved(path):
        raise CheckpointError(f"{path}: found no file of torch.save, expected a checkpoint")
    try:
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("Unsupported global: GLOBAL ")[2].split(" ")[0]
        what = f"found {wanted} in its pickle" if wanted else "found a pickle that cannot be read safely"
        raise CheckpointError(f"{path}: {what}, expected tensors and plain values: a pickle can carry code") from error
    except Exception as error:  # a damaged archive raises many kinds
        reason = first_line(error, 120).split(". ")[0].rstrip(".")
        # Of the bytes of something else, which say nothing; zeros, as after a power failure, count as a tar archive.
        if isinstance(error, KeyError | IndexError | EOFError) or "legacy .tar format" in reason:
            reason = "no file of torch.save"
        raise CheckpointError(f"{path}: found a file that is cut short or damaged ({reason})") from error


def _begins_as_saved(path: Path) -> bool:
    """Whether a file begins as what `torch.save` writes, a zip archive or a pickle, or is empty or zeros by a fault."""
    with path.open("rb") as file:
        return file.read(1) in (b"P", b"\x80", b"\0", b"")


def _check_sums(path: Path) -> None:
    """Compare every record of a zip archive with its checksum, which `torch.load` does not.

    Raises:
        BadZipFile: They differ, or a record is compressed, as `torch.save` never does.
    """
    if not zipfile.is_zipfile(path):
        return  # the format before PyTorch 1.6, or damaged so that torch.load says it
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("compressed records")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} differs")


def is_checkpoint(content: Any) -> bool:
    """Whether what `read_tensors` returned is a checkpoint of this program."""
    return isinstance(content, dict) and type(content.get("format")) is int and content["format"] == FORMAT


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: The file is missing, cut short, holds more than tensors and plain values, is no checkpoint of
            this program, has no sensible step, or holds NaN.
    """
    return check_checkpoint(read_tensors(path), path)


def check_checkpoint(state: Any, path: Path) -> dict[str, Any]:
    """What `read_tensors` returned, in the layout of today; raises as `load_checkpoint`."""
    if not is_checkpoint(state):
        raise CheckpointError(f"{path}: found no synco-fast checkpoint of format {FORMAT}")
    step, named = state.get("step"), _NAME.fullmatch(path.name)
    if type(step) is not int or step < 0 or (named and step != int(named[1])):
        expected = str(int(named[1])) if named else "a whole number from 0 up"
        raise CheckpointError(f"{path}: found {str(step)[:40]!r} as its step, expected {expected}")
    bad = not_finite(_tensors(state), infinite=True)
    if bad is not None:
        raise CheckpointError(f"{path}: found NaN in {bad}, expected numbers")
    return migrate_checkpoint(state)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, by its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def find_checkpoint(
    path: Path, accept: Callable[[dict[str, Any], Path], object] = lambda state, path: None
) -> tuple[dict[str, Any], Path, list[str]]:
    """The checkpoint that ``path`` means: a file, or the newest good one of a run folder.

    Args:
        path: A file or folder.
        accept: Called with content and path of each that can be read; one for which it raises `CheckpointError` gives
            way to an older one too.

    Returns:
        Content, path, and a line about each newer one that is damaged.

    Raises:
        CheckpointError: None can be read.
    """
    if path.is_file():
        state = load_checkpoint(path)
        accept(state, path)
        return state, path, []
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: found no file or run folder {path}")
    problems: list[str] = []
    tried: set[Path] = set()
    while untried := [file for file in _candidates(path) if file not in tried]:
        candidate = untried[0]
        tried.add(candidate)
        try:
            state = load_checkpoint(candidate)
            accept(state, candidate)
            return state, candidate, problems
        except CheckpointError as error:
            if candidate.exists():  # a run that trains meanwhile may have deleted it for a newer one
                problems.append(str(error))
    if not problems:
        raise CheckpointError(f"checkpoint: found none in {path}, expected a run folder or a checkpoint")
    older = f", and {len(problems) - 1} older no better" if problems[1:] else ""
    raise CheckpointError(f"{problems[0]}{older}: restore it from a copy, or start a new run")


def _candidates(path: Path) -> list[Path]:
    return checkpoints_in(path / "checkpoints") or checkpoints_in(path)


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
    problems = _mismatches(own, state, cast=cast)
    if problems:
        raise CheckpointError(f"{file}: found weights of another architecture than {name}: it {'; it '.join(problems)}")
    # What a network holds beside finite numbers from the start, such as a mask of -inf, is no damage.
    bad = [key for key in own if not torch.isfinite(state[key]).all() and torch.isfinite(own[key]).all()]
    if bad:
        raise CheckpointError(f"{file}: found NaN or infinity in {_listed(bad)}, expected numbers")
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:  # a value that a module refuses
        raise CheckpointError(f"{file}: {str(error).splitlines()[-1].strip()}") from error


def _mismatches(own: Mapping[str, Tensor], state: Mapping[str, Any], *, cast: bool) -> list[str]:
    """How tensors by name differ from those of a module in names, shapes and dtypes."""
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
    return problems


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, file: Path | str) -> None:
    """Load what an optimizer remembers, strictly; its settings, such as weight decay, stay its own.

    The state may come from another device and another memory layout: it takes those of the parameters.

    Args:
        optimizer: What is loaded into; unchanged where anything differs.
        state: Its ``state_dict`` of then.
        file: Where it was read, for the message.

    Raises:
        CheckpointError: It is that of another optimizer or of other parameters, or holds what is not finite.
    """
    parameters = [[*group["params"]] for group in optimizer.param_groups]
    try:
        numbers = [[*group["params"]] for group in state["param_groups"]]
        kept = [(state["state"].get(number, {}), own) for number, own in _pairs(numbers, parameters)]
        for values, own in kept:
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and (value.shape, value.dtype) != (own.shape, own.dtype):
                    raise ValueError(
                        f"{name} of shape {tuple(value.shape)} in {value.dtype}, expected {tuple(own.shape)} in "
                        f"{own.dtype}"
                    )
                if isinstance(value, Tensor) and not torch.isfinite(value).all():
                    raise ValueError(f"NaN or infinity in {name}, expected numbers")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"none that can be read ({error!r})"
        raise CheckpointError(f"{file}: optimizer: found {reason}") from error
    # LAMB counts its steps in the group.
    remembered = ("params", "step")
    settings = [
        {key: value for key, value in group.items() if key not in remembered} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(_as_kept_here(state, optimizer, numbers))
    for group, own_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(own_settings)


def _as_kept_here(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, numbers: list[list[Any]]
) -> dict[str, Any]:
    """A checked state as this optimizer would have kept it; the given one is not changed.

    By a group's settings PyTorch decides on which device ``step`` lies: they must be those of here. Fused kernels need
    the parameters' own memory layout, which ``training.channels_last`` can change.
    """
    own_groups, kept = optimizer.param_groups, dict(state["state"])
    groups = [
        {**group, **{name: own[name] for name in _PLACES_STEP if name in own}}
        for group, own in zip(state["param_groups"], own_groups, strict=True)
    ]
    for number, own in _pairs(numbers, [[*group["params"]] for group in own_groups]):
        if number in kept:
            kept[number] = {name: _laid_out_as(own, value) for name, value in kept[number].items()}
    return {**state, "state": kept, "param_groups": groups}


def _laid_out_as(own: Tensor, value: Any) -> Any:
    """A tensor of a parameter's shape in the parameter's memory layout; anything else as it is."""
    if not isinstance(value, Tensor) or not value.dim() or value.stride() == own.stride():
        return value
    return torch.empty_like(own, device=value.device).copy_(value)


def _pairs(numbers: list[list[Any]], parameters: list[list[Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """What each parameter is called in the state, and the parameter."""
    if [len(group) for group in numbers] != [len(group) for group in parameters]:
        found, expected = (sum(map(len, groups)) for groups in (numbers, parameters))
        raise ValueError(f"the state of {found} parameters, expected {expected} in as many groups")
    for names, group in zip(numbers, parameters, strict=True):
        yield from zip(names, group, strict=True)


def _fits(found: torch.dtype, own: torch.dtype, *, cast: bool) -> bool:
    return found == own or (cast and found.is_floating_point and own.is_floating_point)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
