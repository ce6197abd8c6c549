"""``synco-fast bench data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.bench.subjects import PIPELINES, PIPELINES_OF
from synco_fast.commands.options import add_options, path, write_results
from synco_fast.commands.parser import Commands, positive, whole
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    from synco_fast.runtime.progress import ProgressBar

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench data``."""
    command = commands.add(
        "bench data",
        _bench_data,
        "Images and views per second by pipeline, on generated JPEG files of ImageNet's size, compared with "
        "the plain two-crop loader of the released code (pil).",
        "synco-fast bench data --workers 16 --batch 256 --json data.json",
    )
    command.add_argument("--pipelines", nargs="+", choices=PIPELINES, help="all that run on this machine by default")
    command.add_argument(
        "--source",
        dest="kind",
        choices=tuple(PIPELINES_OF),
        default="photos",
        help="packed: the same photos after data pack as well; stream: from tar shards as well",
    )
    add_options(command, "device")
    command.add_argument(
        "--workers",
        type=whole,
        help="processes for each pipeline, one per core by default; 0: all in one thread, to compare CPU time",
    )
    command.add_argument("--batch", type=positive, default=64, help="images per batch, 64 by default")
    command.add_argument("--photos", type=positive, default=256, help="number of files")
    command.add_argument("--folder", type=path, metavar="DIR", help="where to keep them; the user's cache by default")
    command.add_argument("--seconds", type=positive, default=6, help="length of one round of one pipeline")
    command.add_argument("--rounds", type=positive, default=3, help="rounds; the median counts")
    command.add_argument(
        "--parts", action="store_true", help="CPU time of each part of pil, torchvision and dali instead"
    )
    add_options(command, "json")


def _bench_data(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.bench.data import has_pipeline, make_photos, measure_pipelines
    from synco_fast.bench.data_parts import MEASURED
    from synco_fast.data.augment.recipe import Recipe
    from synco_fast.data.sources.manifest import cache_folder
    from synco_fast.data.workers import available_cores
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device
    from synco_fast.runtime.progress import ProgressBar

    device = resolve_device(options.device)
    here = [name for name in PIPELINES if has_pipeline(name, device)]
    pipelines = options.pipelines or [name for name in PIPELINES_OF[options.kind] if name in here]
    missing = [name for name in pipelines if name not in here]
    if missing:
        why = "the kernels run on CUDA devices" if missing[0].endswith("-fused") else "DALI is not installed"
        raise UserError(f"pipelines: found {missing[0]}, expected {', '.join(here)} here, where {why}")
    folder = options.folder or cache_folder() / "bench-photos"
    workers = available_cores() if options.workers is None else options.workers
    with ProgressBar(console, "drawing photos", None) as bar:
        names = make_photos(folder, options.photos)
        if options.parts:
            _bench_parts(options, folder, names, [name for name in MEASURED if name in pipelines], bar, console)
            return 0
        bar.restart("measuring", len(pipelines) * options.rounds)
        # Without workers there is one thread, as `measure_pipelines` says.
        environment = {**describe_environment(device), **({} if workers else {"threads": 1})}
        sizes = [(folder / name).stat().st_size for name in names]
        about = {"device": device.type, "workers": workers, "batch": options.batch, "photos": len(names)}
        about["kilobytes"] = round(sum(sizes) / len(sizes) / 1e3)
        results = measure_pipelines(
            folder,
            names,
            pipelines=pipelines,
            device=device,
            batch=options.batch,
            workers=workers,
            seconds=options.seconds,
            rounds=options.rounds,
            recipe=Recipe(),
            tick=bar.advance,
            keep=lambda results: write_results(options, {"environment": environment, **about, "results": results}),
        )
    _print(results, f"{environment['device']}, {environment['cores']} cores, {workers} workers", console)
    return 0


def _bench_parts(
    options: argparse.Namespace,
    folder: Path,
    names: list[str],
    pipelines: list[str],
    bar: ProgressBar,
    console: Console,
) -> None:
    import torch

    from synco_fast.bench.data_parts import measure_parts
    from synco_fast.data.augment.recipe import Recipe
    from synco_fast.runtime.environment import describe_environment

    bar.restart("measuring", len(pipelines) * options.rounds)
    spent = measure_parts(folder, names, pipelines=pipelines, recipe=Recipe(), rounds=options.rounds, tick=bar.advance)
    environment = {**describe_environment(torch.device("cpu")), "threads": 1}
    write_results(options, {"environment": environment, "photos": len(names), "parts": spent})
    bar.close()
    _print_parts(spent, console)


def _print(results: list[dict[str, Any]], title: str, console: Console) -> None:
    first = results[0]
    numbers = ("images/s", "views/s", "CPU", f"against {first['pipeline']}", "CPU ms", "against")
    table = figures_table(title, ["pipeline"], numbers)
    for result in results:
        share, spent = result["core_share"], result["processor_milliseconds"]
        same = not result["pipeline"].startswith("resident") or first["pipeline"].startswith("resident")
        speed = result["images_per_second"] / first["images_per_second"]
        row = [f"{result[name]:,.0f}" for name in ("images_per_second", "views_per_second")]
        row += ["-" if share is None else f"{share:.0%}", f"{speed:.2f}x" if same else "-"]
        row += ["-", "-"] if spent is None else [f"{spent:.1f}", "-"]
        if same and spent is not None:
            row[-1] = f"{first['processor_milliseconds'] / spent:.2f}x"
        table.add_row(result["pipeline"], *row)
    console.print(table)
    say(console, "CPU: share of all cores. CPU ms: CPU time per image, and against the first row.")
    say(console, "resident-32 has arrays of 32 x 32 pixels, the others files of 500 x 375")


def _print_parts(spent: dict[str, dict[str, float]], console: Console) -> None:
    from synco_fast.bench.data_parts import PARTS
    from synco_fast.data.augment.draw import JITTER

    table = figures_table("CPU time, ms per image", ["part"], list(spent))
    for part in PARTS:
        row = [f"{parts[part]:.2f}" if part in parts else "-" for parts in spent.values()]
        table.add_row(f"  {part}" if part in JITTER else part, *row)
    table.add_section()
    totals = [sum(value for part, value in parts.items() if part not in JITTER) for parts in spent.values()]
    table.add_row("all", *(f"{total:.2f}" for total in totals))
    console.print(table)
