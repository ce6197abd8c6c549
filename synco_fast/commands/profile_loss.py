"""``synco-fast profile loss``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from synco_fast.bench.subjects import BACKENDS, DTYPES
from synco_fast.commands.options import add_options, path, write_results
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast profile loss``."""
    command = commands.add(
        "profile loss",
        _profile_loss,
        "Write a Chrome trace of SynCo's loss, and a table of the throughput of each kernel.",
        "synco-fast profile loss --rows 256 --length 65536 --trace loss-trace.json",
    )
    command.add_argument("--backend", choices=tuple(BACKENDS), help="triton where it runs, else blockwise, by default")
    for name, default, about in (("rows", 256, "B"), ("length", 65536, "K"), ("dim", 128, "D"), ("hard", 1024, "N")):
        command.add_argument(f"--{name}", type=positive, default=default, help=about)
    command.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32, by default")
    add_options(command, "device")
    command.add_argument("--trace", type=path, metavar="FILE", default=Path("loss-trace.json"), help="JSON or JSON.gz")
    add_options(command, json="write the table here as well")


def _profile_loss(options: argparse.Namespace, console: Console) -> int:
    import os
    from dataclasses import asdict

    # The profiler's log lines would mix with the table; this is read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from synco_fast.bench.loss import Shape, prepare
    from synco_fast.bench.profile_loss import profile_loss
    from synco_fast.kernels.ops import unserved_by_triton
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device

    device = resolve_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    shape = Shape(options.rows, options.length, options.dim, options.hard, dtype)
    sample = torch.empty(0, shape.dim, dtype=shape.torch_dtype, device=device)
    reason = unserved_by_triton(sample, sample, 0.2)
    backend = options.backend or ("blockwise" if reason else "triton")
    if backend == "triton" and reason:
        raise UserError(f"backend: found triton, expected the others on this machine: {reason}")
    if not options.trace.absolute().parent.is_dir():
        raise UserError(f"trace: found no folder {options.trace.absolute().parent}, expected an existing one")
    lines = profile_loss(prepare(backend, shape, device), shape, device, options.trace)
    total = sum(line.seconds for line in lines)
    about = {"environment": describe_environment(device), "backend": backend, "shape": asdict(shape)}
    write_results(options, about | {"lines": [asdict(line) for line in lines]})
    title = f"{backend}, {dtype}, B = {shape.rows:,}, K = {shape.length:,}: {1e3 * total:,.2f} ms"
    kind = "kernel" if device.type == "cuda" else "operator"
    table = figures_table(title, [kind], ["calls", "us", "share", "GFLOP/s", "GB/s"])
    table.columns[0].max_width = 34
    for line in lines[:20]:
        rates = [f"{count / line.seconds / 1e9:,.0f}" if count else "-" for count in (line.flops, line.bytes)]
        table.add_row(
            line.name, f"{line.calls:,.0f}", f"{1e6 * line.seconds:,.1f}", f"{line.seconds / total:.0%}", *rates
        )
    console.print(table)
    say(console, f"trace: {options.trace}, for chrome://tracing or ui.perfetto.dev")
    return 0
