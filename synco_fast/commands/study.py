"""``synco-fast study``."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.options import path
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands, positive
from synco_fast.runtime.console import say
from synco_fast.runtime.dist_env import DistEnv

if TYPE_CHECKING:
    from synco_fast.study.evaluations import Evaluation
    from synco_fast.study.execute import StudyError
    from synco_fast.study.plan import Trial

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast study``."""
    command = commands.add(
        "study",
        _study,
        "Run every combination of method, seed and setting; write a table, paired differences and a plot. "
        "The same command resumes where it stopped. Any key can be set for all runs as --section.key VALUE.",
        "synco-fast study demo --methods moco synco --seeds 0 1 2 --vary training.precision=fp32,bf16 --out runs/study",
        overrides=True,
        alone=True,
    )
    command.add_argument("configs", nargs="+", metavar="CONFIG", help="presets or YAML files")
    command.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="values of method.name; the configuration's own by default",
    )
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds, 0 1 2 by default")
    command.add_argument(
        "--vary", action="append", default=[], metavar="KEY=A,B", help="a setting and its values; may be repeated"
    )
    command.add_argument("--data", metavar="SOURCE", help="short for --data.source")
    command.add_argument("--out", type=path, required=True, metavar="DIR", help="the study's folder")
    command.add_argument("--record", type=path, metavar="DIR", help="folder of table and plot; --out by default")
    command.add_argument(
        "--baseline", metavar="NAME", help="the method that differences are taken from; the first by default"
    )
    command.add_argument(
        "--evaluate",
        action="append",
        default=[],
        metavar="WORDS",
        help="an evaluation such as 'knn' or 'linear --fast'; may be repeated",
    )
    command.add_argument(
        "--untrained", action="store_true", help="add a row of untrained encoders, with the same evaluations"
    )
    command.add_argument(
        "--supervised",
        metavar="WORDS",
        help="also add a row of encoders trained on labels alone, by an evaluation such as 'finetune --percent 100'",
    )
    command.add_argument("--parallel", type=positive, default=1, metavar="N", help="runs at a time")
    command.add_argument(
        "--threads", type=positive, metavar="N", help="threads of each run; cores / --parallel by default"
    )
    command.add_argument("--table", action="store_true", help="run nothing; write the record of the finished runs")


def _study(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.commands.evaluations import parse_evaluations, parse_supervised
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.study.plan import plan
    from synco_fast.study.results import collect
    from synco_fast.study.write import check_record, page, write_record

    processes = DistEnv.detect().world
    if processes > 1:  # the runs would take the job's variables for theirs
        raise ConfigError(f"processes: found {processes}, expected 1 for a study: it starts one for each of its runs")
    overrides = overrides_of(options.rest)
    if options.data is not None:
        overrides["data.source"] = options.data
    evaluations = parse_evaluations(options.evaluate)
    supervised = parse_supervised(options.supervised, evaluations)
    trials = plan(
        options.configs,
        methods=options.methods,
        seeds=options.seeds,
        vary=dict(_varied(word) for word in options.vary),
        overrides=overrides,
        untrained=options.untrained or supervised is not None,
    )
    methods = list(dict.fromkeys(trial.method for trial in trials if trial.trained))
    if options.baseline is not None and options.baseline not in methods:
        raise ConfigError(f"baseline: found {options.baseline}, expected one of {', '.join(methods)}")
    record = options.record or options.out
    check_record(record)
    failure = None if options.table else _run_trials(options, trials, evaluations, supervised, console)
    study = collect(options.out, trials, baseline=options.baseline, evaluations=evaluations, supervised=supervised)
    if options.table and not study.runs:
        raise ConfigError(f"table: found no finished run of this study in {options.out}, expected --out of its runs")
    command = _command(options)
    write_record(record, trials, study, command)
    say(console, page(study, command))
    say(console, f"record: {record}")
    if failure is not None:
        raise failure
    return 0


def _run_trials(
    options: argparse.Namespace,
    trials: Sequence[Trial],
    evaluations: Sequence[Evaluation],
    supervised: Evaluation | None,
    console: Console,
) -> StudyError | None:
    """Run what is missing; the error that says what failed, if anything did, for after the record is written."""
    from synco_fast.methods.schedule import note_without_synthetic
    from synco_fast.study.execute import StudyError, execute

    # The runs say it in their logs alone.
    for line in dict.fromkeys(note_without_synthetic(trial.resolved()) for trial in trials if trial.trained):
        if line is not None:
            say(console, line, "yellow")
    # A scheduler stops a job by SIGTERM: as with Ctrl-C, the runs first write checkpoints.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        execute(
            options.out,
            trials,
            evaluations=evaluations,
            supervised=supervised,
            parallel=options.parallel,
            threads=options.threads,
            note=lambda line: say(console, line),
        )
    except StudyError as error:
        return error
    finally:
        signal.signal(signal.SIGTERM, before)
    return None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _varied(word: str) -> tuple[str, list[Any]]:
    """``KEY=A,B`` as key and values; each value is read as YAML."""
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.strict_yaml import parse_yaml

    key, equals, values = word.partition("=")
    if not equals or not key or not values:
        raise ConfigError(f"vary: found {word!r}, expected KEY=A,B")
    return key, [parse_yaml(value, f"vary {key}") for value in values.split(",")]


def _command(options: argparse.Namespace) -> str:
    words = ["synco-fast", "study", *options.configs]
    if options.methods:
        words += ["--methods", *options.methods]
    words += ["--seeds", *map(str, options.seeds)]
    for name in ("vary", "evaluate"):
        for word in getattr(options, name):
            words += [f"--{name}", word]
    if options.untrained:
        words.append("--untrained")
    if options.supervised is not None:
        words += ["--supervised", options.supervised]
    if options.data is not None:
        words += ["--data", options.data]
    if options.baseline is not None:
        words += ["--baseline", options.baseline]
    return shlex.join([*words, *options.rest, "--out", str(options.out)])
