"""Options shared by several subcommands, and the printed table of evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from synco_fast.commands.parser import whole
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.names import Device, Format

if TYPE_CHECKING:
    from synco_fast.evaluation.context import EvalOptions

__all__ = [
    "CHECKPOINT",
    "SOURCE",
    "add_eval_options",
    "add_options",
    "check_input",
    "check_output",
    "check_ranges",
    "check_source",
    "eval_options",
    "load_torch",
    "path",
    "print_result",
    "write_results",
]

SOURCE = (
    "a folder, tar:FOLDER, list:FILE, parquet:FOLDER, hf:NAME, stream:SHARDS, idx:FOLDER, cifar:FOLDER, "
    "stl10:FOLDER or demo"
)
CHECKPOINT = "a run folder, a checkpoint, or an imported file"


def path(word: str) -> Path:
    """Argument type: the name of a file or folder."""
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.files import named_path

    try:
        found = named_path(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not word.isprintable():
        raise argparse.ArgumentTypeError(f"found {word!r}, expected the name of a file or folder")
    return found


#: Options by name: the usual help text, and how they are read.
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("write the results here as well", {"type": path, "metavar": "FILE"}),
    "device": ("auto: a GPU if there is one", {"choices": get_args(Device), "default": "auto"}),
    "precision": (
        "auto: fp32 for frozen features, else bf16 where the device computes it at full speed",
        {"choices": get_args(Format), "default": "auto"},
    ),
    "workers": ("decoding processes; 0 for none, one per core by default", {"type": whole, "metavar": "N"}),
    "seed": ("random seed, 0 by default", {"type": whole, "default": 0, "metavar": "N"}),
}


def add_options(command: argparse.ArgumentParser, *names: str, **about: str) -> None:
    """Add ``--json``, ``--device``, ``--precision``, ``--workers`` or ``--seed``.

    Args:
        command: The subcommand's parser.
        names: Which of them, in this order.
        about: By name, a help text that replaces the usual one.
    """
    for name in (*names, *(name for name in about if name not in names)):
        usual, how = _OPTIONS[name]
        command.add_argument(f"--{name}", help=about.get(name, usual), **how)


def check_input(options: argparse.Namespace) -> None:
    """Refuse files and folders that do not exist, before the seconds that importing torch takes.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: There is no such run folder.
        DataError: There is no such source, or a folder holds no image but another kind of source.
    """
    from synco_fast.runtime.errors import CheckpointError, ConfigError

    for name in ("checkpoint", "file"):
        found = getattr(options, name, None)
        if isinstance(found, Path) and not found.exists():
            raise CheckpointError(f"checkpoint: found no file or run folder {found}")
    for folder in [*getattr(options, "runs", ()), getattr(options, "run_folder", None)]:
        if isinstance(folder, Path) and not (folder / "config.yaml").exists():
            raise ConfigError(f"run: found no run in {folder}, expected a folder with a config.yaml")
    for source in (getattr(options, "data", None), getattr(options, "source", None)):
        if isinstance(source, str):
            check_source(source)


def check_source(source: str) -> None:
    """Refuse a source that is not there, or a folder without images; only its first level is read.

    Raises:
        DataError: As `synco_fast.data.sources.open.open_source` says.
    """
    from synco_fast.data.sources.open import open_source
    from synco_fast.data.sources.walk import is_image

    prefix, _, rest = source.rpartition(":")
    if source == "demo" or prefix not in ("", "idx", "cifar", "stl10", "tar"):
        return
    inside: list[Path] = []
    with suppress(OSError, RuntimeError):  # no right to enter it, no such user: opening it says so
        folder = Path(rest).expanduser()
        inside = [*folder.iterdir()] if folder.is_dir() else []
    if not any(prefix or is_image(entry.name) or entry.is_dir() for entry in inside):
        open_source(source)


def load_torch(console: Console) -> None:
    """Import torch, and say so on a terminal meanwhile, since it takes seconds."""
    with console.status("loading PyTorch"):
        import torch  # noqa: F401


def check_output(options: argparse.Namespace) -> None:
    """Refuse outputs that could not be written, before any long work starts.

    Raises:
        UserError: As `synco_fast.runtime.files.check_writable` says.
    """
    from synco_fast.runtime.files import check_writable

    for name in ("json", "out", "plot", "lines", "trace", "record", "folder"):
        found = getattr(options, name, None)
        if isinstance(found, Path):
            check_writable(found, name, file=options.parser.metavars.get(name) == "FILE")


def check_ranges(options: argparse.Namespace, **least: float) -> dict[str, Any]:
    """Check that each given option is above its bound.

    Raises:
        ConfigError: A value is not above its bound, or is not finite.
    """
    from math import isfinite

    from synco_fast.runtime.errors import ConfigError

    given = {}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if not (isfinite(one) and one > bound):
                expected = f"{bound + 1:g} or more" if isinstance(one, int) else f"a finite number above {bound:g}"
                raise ConfigError(f"{name.replace('_', '-')}: found {one:g}, expected {expected}")
        given[name] = value
    return given


def add_eval_options(command: argparse.ArgumentParser, data: str = "the run's own source by default") -> None:
    """Add the arguments of every evaluation: checkpoint, images, output folder, device."""
    command.add_argument("checkpoint", type=path, help=CHECKPOINT)
    command.add_argument("--data", metavar="SOURCE", help=data)
    command.add_argument(
        "--out", type=path, metavar="DIR", help="folder of results and caches; RUN/evaluation by default"
    )
    add_options(command, "device", "precision", "workers")
    command.add_argument("--fresh", action="store_true", help="ignore cached results and start over")
    add_options(command, "json")


def eval_options(options: argparse.Namespace) -> EvalOptions:
    """The same options, typed."""
    from synco_fast.evaluation.context import EvalOptions

    return EvalOptions(options.data, options.out, options.device, options.precision, options.workers, options.fresh)


def write_results(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results to the file of ``--json``, if there is one."""
    from synco_fast.runtime.files import write_json

    if options.json is not None:
        write_json(options.json, results)


def print_result(
    result: dict[str, Any],
    options: argparse.Namespace,
    console: Console,
    rows: Sequence[tuple[str, str]],
    *,
    chance: str = "chance",
) -> None:
    """Print the closing table and write ``--json``, on rank 0 only.

    Args:
        result: What the evaluation returned.
        options: ``json`` names a file, or is None.
        console: Where the table goes.
        rows: Further rows.
        chance: What the table calls the result's ``chance``.
    """
    from synco_fast.runtime.distributed import DistEnv

    if not DistEnv.detect().is_main:
        return
    write_results(options, result)
    table = two_columns(f"{result['evaluation']} of {result['checkpoint']}")
    for name, value in result["headline"].items():
        table.add_row(name, f"{value:.1%}", style="bold")
    table.add_row(chance, f"{result['chance']:.1%}")
    table.add_row("precision", result["precision"])
    for name, text in rows:
        table.add_row(name, text)
    if result.get("backbone_unchanged"):
        table.add_row("backbone", "unchanged")
    console.print(table)
