"""``synco-fast bench norm``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.bench.subjects import DTYPES, NORM_SETTINGS, NORMS
from synco_fast.commands.options import add_options, write_results
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    import torch

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench norm``."""
    command = commands.add(
        "bench norm",
        _bench_norm,
        "Time of batch norm, add and ReLU, forward and backward, by form and layer shape of a ResNet, and the bytes "
        "and launches of a step by count. Or the time of a whole step by model.norm.",
        "synco-fast bench norm --backbone resnet50 --batch 256 --json norm.json",
    )
    command.add_argument("--part", choices=("layers", "step"), default="layers", help="layer shapes or whole steps")
    command.add_argument(
        "--norms",
        nargs="+",
        choices=NORM_SETTINGS,
        default=["plain", "auto"],
        help="values of model.norm for --part step; plain and auto by default",
    )
    command.add_argument("--backbone", default="resnet50", help="a torchvision or timm ResNet")
    command.add_argument("--size", type=positive, default=224, help="image size in pixels")
    command.add_argument("--batch", type=positive, help="256 on a GPU and 16 on a CPU by default")
    command.add_argument("--groups", type=positive, default=8, help="groups of batch norm")
    command.add_argument("--subjects", nargs="+", choices=tuple(NORMS), help="all that run on this machine by default")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of x, bfloat16 by default")
    add_options(command, "device")
    command.add_argument("--repeats", type=positive, help="timed runs per round; 3 on a CPU and 20 on a GPU by default")
    command.add_argument("--rounds", type=positive, default=5, help="rounds over all subjects")
    command.add_argument("--threads", type=positive, help="threads on a CPU; PyTorch's own number by default")
    command.add_argument("--dry", action="store_true", help="one small layer, once: a test that it runs")
    add_options(command, "json")


def _bench_norm(options: argparse.Namespace, console: Console) -> int:
    import torch

    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device

    device = resolve_device(options.device)
    batch = options.batch or (256 if device.type == "cuda" and not options.dry else 16)
    if batch % options.groups:
        raise UserError(f"batch: found {batch}, expected a multiple of {options.groups} (groups)")
    if options.threads:
        torch.set_num_threads(options.threads)
    (_bench_steps if options.part == "step" else _bench_layers)(options, device, batch, console)
    return 0


def _shape(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    return {"backbone": options.backbone, "batch": batch, "size": options.size, "groups": options.groups}


def _bench_layers(options: argparse.Namespace, device: torch.device, batch: int, console: Console) -> None:
    import torch

    from synco_fast.bench.norm import measure_norm, totals, unavailable
    from synco_fast.bench.norm_model import FORMS, layers_of, step_work
    from synco_fast.bench.roofline import measure_ceilings
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.progress import ProgressBar

    load, dtype, on_gpu = os.getloadavg(), getattr(torch, options.dtype), device.type == "cuda"
    reasons = {subject: unavailable(subject, device, dtype) for subject in NORMS}
    subjects = options.subjects or [subject for subject in NORMS if not reasons[subject]]
    for subject in subjects:
        if reasons[subject]:
            raise UserError(f"subjects: found {subject}, expected others on this machine: {reasons[subject]}")
    layers = layers_of(options.backbone, options.size)
    if not layers:
        raise UserError(f"backbone: found {options.backbone}, expected a torchvision or timm ResNet")
    rounds, repeats = options.rounds, options.repeats or (20 if on_gpu else 3)
    if options.dry:
        subjects = [subject for subject in subjects if subject != "compiled"]
        layers, rounds, repeats = [layers[-1]], 1, 1
    ceilings = measure_ceilings(device, dtype)
    shape = _shape(options, batch)
    counted = {form: step_work(form, **shape)._asdict() for form in FORMS}
    environment = describe_environment(device)
    about = {"environment": environment, "load": load, "device": device.type, "dtype": options.dtype, **shape}
    about |= {"ceilings": ceilings._asdict(), "counted": counted}
    results: list[dict[str, Any]] = []
    with ProgressBar(console, "measuring", len(layers), unit="layer") as bar:
        for layer in layers:
            results += measure_norm(
                subjects,
                [layer],
                batch=batch,
                groups=options.groups,
                device=device,
                dtype=dtype,
                bandwidth=ceilings.bytes,
                repeats=repeats,
                rounds=rounds,
            )
            # After each layer, so that nothing is lost where the time ends early.
            sums = {"totals_s": totals(results), "cpu_totals_s": totals(results, "cpu_median_s")}
            if on_gpu:
                sums["graph_totals_s"] = totals(results, "graph_s")
            write_results(options, {**about, **sums, "results": results})
            bar.advance()
    title = f"{environment['device']}, {options.dtype}, batch {batch}, {options.groups} groups"
    _print(results, title, console)
    _print_counted(counted, options.backbone, console)


def _bench_steps(options: argparse.Namespace, device: torch.device, batch: int, console: Console) -> None:
    from synco_fast.bench.norm_step import measure_norm_steps
    from synco_fast.presets import load_config
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.progress import ProgressBar

    config = load_config(
        "synco-r50-200",
        {
            "model.backbone": options.backbone,
            "model.batch_norm_groups": options.groups,
            "augment.size": options.size,
            "training.batch": batch,
            "training.precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[options.dtype],
            "training.device": options.device,
            "method.warmup_epochs": 0,
            "evaluation.every": 0,
        },
    )
    load, rounds = os.getloadavg(), 1 if options.dry else options.rounds
    with ProgressBar(console, "measuring", rounds, unit="round") as bar:
        results = measure_norm_steps(config.model_dump(mode="json"), options.norms, rounds=rounds, advance=bar.advance)
    environment = describe_environment(device)
    about = {"environment": environment, "load": load, "device": device.type, "dtype": options.dtype}
    write_results(options, {**about, **_shape(options, batch), "steps": results})
    title = f"{environment['device']}, {options.dtype}, batch {batch}, {options.groups} groups"
    table = figures_table(title, ["model.norm"], ["ms", "CPU ms", "ratio (quartiles)", "CPU ratio (quartiles)"])
    for row in results:
        cells = [f"{1e3 * row['median_s']:,.0f}", f"{1e3 * row['cpu_median_s']:,.0f}"]
        for name in ("of_first", "cpu_of_first"):
            low, middle, high = row[name]
            cells.append(f"{middle:.3f} ({low:.2f} to {high:.2f})")
        table.add_row(row["norm"], *cells)
    console.print(table)
    say(console, f"whole steps in turn; ratio to {options.norms[0]} in the same round; rounds: {rounds}")


def _print(results: list[dict[str, Any]], title: str, console: Console) -> None:
    from synco_fast.bench.norm import totals

    table = figures_table(title, ["layer", "form"], ["ms", "CPU ms", "GB/s", "floor"])
    for result in results:
        follows = "+add" * result["residual"] + "+relu" * result["relu"]
        layer = f"{result['times']}x {result['channels']}, {result['height']}x{result['width']} {follows}"
        table.add_row(
            layer,
            result["subject"],
            f"{1e3 * result['median_s']:,.3f}",
            f"{1e3 * result['cpu_median_s']:,.3f}",
            f"{result['gb_s']:,.1f}",
            f"{result['floor']:.0%}",
        )
    console.print(table)
    sums = {"": "median_s", " (processor time)": "cpu_median_s"}
    if any("graph_s" in result for result in results):
        sums[" (CUDA graph)"] = "graph_s"
    for about, figure in sums.items():
        together = totals(results, figure)
        first = next(iter(together.values()))
        for subject, seconds in together.items():
            line = f"all layers, {subject}: {1e3 * seconds:,.1f} ms{about}, {seconds / first:.2f} of the first"
            say(console, line)
    say(console, "floor: share of the time that the kernels' bytes would take at the bandwidth of a copy, as measured")


def _print_counted(counted: dict[str, dict[str, int]], backbone: str, console: Console) -> None:
    say(console, f"counted, not measured, for norm, add and ReLU of a step of {backbone}:")
    for form, work in counted.items():
        shares = [f"{work['bytes'] / other['bytes']:.2f} of {name}" for name, other in counted.items() if name != form]
        line = f"  {form}: {work['bytes'] / 1e9:,.1f} GB ({', '.join(shares)}), {work['launches']:,} launches"
        say(console, line)
