"""The commands: they parse, call and print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from synco_fast.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``synco-fast`` and return its exit code: 0 done, 2 for input that a person can mend, 130 after Ctrl-C."""
    # Where decoding processes share the cores with the encoder, spinning threads take the time of those that work;
    # OpenMP reads this once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from synco_fast.errors import DataError, UserError

    words = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = _parser().parse_known_args(words)
    if rest and not options.overrides:
        options.parser.error(f"unknown argument {rest[0]}")
    console = Console()
    try:
        code: int = options.run(options, rest, console)
    except (UserError, DataError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synco-fast", description="Contrastive pretraining of image encoders with synthetic hard negatives."
    )
    parser.add_argument("--version", action="version", version=f"synco-fast {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="VERB")

    def verb(
        into: Any, name: str, run: Any, about: str, example: str, overrides: bool = False
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = into.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, overrides=overrides, parser=command)
        return command

    pretrain = verb(
        verbs,
        "pretrain",
        _pretrain,
        "Pretrain an encoder. Any key of the configuration can be set as --section.key VALUE.",
        "synco-fast pretrain --config demo --data demo --method.name mochi --training.epochs 10",
        overrides=True,
    )
    pretrain.add_argument("--config", metavar="PRESET", help="a preset (see 'synco-fast presets') or a YAML file")
    pretrain.add_argument("--data", metavar="SOURCE", help="a folder, idx:FOLDER or demo; short for --data.source")
    pretrain.add_argument("--seed", type=int, help="decides weights, order, views and draws")
    pretrain.add_argument("--out", type=Path, metavar="DIR", help="the run folder; runs/PRESET-DATE-TIME by default")
    pretrain.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    pretrain.add_argument("--json", type=Path, metavar="FILE", help="write the summary here as well")

    presets = verb(verbs, "presets", _presets, "List the presets, or show one whole.", "synco-fast presets demo")
    presets.add_argument("name", nargs="?", help="show this preset's resolved configuration as YAML")

    evaluate = verbs.add_parser("evaluate", help="Judge a checkpoint.").add_subparsers(required=True, metavar="WHAT")
    knn = verb(
        evaluate,
        "knn",
        _evaluate_knn,
        "Weighted kNN accuracy of a checkpoint's backbone on the held-out split.",
        "synco-fast evaluate knn runs/demo-20260101-120000 --neighbours 20",
    )
    knn.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    knn.add_argument("--data", metavar="SOURCE", help="the run's own source by default")
    knn.add_argument("--neighbours", type=int, help="k")
    knn.add_argument("--temperature", type=float, help="of the neighbours' weights")
    knn.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")

    data = verbs.add_parser("data", help="Work with image sources.").add_subparsers(required=True, metavar="WHAT")
    demo = verb(
        data, "demo", _data_demo, "Draw the embedded image set into a folder.", "synco-fast data demo datasets/demo"
    )
    demo.add_argument("folder", type=Path)
    demo.add_argument("--train", type=int, default=200, help="training images a class")
    demo.add_argument("--validation", type=int, default=50, help="held-out images a class")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """``--section.key value`` and ``--section.key=value`` as a mapping; values are read as YAML."""
    from synco_fast.errors import ConfigError

    found: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"found {word!r}, allowed --section.key VALUE")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{name}: found no value")
            value = words.pop(0)
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name}: found {value!r}, which cannot be read as YAML") from error
    return found


def _pretrain(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.config import build_config
    from synco_fast.errors import ConfigError
    from synco_fast.presets import load_config
    from synco_fast.training.loop import Trainer
    from synco_fast.training.run import choose_run_folder, read_run_config, write_json

    overrides = _overrides(rest)
    if options.data is not None:
        overrides["data.source"] = options.data
    if options.seed is not None:
        overrides["seed"] = options.seed
    if options.resume is not None:
        folder = options.resume
        if options.config is not None or options.out is not None:
            raise ConfigError("resume: found --config or --out beside it, allowed --section.key VALUE alone")
        config = build_config(read_run_config(folder), overrides)
        trainer = Trainer(config, folder, resume=folder, console=console)
    else:
        if options.config is None:
            raise ConfigError("config: found none, allowed --config PRESET, or --resume RUN; see 'synco-fast presets'")
        config = load_config(options.config, overrides)
        trainer = Trainer(config, choose_run_folder(options.out, config), console=console)
    summary = trainer.run()
    if options.json is not None:
        write_json(options.json, summary.as_dict())
    _print_summary(summary, console)
    return 0


def _print_summary(summary: Any, console: Console) -> None:
    def percent(share: float | None) -> str:
        return "not evaluated" if share is None else f"{share:.1%}"

    done = "" if summary.finished else f", stopped on request: go on with --resume {summary.run}"
    table = _two_columns(f"{summary.method} on {summary.source}: {summary.epochs:g} epochs{done}")
    rows = [
        ("kNN before", percent(summary.knn_before)),
        ("kNN after", percent(summary.knn_after)),
        ("chance", percent(summary.chance)),
        (
            "images per second",
            f"{summary.images_per_second:,.0f} ({summary.data_wait:.0%} of the time waiting for data)",
        ),
        ("training time", f"{summary.training_seconds:,.0f} s, {summary.steps:,} steps"),
        ("broken images", f"{summary.broken_images}"),
        ("run folder", summary.run),
        ("checkpoint", summary.checkpoint),
        ("curves", summary.curves),
        ("augmented pairs", summary.pairs),
    ]
    for name, value in rows:
        if name != "broken images" or summary.broken_images:
            table.add_row(name, value, style="bold" if name == "kNN after" else None)
    console.print(table)


def _two_columns(title: str) -> Table:
    """A table of names and values, in which a long path is broken, never cut."""
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _presets(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.presets import PRESETS, load_config

    if options.name is not None:
        sys.stdout.write(load_config(options.name).to_yaml())
        return 0
    table = Table()
    table.add_column("preset", no_wrap=True)
    table.add_column("what for", overflow="fold")
    for name, values in PRESETS.items():
        table.add_row(name, values["about"])
    console.print(table)
    return 0


def _evaluate_knn(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.checkpoint import evaluate_knn
    from synco_fast.training.run import write_json

    result = evaluate_knn(
        options.checkpoint, source=options.data, neighbours=options.neighbours, temperature=options.temperature
    )
    if options.json is not None:
        write_json(options.json, result)
    table = _two_columns(f"kNN of {result['checkpoint']}")
    for name, value in (
        ("accuracy", f"{result['knn']:.1%}"),
        ("chance", f"{result['chance']:.1%}"),
        ("k", str(result["neighbours"])),
        ("images to choose from", f"{result['bank']:,}"),
        ("held-out images", f"{result['queries']:,}"),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0


def _data_demo(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.data.demo import CLASSES, make_demo
    from synco_fast.errors import UserError

    try:
        folder = make_demo(options.folder, train=options.train, validation=options.validation, seed=options.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    console.print(
        f"{len(CLASSES)} classes, {options.train} training and {options.validation} held-out images each: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
