"""``synco-fast bench loss``."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.bench.subjects import BACKENDS, CAPABILITIES, DTYPES, FIELD, LOSS_BACKENDS, SELECTIONS
from synco_fast.commands.options import add_options, path, write_results
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    from synco_fast.bench.cost.model import Cost
    from synco_fast.bench.loss import Shape

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench loss``."""
    command = commands.add(
        "bench loss",
        _bench_loss,
        "Time and peak memory of SynCo's loss, forward and gradient, by backend. By default B = 64 and 256, K = 4,096 "
        "and 65,536 on a CPU; B from 64 to 4,096 and K from 4,096 to 262,144 on a GPU. With --model, instruction "
        "and byte counts of the kernel launches; needs no GPU.",
        "synco-fast bench loss --rows 256 --length 65536 --json loss.json --plot loss.png",
    )
    names = tuple(dict.fromkeys((*LOSS_BACKENDS, *SELECTIONS)))
    command.add_argument(
        "--backends",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"{', '.join(BACKENDS)} (by default all that run here), and other implementations of parts: "
        f"{', '.join(FIELD)}",
    )
    command.add_argument(
        "--part",
        choices=("loss", "selection"),
        default="loss",
        help=f"selection: the N largest similarities alone, by {', '.join(SELECTIONS)}; the last two compute the loss "
        "without synthetic negatives",
    )
    for name, about in (("rows", "B"), ("length", "K")):
        command.add_argument(
            f"--{name}", nargs="+", type=positive, help=f"{about}; every combination is measured; see above"
        )
    command.add_argument("--dim", type=positive, default=128, help="D, 128 by default")
    command.add_argument(
        "--hard", type=positive, default=1024, help="N, 1024 by default; at most the length of the queue"
    )
    command.add_argument(
        "--synthetic", type=positive, default=960, help="M, 960 by default, spread over the types as published"
    )
    command.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU and in the model, else float32, by default")
    add_options(command, "device")
    command.add_argument("--repeats", type=positive, help="timed runs; 5 on a CPU and 50 on a GPU by default")
    command.add_argument("--rounds", type=positive, help="fresh processes; 3 on a CPU and 1 on a GPU by default")
    command.add_argument("--threads", type=positive, help="threads on a CPU; PyTorch's own number by default")
    add_options(command, "json")
    command.add_argument(
        "--lines", type=path, metavar="FILE", help="append each result here at once, as a line of JSON"
    )
    command.add_argument("--plot", type=path, metavar="FILE", help="plot the results here, as PNG")
    command.add_argument(
        "--model", action="store_true", help="count the cost of the launches instead; needs only Triton"
    )
    command.add_argument(
        "--capability", type=int, choices=CAPABILITIES, default=90, help="compute capability for the model, times ten"
    )


def _shapes(options: argparse.Namespace, dtype: str, *, large: bool) -> list[Shape]:
    from synco_fast.bench.loss import Shape

    if options.rows or options.length:
        pairs = list(itertools.product(options.rows or [256], options.length or [65536]))
    elif large:
        pairs = [(rows, 65536) for rows in (64, 256, 1024, 4096)] + [(256, length) for length in (4096, 16384, 262144)]
    else:
        pairs = list(itertools.product((64, 256), (4096, 65536)))
    numbers = options.dim, options.hard, dtype, options.synthetic
    return [Shape(rows, length, *numbers) for rows, length in pairs]


def _bench_loss(options: argparse.Namespace, console: Console) -> int:
    if options.model:
        return _model(options, console)
    import torch

    from synco_fast.bench.loss import sweep
    from synco_fast.bench.loss_report import draw_loss
    from synco_fast.bench.roofline import measure_ceilings
    from synco_fast.kernels.ops import unserved_by_triton
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device
    from synco_fast.runtime.progress import ProgressBar

    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    sample = torch.empty(0, options.dim, dtype=getattr(torch, dtype), device=device)
    reason = unserved_by_triton(sample, sample, 0.2)
    backends = options.backends or _default_backends(options.part, served=not reason)
    known = LOSS_BACKENDS if options.part == "loss" else tuple(SELECTIONS)
    for name in backends:
        if name not in known:
            raise UserError(f"backends: found {name}, expected for the {options.part} {', '.join(known)}")
    if "triton" in backends and reason:
        raise UserError(f"backends: found triton, expected the others on this machine: {reason}")
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = _shapes(options, dtype, large=on_gpu)
    ceilings = measure_ceilings(device, getattr(torch, dtype))
    results = []
    with ProgressBar(console, "measuring", len(backends) * len(shapes)) as bar:
        measured = sweep(
            backends,
            shapes,
            device=device,
            repeats=options.repeats or (50 if on_gpu else 5),
            rounds=options.rounds or (1 if on_gpu else 3),
            threads=options.threads,
            part=options.part,
            keep=_line_writer(options.lines),
        )
        for result in measured:
            result["floor_s"] = _floor(result, options.part, getattr(torch, dtype).itemsize, ceilings)
            results.append(result)
            bar.advance()
    environment = describe_environment(device)
    about = {"environment": environment, "device": device.type, "ceilings": ceilings._asdict()}
    write_results(options, about | {"part": options.part, "results": results})
    _print(results, f"{environment['device']}, {dtype}, D = {options.dim}, N = {options.hard}", console)
    halves = " (or by three products of halves)" if on_gpu and dtype == "float32" else ""
    say(
        console,
        f"floor: {ceilings.flops / 1e12:,.2f} TFLOP/s{halves} and {ceilings.bytes / 1e9:,.0f} GB/s, as measured here",
    )
    if options.plot is not None and any("failed" not in result for result in results):
        draw_loss(results, f"{environment['device']}, torch {environment['torch']}, {dtype}", options.plot)
    return 0


def _default_backends(part: str, *, served: bool) -> list[str]:
    names = BACKENDS if part == "loss" else [name for name in SELECTIONS if "flashinfer" not in name]
    return [name for name in names if name != "triton" or served]


def _line_writer(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that appends a line of JSON to a file, or does nothing."""

    def write(result: dict[str, Any]) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")

    return write


def _floor(result: dict[str, Any], part: str, itemsize: int, ceilings: Any) -> float:
    from synco_fast.bench.roofline import floor_seconds, selection_floor

    sizes = result["rows"], result["length"], result["dim"], itemsize, ceilings
    if part == "loss":
        return floor_seconds(*sizes)
    return selection_floor(*sizes, product=not result["backend"].endswith("-only"))


def _print(results: list[dict[str, Any]], title: str, console: Console) -> None:
    from synco_fast.bench.loss_report import best_seconds

    on_gpu = any("cold_s" in result for result in results)
    numbers = ("ms", *(("cold", "graph") if on_gpu else ()), "bare", "speed", "MiB", "floor")
    table = figures_table(title, ["B", "K", "backend"], numbers)
    table.columns[0].justify = table.columns[1].justify = "right"
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
        row = [f"{1e3 * value:,.3f}" if value else "-" for value in (*times, result.get("bare_s"))]
        table.add_row(*key, *row, speed, f"{result['extra_mib']:,.1f}", f"{result['floor_s'] / seconds:.0%}")
        if "graph" in result:
            notes.append(f"{result['backend']} at B = {key[0]}, K = {key[1]}: {result['graph']}")
    console.print(table)
    say(console, "ms: median; bare: the operator alone; speed: against the first backend at that shape;")
    say(console, "floor: its share of the time")
    for note in notes:
        say(console, note, "yellow")


def _model(options: argparse.Namespace, console: Console) -> int:
    from dataclasses import asdict

    from synco_fast.runtime.errors import UserError

    try:
        from synco_fast.bench.cost.model import DEVICES, costs_of_loss, total
    except ImportError as error:
        raise UserError(f"model: found no Triton, expected it installed ({error})") from error
    from synco_fast.bench.cost.launches import compiler_version
    from synco_fast.bench.loss import Shape
    from synco_fast.kernels.triton.config import interpreted
    from synco_fast.runtime.progress import ProgressBar

    if interpreted():
        raise UserError("model: found TRITON_INTERPRET=1, expected it unset: the interpreter compiles nothing")
    device = DEVICES[options.capability]
    found = []
    for rows, length in itertools.product(options.rows or [256], options.length or [65536]):
        shape = Shape(rows, length, options.dim, options.hard, options.dtype or "bfloat16", options.synthetic)
        with ProgressBar(console, "compiling the launches", None):
            costs = costs_of_loss(shape, options.capability)
        found.append({"shape": asdict(shape), "total": total(costs), "launches": [cost.as_dict() for cost in costs]})
        _print_model(costs, f"{device.name}, B = {shape.rows:,}, K = {shape.length:,}, {shape.dtype}", console)
    say(console, f"counted from machine code, {compiler_version()}, for sm_{options.capability}")
    say(
        console,
        f"stated: {device.processors} SMs at {device.clock:,.0f} MHz, {device.issue:.0%} of issue slots, "
        f"{device.flops:,} FLOP/clk/SM, L2 {device.l2 / 1e6:.1f} and HBM {device.hbm / 1e6:.1f} TB/s, "
        f"{device.launch:g} us a launch; nothing was measured",
    )
    about = {"compiler": compiler_version(), "capability": options.capability, "assumed": asdict(device)}
    write_results(options, about | {"shapes": found})
    return 0


def _print_model(costs: Sequence[Cost], title: str, console: Console) -> None:
    from synco_fast.bench.cost.model import total

    numbers = ("grid", "warps", "regs", "KiB", "fit", "waves", "M instr", "waits", "MB L2", "GFLOP", "us")
    table = figures_table(title, ["launch"], numbers, gap=0)
    table.add_column("bound", no_wrap=True)
    for cost in costs:
        table.add_row(
            cost.name,
            f"{cost.programs:,}",
            str(cost.warps),
            str(cost.registers),
            f"{cost.shared / 1024:.0f}",
            str(cost.resident),
            str(cost.waves),
            f"{cost.instructions / 1e6:.2f}",
            f"{cost.waits:.1f}",
            f"{cost.l2 / 1e6:.1f}",
            "-" if cost.flops is None else f"{cost.flops / 1e9:.1f}",
            f"{cost.microseconds:.1f}",
            cost.bound,
        )
    sums = total(costs)
    table.add_section()
    row = [f"{sums['instructions'] / 1e6:.1f}", "", f"{sums['l2'] / 1e6:.0f}", "", f"{sums['microseconds']:.0f}"]
    table.add_row("sum", *[""] * 6, *row)
    console.print(table)
    say(console, "waits: of a warp for loads into registers, one after another", "dim")
    line = f"MB L2: in whole sectors of 32 bytes; {sums['used'] / 1e6:.0f} MB of them are used"
    say(console, line, "dim")
    for cost in costs:
        for loop in cost.loops:
            line = f"{cost.name}: {loop['source']}: {loop['instructions']:,} instructions, {loop['trips']:,.1f} trips"
            say(console, f"{line} ({loop['how']})", "dim")
        for branch in cost.assumed:
            say(console, f"{cost.name}: {branch}: assumed taken", "yellow")
        if cost.spilled:
            say(console, f"{cost.name}: {cost.spilled} bytes spilled", "yellow")
        if cost.serialised:
            say(console, f"{cost.name}: ptxas serialises its wgmma (C7515)", "yellow")
