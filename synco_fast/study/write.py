"""A study's record: ``study.json``, tables in ``README.md``, and learning curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synco_fast.report.runs import mean_and_deviation
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import write_json, write_text
from synco_fast.runtime.style import COLOURS, plain
from synco_fast.study.plan import Trial
from synco_fast.study.results import Difference, Row, Study

__all__ = ["check_record", "draw_learning_curves", "page", "write_record"]

_SPREAD = ["difference", "figure", "mean", "deviation", "standard error", "95 % interval", "seeds", "each seed"]
#: Characters of a line of a panel's title.
_TITLE = 54
_INTERVAL = (
    "The 95 % interval is that of the mean, by Student's t of seeds - 1 degrees of freedom, and of each row alone: of "
    "twenty differences that are none, one is expected to exclude 0."
)


def check_record(folder: Path) -> None:
    """Refuse a folder whose ``README.md`` is not that of a study, which the record would replace.

    Raises:
        ConfigError: It has one without a ``study.json`` beside it.
    """
    if (folder / "README.md").exists() and not (folder / "study.json").exists():
        raise ConfigError(f"record: found a README.md in {folder} but no study.json, expected another folder")


def write_record(folder: Path, trials: Sequence[Trial], study: Study, command: str) -> None:
    """Write ``study.json``, ``README.md`` and ``curves.png`` into a folder.

    Args:
        folder: The folder.
        trials: All trials.
        study: Their results.
        command: The command line that reproduces the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environments = [run.environment for run in study.runs.values() if run.environment]
    # Runs that were added later may be of other commits; the rest is that of the first run.
    commits = list(dict.fromkeys(str(found["commit"]) for found in environments if "commit" in found))
    environment = {**(environments[0] if environments else describe_environment())}
    if commits:
        environment["commit"] = ", ".join(commits)
    configs = {name: run.config.model_dump(mode="json") for name, run in study.runs.items()}
    write_json(
        folder / "study.json",
        {"command": command, **study.as_dict(), "environment": environment, "configurations": configs},
    )
    draw_learning_curves(study, trials, folder / "curves.png")
    machine = f"Measured on {environment.get('device')}, {environment.get('cores')} cores; " + ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "timm", "python", "commit") if name in environment
    )
    write_text(folder / "README.md", page(study, command) + f"\n![learning curves](curves.png)\n\n{machine}.\n")


def page(study: Study, command: str) -> str:
    """The tables of a study as Markdown."""
    figures = study.figures
    varied = any(row.setting for row in study.rows)
    several = len({row.config for row in study.rows}) > 1
    heads = [*(["config"] if several else []), *(["setting"] if varied else [])]

    def lead(row: Row | Difference) -> list[str]:
        return [*([row.config] if several else []), *([row.setting] if varied else [])]

    lines = [
        f"# Study: {', '.join(dict.fromkeys(row.config for row in study.rows))}",
        "",
        f"Made by `{command}`; the figures are in `study.json`. Mean and sample standard deviation over seeds, in "
        "percent and percentage points.",
        "",
        *_table(
            [*heads, "method", "seeds", "untrained kNN", *figures],
            [
                [
                    *lead(row),
                    row.method,
                    ", ".join(map(str, row.seeds)),
                    _mean(list(row.untrained.values())),
                    *(_mean(list(row.values.get(name, {}).values())) for name in figures),
                ]
                for row in study.rows
            ],
        ),
        "",
        "By seed:",
        "",
        *_table(
            [*heads, "method", "figure", "lowest", "highest", "each seed"],
            [
                [
                    *lead(row),
                    row.method,
                    name,
                    f"{min(values.values()):.1%}",
                    f"{max(values.values()):.1%}",
                    ", ".join(f"{seed}: {value:.1%}" for seed, value in values.items()),
                ]
                for row in study.rows
                for name, values in row.values.items()
            ],
        ),
    ]
    if study.differences:
        told = [[*lead(found), f"{found.method} - {found.baseline}", *_spread(found)] for found in study.differences]
        lines += ["", "Differences at the same seed, in percentage points:", "", *_table([*heads, *_SPREAD], told)]
    if study.setting_differences:
        told = [
            [*lead(found)[:-1], found.method, f"{found.setting} - {found.baseline}", *_spread(found)]
            for found in study.setting_differences
        ]
        table = _table([*heads[:-1], "method", *_SPREAD], told)
        lines += ["", "Differences from the first setting at the same seed:", "", *table]
    if any(found.interval for found in (*study.differences, *study.setting_differences)):
        lines += ["", _INTERVAL]
    if study.missing:
        lines += ["", f"Not finished: {', '.join(study.missing)}."]
    if study.notes:
        lines += ["", f"Results of older checkpoints: {'; '.join(study.notes)}."]
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def _spread(found: Difference) -> list[str]:
    return [
        found.figure,
        f"{100 * found.mean:+.1f}",
        f"{100 * found.deviation:.1f}" if len(found.values) > 1 else "",
        "" if found.error is None else f"{100 * found.error:.1f}",
        "" if found.interval is None else " to ".join(f"{100 * end:+.1f}" for end in found.interval),
        str(len(found.values)),
        ", ".join(f"{100 * value:+.1f}" for value in found.values.values()),
    ]


def _mean(values: list[float]) -> str:
    found = mean_and_deviation(values)
    if found is None:
        return ""
    return f"{found[0]:.1%}" + (f" ± {100 * found[1]:.1f}" if len(values) > 1 else "")


def draw_learning_curves(study: Study, trials: Sequence[Trial], path: Path) -> None:
    """Plot kNN accuracy over epochs: one panel per configuration and setting, one colour per method.

    Untrained encoders are the curves' first points, so they have no curve of their own.
    """
    trials = [trial for trial in trials if trial.trained]
    groups = list(dict.fromkeys(trial.group for trial in trials))
    methods = list(dict.fromkeys(trial.method for trial in trials))
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(1.5 + 4.5 * columns, 0.8 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in list(panels.flat)[len(groups) :]:
        axes.axis("off")
    for number, (axes, group) in enumerate(zip(panels.flat, groups, strict=False)):
        # With shared axes only the last row has numbers, also where nothing is below a panel.
        axes.tick_params(labelbottom=number + columns >= len(groups))
        for method, colour in zip(methods, COLOURS * len(methods), strict=False):
            label: str | None = plain(method)
            for trial in trials:
                if (trial.group, trial.method) != (group, method) or trial.name not in study.runs:
                    continue
                points = [(line["epoch"], line["knn"]) for line in study.runs[trial.name].evaluations]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), color=colour, marker="o", markersize=3, alpha=0.8, label=label
                    )
                    label = None
        inside = (study.runs.get(trial.name) for trial in trials if trial.group == group)
        chance = next((run.chance for run in inside if run and run.chance), None)
        if chance is not None:
            low, high = axes.get_ylim()
            # Far below the curves, a line for chance would leave them no room.
            if chance > low - (high - low):
                axes.axhline(chance, color="gray", linestyle=":", label="chance")
            else:
                place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "fontsize": 8, "color": "gray"}
                axes.annotate(f"chance: {chance:.1%}", (0.98, 0.03), **place)
        title = textwrap.fill(", ".join(part for part in group if part), _TITLE)
        axes.set_title(plain(title), fontsize=10)
        if number + columns >= len(groups):
            axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("kNN accuracy")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_lines():
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
