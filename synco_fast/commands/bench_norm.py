"""``synco-fast bench norm``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from synco_fast.bench.subjects import DTYPES, NORMS
from synco_fast.commands.options import add_options
from synco_fast.commands.parser import Commands, positive

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench norm``."""
    command = commands.add(
        "bench norm",
        _bench_norm,
        "Time of batch norm, add and ReLU, forward and backward, by form and layer shape of a ResNet, and the bytes "
        "and launches of a step by count.",
        "synco-fast bench norm --backbone resnet50 --batch 256 --json norm.json",
    )
    command.add_argument("--backbone", default="resnet50", help="a torchvision or timm ResNet")
    command.add_argument("--size", type=positive, default=224, help="image size in pixels")
    command.add_argument("--batch", type=positive, help="256 on a GPU and 16 on a CPU by default")
    command.add_argument("--groups", type=positive, default=8, help="groups of batch norm")
    command.add_argument("--subjects", nargs="+", choices=tuple(NORMS), help="all that run on this machine by default")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x, bfloat16 by default")
    add_options(command, "device")
    command.add_argument("--repeats", type=positive, help="timed runs per round; 3 on a CPU and 20 on a GPU by default")
    command.add_argument("--rounds", type=positive, default=5, help="rounds over all subjects")
    command.add_argument("--threads", type=positive, help="threads of PyTorch on a CPU")
    command.add_argument("--dry", action="store_true", help="one small layer, once: a test that it runs")
    add_options(command, "json")


def _bench_norm(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    import torch

    from synco_fast.bench.norm import measure_norm, totals, unavailable
    from synco_fast.bench.norm_model import FORMS, layers_of, step_work
    from synco_fast.bench.roofline import measure_ceilings
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.files import write_json
    from synco_fast.runtime.precision import resolve_device
    from synco_fast.runtime.progress import ProgressBar

    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    on_gpu = device.type == "cuda"
    batch = options.batch or (256 if on_gpu and not options.dry else 16)
    if batch % options.groups:
        raise UserError(f"batch: found {batch}, expected a multiple of {options.groups} (groups)")
    if options.threads:
        torch.set_num_threads(options.threads)
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
            bar.advance()
    shape: dict[str, Any] = {"backbone": options.backbone, "batch": batch, "size": options.size}
    shape["groups"] = options.groups
    counted = {form: step_work(form, **shape)._asdict() for form in FORMS}
    environment = describe_environment()
    if options.threads:
        environment["threads"] = options.threads
    if options.json is not None:
        about = {"environment": environment, "device": device.type, "dtype": options.dtype, **shape}
        figures = {"ceilings": ceilings._asdict(), "results": results, "totals_s": totals(results), "counted": counted}
        write_json(options.json, about | figures)
    title = f"{environment['device']}, {options.dtype}, batch {batch}, {options.groups} groups"
    _print(results, totals(results), title, console)
    _print_counted(counted, options.backbone, console)
    return 0


def _print(results: list[dict[str, Any]], together: dict[str, float], title: str, console: Console) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "form"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "GB/s", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        follows = "+add" * result["residual"] + "+relu" * result["relu"]
        layer = f"{result['times']}x {result['channels']}, {result['height']}x{result['width']} {follows}"
        figures = f"{1e3 * result['median_s']:,.3f}", f"{result['gb_s']:,.1f}", f"{result['floor']:.0%}"
        table.add_row(layer, result["subject"], *figures)
    console.print(table)
    first = next(iter(together.values()))
    for subject, seconds in together.items():
        console.print(f"all layers, {subject}: {1e3 * seconds:,.1f} ms, {first / seconds:.2f}x", highlight=False)
    console.print("floor: share of the time that the kernels' bytes would take at the bandwidth of a copy, as measured")


def _print_counted(counted: dict[str, dict[str, int]], backbone: str, console: Console) -> None:
    console.print(f"counted, not measured, for norm, add and ReLU of a step of {backbone}:", highlight=False)
    for form, work in counted.items():
        shares = [f"{work['bytes'] / other['bytes']:.2f} of {name}" for name, other in counted.items() if name != form]
        line = f"  {form}: {work['bytes'] / 1e9:,.1f} GB ({', '.join(shares)}), {work['launches']:,} launches"
        console.print(line, highlight=False)
