"""``synco-fast bench loss``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from synco_fast.commands.parser import Verbs, positive

if TYPE_CHECKING:
    from synco_fast.bench.loss import Shape

__all__ = ["add"]

_BACKENDS = ("released", "reference", "compiled", "blockwise", "triton")


def add(verbs: Verbs) -> None:
    """Add ``synco-fast bench loss``."""
    command = verbs.add(
        "bench loss",
        _bench_head,
        "Time and peak memory of SynCo's loss, forward and gradient, by back end. By default B = 64 and 256, K = 4,096 "
        "and 65,536 on a CPU; B from 64 to 4,096 and K from 4,096 to 262,144 on a GPU.",
        "synco-fast bench loss --rows 256 --length 65536 --json loss.json --plot loss.png",
    )
    command.add_argument("--backends", nargs="+", choices=_BACKENDS, help="all that this machine can run by default")
    for name, about in (("rows", "B"), ("length", "K")):
        command.add_argument(f"--{name}", nargs="+", type=positive, help=f"{about}; every combination is measured")
    command.add_argument("--dim", type=positive, default=128, help="D")
    command.add_argument("--hard", type=positive, default=1024, help="N; all of a queue that is shorter")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU by default")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--repeats", type=positive, help="timed runs; 5 on a CPU and 50 on a GPU by default")
    command.add_argument("--rounds", type=positive, help="fresh processes; 3 on a CPU and 1 on a GPU by default")
    command.add_argument("--threads", type=positive, help="of PyTorch on a CPU")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw them here, as PNG")


def _shapes(options: argparse.Namespace, dtype: str, *, large: bool) -> list[Shape]:
    from synco_fast.bench.loss import Shape

    if options.rows or options.length:
        pairs = list(itertools.product(options.rows or [256], options.length or [65536]))
    elif large:
        pairs = [(rows, 65536) for rows in (64, 256, 1024, 4096)] + [(256, length) for length in (4096, 16384, 262144)]
    else:
        pairs = list(itertools.product((64, 256), (4096, 65536)))
    return [Shape(rows, length, options.dim, options.hard, dtype) for rows, length in pairs]


def _bench_head(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    import torch
    from rich.progress import Progress

    from synco_fast.bench.loss import sweep
    from synco_fast.bench.loss_report import draw_loss
    from synco_fast.bench.roofline import floor_seconds, measure_ceilings
    from synco_fast.kernels.ops import unserved_by_triton
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.files import write_json
    from synco_fast.runtime.precision import resolve_device

    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    sample = torch.empty(0, options.dim, dtype=getattr(torch, dtype), device=device)
    reason = unserved_by_triton(sample, sample, 0.2)
    backends = options.backends or [name for name in _BACKENDS if name != "triton" or not reason]
    if "triton" in backends and reason:
        raise UserError(f"backends: found triton, expected the others on this machine: {reason}")
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = _shapes(options, dtype, large=on_gpu)
    ceilings = measure_ceilings(device, getattr(torch, dtype))
    repeats = options.repeats or (50 if on_gpu else 5)
    results = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(backends) * len(shapes))
        rounds = options.rounds or (1 if on_gpu else 3)
        measured = sweep(backends, shapes, device=device, repeats=repeats, rounds=rounds, threads=options.threads)
        for result in measured:
            itemsize = getattr(torch, dtype).itemsize
            result["floor_s"] = floor_seconds(result["rows"], result["length"], result["dim"], itemsize, ceilings)
            results.append(result)
            progress.advance(task)
    environment = describe_environment()
    if options.json is not None:
        about = {"environment": environment, "device": device.type, "ceilings": ceilings._asdict()}
        write_json(options.json, about | {"results": results})
    _print(results, f"{environment['device']}, {dtype}, D = {options.dim}, N = {options.hard}", console)
    console.print(
        f"floor: {ceilings.flops / 1e12:,.2f} TFLOP/s and {ceilings.bytes / 1e9:,.0f} GB/s, as measured here",
        highlight=False,
    )
    if options.plot is not None and any("failed" not in result for result in results):
        draw_loss(results, f"{environment['device']}, torch {environment['torch']}, {dtype}", options.plot)
    return 0


def _print(results: list[dict[str, Any]], title: str, console: Console) -> None:
    from synco_fast.bench.loss_report import best_seconds

    on_gpu = any("cold_s" in result for result in results)
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("B", justify="right")
    table.add_column("K", justify="right")
    table.add_column("back end", no_wrap=True)
    for name in ("ms", *(("cold", "graph") if on_gpu else ()), "speed", "MiB", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    first: dict[tuple[int, int], float] = {}
    for result in sorted(results, key=lambda result: (result["rows"], result["length"])):
        shape = result["rows"], result["length"]
        key = [f"{result['rows']:,}", f"{result['length']:,}", result["backend"]]
        if "failed" in result:
            table.add_row(*key, *(["-"] * (len(table.columns) - 3)))
            notes.append(f"{result['backend']} at B = {key[0]}, K = {key[1]}: {result['failed']}")
            continue
        seconds = best_seconds(result)
        times = [result["median_s"]] + ([result["cold_s"], result.get("graph_s")] if on_gpu else [])
        speed = f"{first.setdefault(shape, seconds) / seconds:,.2f}x"
        figures = [f"{1e3 * value:,.3f}" if value else "-" for value in times]
        table.add_row(*key, *figures, speed, f"{result['extra_mib']:,.1f}", f"{result['floor_s'] / seconds:.0%}")
        if "graph" in result:
            notes.append(f"{result['backend']} at B = {key[0]}, K = {key[1]}: {result['graph']}")
    console.print(table)
    console.print("ms: median; speed: against the first back end at that shape; floor: its share of the time")
    for note in notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
