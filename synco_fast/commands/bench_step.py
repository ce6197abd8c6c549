"""``synco-fast bench step``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.bench.subjects import ENGINES, STEPS, STEPS_BY_DEFAULT, VALIDATED
from synco_fast.commands.options import add_options, load_torch, write_results
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench step``."""
    command = commands.add(
        "bench step",
        _bench_step,
        "Images per second of the training step without data, compared with the encoder alone and a plain loop. "
        "Any key of the configuration can be set as --section.key VALUE.",
        "synco-fast bench step --config synco-r50-200 --engines eager graph --training.precision bf16 --json step.json",
        overrides=True,
    )
    command.add_argument(
        "--config",
        metavar="PRESET",
        default="synco-r50-200",
        help="a preset or a YAML file, for encoder, batch and image size",
    )
    command.add_argument(
        "--subjects", nargs="+", metavar="NAME", help=f"{', '.join(STEPS)}; {' '.join(STEPS_BY_DEFAULT)} by default"
    )
    command.add_argument("--engines", nargs="+", metavar="NAME", help=f"{', '.join(ENGINES)}; eager by default")
    command.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"backends of the loss: {', '.join(VALIDATED)}; the configuration's by default",
    )
    command.add_argument("--steps", type=positive, default=20, help="timed steps of each subject")
    command.add_argument("--rounds", type=positive, default=1, help="rounds over all subjects")
    command.add_argument("--threads", type=positive, help="threads of each process; PyTorch's own number by default")
    add_options(command, "json")


def _bench_step(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.presets import load_config
    from synco_fast.runtime.errors import ConfigError

    subjects, engines = tuple(options.subjects or STEPS_BY_DEFAULT), tuple(options.engines or ("eager",))
    for name, found, expected in (("subjects", subjects, STEPS), ("engines", engines, ENGINES)):
        for word in found:
            if word not in expected:
                raise ConfigError(f"{name}: found {word!r}, expected {', '.join(expected)}")
    config = load_config(options.config, overrides_of(options.rest))
    load_torch(console)
    from synco_fast.bench.step import bench_step

    report = bench_step(
        config,
        subjects=subjects,
        engines=engines,
        backends=tuple(options.backends or ()),
        steps=options.steps,
        rounds=options.rounds,
        threads=options.threads,
        say=lambda line: say(console, line, "dim"),
        keep=lambda report: write_results(options, report),
    )
    rated = any(row["utilisation"] is not None for row in report["results"])
    title = f"{config.model.backbone}, {config.augment.size} pixels, batch {config.training.batch}"
    numbers = ("images/s", "/encoder", "/limit", "/moco", "/plain", "MiB", *(("MFU",) if rated else ()))
    table = figures_table(title, ["step", "engine", "backend"], numbers, gap=0)
    for row in report["results"]:
        shares = [row[f"of_{name}"] for name in ("encoder", "encoder_plain", "moco", "plain")]
        table.add_row(
            row["subject"],
            row["engine"],
            row["backend"] or "",
            f"{row['median']:,.1f}",
            *("" if share is None else f"{share:.3f}" for share in shares),
            f"{row['peak_mib']:,.0f}",
            *((f"{row['utilisation']:.1%}",) if rated else ()),
        )
    console.print(table)
    say(console, "/encoder, /limit, /moco, /plain: ratio to the best engine of that subject;")
    say(console, "limit: encoder-plain, without grouped batch norm")
    for row in report["results"]:
        for note in row["notes"]:
            say(console, f"{row['subject']}, {row['engine']}: {note}", "yellow")
    environment = report["environment"]
    say(console, f"{environment['device']}, {environment['cores']} cores, torch {environment['torch']}")
    for line in report["failed"]:
        say(console, f"failed: {line}", "red")
    return 1 if report["failed"] else 0
