"""``synco-fast validate``."""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from math import inf
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from synco_fast.bench.subjects import DTYPES, VALIDATED
from synco_fast.commands.options import add_options, write_results
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.commands.validate_norm import validate_batch_norm
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    from synco_fast.kernels.validation import Verdict

__all__ = ["add"]

#: (B, K, D, N): one row and N = K; a narrow and an odd one; the published counts.
_SHAPES = ((1, 512, 64, 512), (7, 4096, 128, 63), (66, 1025, 96, 1000), (128, 8192, 128, 1024))
_LARGE = ((255, 65536, 128, 1024), (1024, 65536, 128, 1024), (256, 65536, 256, 1024), (64, 16384, 512, 512))
_SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def add(commands: Commands) -> None:
    """Add ``synco-fast validate``."""
    command = commands.add(
        "validate",
        _validate,
        "Compare the backends of the loss with the reference in float64 on this machine. Exit code 1 on a miss.",
        "synco-fast validate --rows 256 --length 65536 --dim 128 --hard 1024",
    )
    command.add_argument("--backends", nargs="+", choices=VALIDATED, help="all that run on this machine by default")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="all by default")
    for name, about in (("rows", "B"), ("length", "K"), ("dim", "D"), ("hard", "N")):
        command.add_argument(
            f"--{name}",
            nargs="+",
            type=positive,
            help=f"{about}; every combination is a case; a sweep by default",
        )
    add_options(command, "device")
    command.add_argument("--part", choices=("loss", "norm"), default="loss", help="norm: batch norm, add and ReLU")
    add_options(command, json="write every case here")
    command.add_argument("--forget", action="store_true", help="empty the cache of first-use validations and exit")


def _validate(options: argparse.Namespace, console: Console) -> int:
    if options.forget:
        return _forget(console)
    import torch

    from synco_fast.kernels.ops import unserved_by_triton
    from synco_fast.kernels.validation import cases, validate
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device
    from synco_fast.runtime.progress import ProgressBar

    device = resolve_device(options.device)
    if options.part == "norm":
        return validate_batch_norm(options, device, console)
    shapes = _shapes(options, large=device.type == "cuda")
    backends = options.backends
    sample = torch.empty(0, shapes[0][2], device=device)
    reason = unserved_by_triton(sample, sample, 0.2)
    if backends is None:
        backends = ["reference", "blockwise"] + ([] if reason else ["triton"])
    elif "triton" in backends and reason:
        raise UserError(f"backends: found triton, expected reference and blockwise on this machine: {reason}")
    wanted = cases(shapes, [getattr(torch, name) for name in options.dtypes])
    verdicts: list[Verdict] = []
    with ProgressBar(console, "comparing", len(wanted), unit="case") as bar:
        for case in wanted:
            verdicts += validate(backends, [case], device)
            bar.advance()
    figures = {"environment": describe_environment(device), "device": device.type}
    write_results(options, figures | {"cases": [verdict.as_dict() for verdict in verdicts]})
    missed = [verdict for verdict in verdicts if verdict.misses]
    _print(verdicts, missed, device.type, reason if "triton" not in backends else None, console)
    return int(bool(missed))


def _forget(console: Console) -> int:
    from synco_fast.runtime.first_use import forget, proofs_folder

    count = forget()
    say(console, f"removed {count} cached results from {proofs_folder()}")
    return 0


def _shapes(options: argparse.Namespace, *, large: bool) -> list[tuple[int, int, int, int]]:
    from synco_fast.runtime.errors import UserError

    given = {name: getattr(options, name) for name in ("rows", "length", "dim", "hard")}
    if not any(given.values()):
        return [*_SHAPES, *(_LARGE if large else ())]
    usual = {"rows": [256], "length": [16384], "dim": [128], "hard": [1024]}
    shapes = list(itertools.product(*(given[name] or usual[name] for name in given)))
    for _, length, _, hard in shapes:
        if hard > length:
            raise UserError(f"hard: found {hard}, expected up to {length}, the length of the queue")
    return shapes


def _print(verdicts: list[Verdict], missed: list[Verdict], device: str, skipped: str | None, console: Console) -> None:
    title = f"largest error, and its share of the bound, on {device}"
    caption = f"triton not run: {skipped}" if skipped else None
    table = figures_table(title, ["backend", "dtype"], ["B, K, D, N", "loss", "gradient", "cases"], caption=caption)
    groups: dict[tuple[Any, ...], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        case = verdict.case
        shape = f"{case.rows}, {case.length}, {case.dim}, {case.hard}"
        groups[verdict.backend, _SHORT[str(case.dtype)], shape].append(verdict)
    for key, group in groups.items():
        misses = sum(bool(verdict.misses) for verdict in group)
        table.add_row(
            *key,
            _worst([(verdict.loss_error, verdict.loss_bound) for verdict in group]),
            _worst([(verdict.gradient_error, verdict.gradient_bound) for verdict in group]),
            Text(f"{misses} bad", "bold red") if misses else Text(f"{len(group)} ok", "green"),
        )
    console.print(table)
    for verdict in missed:
        case = verdict.case
        about = f"{verdict.backend} {case.dtype} B={case.rows} K={case.length} D={case.dim} N={case.hard}"
        about += f" {case.method} T={case.temperature}{' peaked' * case.peaked}{' masked' * case.masked}"
        say(console, f"missed {about}: {', '.join(verdict.misses)}", "red")
    if missed:
        say(console, f"{len(missed)} of {len(verdicts)} cases missed", "bold red")
    else:
        say(console, f"{len(verdicts)} of {len(verdicts)} cases within their bounds, repeats bit-equal", "green")


def _worst(errors: list[tuple[float, float]]) -> str:
    """The error with the largest share of its bound; NaN exceeds every bound."""
    share, error = max((error / bound if error == error else inf, error) for error, bound in errors)
    return f"{error:.1e} {share:3.0%}"
