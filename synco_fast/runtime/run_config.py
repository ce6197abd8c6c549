"""``config.yaml`` of a run folder: written atomically with a checksum, which is verified on reading."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import write_text
from synco_fast.runtime.strict_yaml import read_yaml

__all__ = ["begins_as_run", "has_checkpoints", "holds_run", "read_run_config", "write_run_config"]

_NAME = "config.yaml"
#: How the files of ``pretrain`` and ``pretrain-generator`` begin.
_FIRST = (b"preset:", b"source:")
_MARK = "# sha256 of the lines above: "
_SEALED = re.compile(rf"(.*\n){_MARK}([0-9a-f]{{64}})\n?", re.DOTALL)
#: By command: a key that only its configuration has, its last key, and its part of a checkpoint. Older files without a
#: checksum end with the same key, so that a truncated one lacks it.
_KINDS = {
    "pretrain": ("method", ("evaluation", "batch"), "config"),
    "pretrain-generator": ("latent", ("keep",), "generator_config"),
}


def write_run_config(folder: Path, text: str) -> None:
    """Write ``config.yaml`` with its checksum, atomically, unless the file is the same already.

    Args:
        folder: The run folder.
        text: YAML that ends with a newline.
    """
    path = folder / _NAME
    sealed = f"{text}{_MARK}{_digest(text)}\n"
    if not path.is_file() or path.read_bytes() != sealed.encode():
        write_text(path, sealed)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: a ``config.yaml`` or checkpoints."""
    return (folder / _NAME).exists() or has_checkpoints(folder)


def read_run_config(folder: Path, command: str = "pretrain") -> dict[str, Any]:
    """The values of a run's ``config.yaml``, or if there is none, of its newest good checkpoint.

    Args:
        folder: The run folder.
        command: ``pretrain`` or ``pretrain-generator``, whose run it must be.

    Raises:
        ConfigError: The folder holds no run or one of another command, or the file is damaged or was edited.
        CheckpointError: There is no file, and no readable checkpoint.
    """
    key, _, part = _KINDS[command]
    values = _from_file(folder / _NAME) if (folder / _NAME).is_file() else _from_checkpoint(folder, part)
    if key not in values:
        raise ConfigError(f"run: found one of another command in {folder}, expected one of {command}")
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return _undamaged(path)
    except ConfigError as error:
        if has_checkpoints(path.parent):
            help_ = "remove it, and its settings are taken from the newest checkpoint"
        elif begins_as_run(path.parent):
            help_ = "start over, by --config with --continue or another --out"
        else:
            help_ = "it does not begin as a run's, choose another folder"
        raise ConfigError(f"{error}: {help_}") from error


def begins_as_run(folder: Path) -> bool:
    """Whether a damaged ``config.yaml`` is what a kill left of a run, and not the file of another program."""
    text = (folder / _NAME).read_bytes()
    return not text.strip() or any(text.startswith(first[: len(text)]) for first in _FIRST)


def _undamaged(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"config: found {found} in {path}, expected sections and keys")
    sealed = _SEALED.fullmatch(path.read_bytes().decode())
    if sealed is None and not any(_reaches(values, last) for _, last, _ in _KINDS.values()):
        raise ConfigError(f"config: found {path} cut short, expected every section and key")
    if sealed is not None and _digest(sealed[1]) != sealed[2]:
        raise ConfigError(
            f"config: found {path} changed since it was written (its checksum differs), expected changes as "
            "--section.key VALUE with --resume"
        )
    return values


def _from_checkpoint(folder: Path, part: str) -> dict[str, Any]:
    if folder.is_file() and holds_run(folder.parent.parent):
        raise ConfigError(f"resume: found the file {folder}, expected the folder of its run: {folder.parent.parent}")
    if not has_checkpoints(folder):
        raise ConfigError(f"resume: found no run in {folder}, expected a folder with a config.yaml")
    from synco_fast.runtime.checkpoint import find_checkpoint

    state, path, _ = find_checkpoint(folder)
    values = state.get(part)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: found no settings in it, and no config.yaml in {folder}")
    return values


def _reaches(values: dict[str, Any], last: tuple[str, ...]) -> bool:
    found: Any = values
    for key in last:
        if not isinstance(found, dict) or key not in found:
            return False
        found = found[key]
    return True


def has_checkpoints(folder: Path) -> bool:
    """Whether a run folder holds checkpoints, good or not."""
    return any((folder / "checkpoints").glob("step-*.pt"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
