"""Comparing runs: a table and a plot, with mean and standard deviation over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from synco_fast.config import Config
from synco_fast.explain import known_keys
from synco_fast.report.runs import Run, accuracy_columns, mean_and_deviation, read_run
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.style import COLOURS, colour_of, columns_of, plain, shortened

__all__ = ["SPEED", "Group", "compare_runs", "draw_comparison", "shown_figures"]


SPEED = "images per second"

#: Keys that may differ within a group: the seed, and what does not change a figure.
_FREE = frozenset(
    {"seed", "preset", "about", "data.workers", "evaluation.every", "evaluation.batch"}
    | {
        f"training.{key}"
        for key in ("log_every", "checkpoint_every", "keep", "keep_best", "timeout", "wandb", "mlflow")
    }
)


#: Settings that a title names; runs that differ in more are told apart by preset and folder.
_NAMED = 4
#: Characters of a group's title in the picture, and of a line of its legend.
_TITLE, _LINE = 120, 150
#: The hatches of bars and dashes of curves, each for as many groups as there are colours.
_HATCHES, _DASHES = ("", "////", "...."), ("-", "--", "-.")


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed.

    Attributes:
        title: The method, and the settings in which groups differ, or preset and folder if those are many.
        runs: Runs in the order given.
    """

    title: str
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """The values of one of `shown_figures`, for the runs that have it."""
        found = (run.throughput if figure == SPEED else run.accuracies.get(figure) for run in self.runs)
        return [value for value in found if value is not None]

    @property
    def budget(self) -> str:
        """Completed epochs, and images per step."""
        epochs = {run.summary.get("epochs", 0) for run in self.runs}
        return f"{'/'.join(f'{value:.3g}' for value in sorted(epochs))} x {self.runs[0].config.training.batch}"


def shown_figures(groups: Sequence[Group]) -> list[str]:
    """The titles of the columns that any group has values in; a column mixes neither protocols nor images."""
    titles = accuracy_columns([run for group in groups for run in group.runs])
    return [*titles, *([SPEED] if any(group.values(SPEED) for group in groups) else [])]


def compare_runs(folders: Sequence[Path]) -> list[Group]:
    """Read runs, and group those that differ only by seed.

    Raises:
        ConfigError: A folder is not a run, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder in folders if resolved.count(folder.resolve()) > 1)
        raise ConfigError(f"run: found {twice} twice, expected each run once")
    runs = [read_run(folder) for folder in folders]
    described = [_settings(run) for run in runs]
    differing = [key for key in described[0] if any(other[key] != described[0][key] for other in described)]
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run, settings in zip(runs, described, strict=True):
        grouped.setdefault(tuple(repr(settings[key]) for key in differing), []).append(run)
    groups = []
    for inside in grouped.values():
        settings = _settings(inside[0])
        others = [f"{key.rpartition('.')[2]} {settings[key]}" for key in differing if key != "method.name"]
        if len(others) > _NAMED:
            others = [f"preset {inside[0].config.preset}", f"run {inside[0].folder.name}"]
        groups.append(Group(", ".join([inside[0].config.method.name, *others]), tuple(inside)))
    return groups


def _settings(run: Run) -> dict[str, Any]:
    """Every key of the configuration by its dotted name, except those that may differ within a group."""
    dumped = run.config.model_dump(mode="json")
    found = {}
    for key in known_keys(Config):
        if key not in _FREE:
            value: Any = dumped
            for part in key.split("."):
                value = value[part]
            found[key] = value
    return found


def draw_comparison(groups: Sequence[Group], path: Path) -> None:
    """Plot kNN accuracy over epochs, every evaluation with its deviation, and throughput in one picture.

    Args:
        groups: From `compare_runs`.
        path: The picture; its suffix sets the format.
    """
    colours = [colour_of(place) for place in range(len(groups))]
    titles, chances = [shortened(group.title, _TITLE) for group in groups], _chances(groups, colours)
    labels = [*titles, *(["chance"] if chances else [])]
    columns = columns_of(labels, _LINE)
    figure = Figure(figsize=(12, 4.2 + 0.2 * -(-len(labels) // columns)), layout="constrained")
    curves, bars, speed = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.8))
    for place, group in enumerate(groups):
        dashes = _DASHES[place // len(COLOURS) % len(_DASHES)]
        for run in group.runs:
            points = [(line["epoch"], line["knn"]) for line in run.evaluations]
            if points:
                look = {"color": colours[place], "linestyle": dashes, "marker": "o", "markersize": 3, "alpha": 0.8}
                curves.plot(*zip(*points, strict=True), **look)
    curves.set_xlabel("epoch")
    curves.set_title("kNN during pretraining")
    if not curves.get_lines():
        curves.text(0.5, 0.5, "not evaluated", ha="center", color="gray", transform=curves.transAxes)
    # On other images, chance is another one.
    results = [result for group in groups for run in group.runs for result in run.results]
    others = {title for result in results if result.source for title in result.columns}
    _bars(bars, groups, colours, [name for name in shown_figures(groups) if name != SPEED and name not in others])
    bars.set_title("evaluations, deviation over seeds")
    for axes in (curves, bars):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        for chance, colour in chances:
            axes.axhline(chance, color=colour, linestyle=":")
    bars.set_ylim(0, 1)
    _bars(speed, groups, colours, [SPEED])
    speed.set_title("throughput")
    for axes in (curves, bars, speed):
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    keys: list[Artist] = [
        Patch(facecolor=colours[place], hatch=_hatch(place), edgecolor="white", label=plain(title))
        for place, title in enumerate(titles)
    ]
    keys += [Line2D([], [], color="gray", linestyle=":", label="chance")] if chances else []
    figure.legend(handles=keys, loc="outside lower center", ncol=columns, fontsize=9, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")


def _chances(groups: Sequence[Group], colours: list[str]) -> list[tuple[float, str]]:
    """Levels of chance and their colours: that of one group among several in its colour, others in gray."""
    found: dict[float, set[int]] = {}
    for place, group in enumerate(groups):
        for run in group.runs:
            if run.chance is not None:
                found.setdefault(run.chance, set()).add(place)
    one = len(found) == 1
    return [(chance, "gray" if one or len(whose) > 1 else colours[min(whose)]) for chance, whose in found.items()]


def _hatch(place: int) -> str:
    """The hatch of group number ``place``, by which groups of one colour are told apart."""
    return _HATCHES[place // len(COLOURS) % len(_HATCHES)]


def _bars(axes: Axes, groups: Sequence[Group], colours: list[str], names: list[str]) -> None:
    width = 0.8 / len(groups)
    for number, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        for place, name in enumerate(names):
            found = mean_and_deviation(group.values(name))
            if found:
                x = place + (number - (len(groups) - 1) / 2) * width
                look: Any = {
                    "color": colour,
                    "hatch": _hatch(number),
                    "edgecolor": "white",
                    "linewidth": 0,
                    "capsize": 3,
                }
                axes.bar(x, found[0], width * 0.9, yerr=found[1] or None, **look)
    room = max(6, min(13, 60 // max(1, len(names))))  # characters between two bars
    labels = [plain(textwrap.fill(name, room, break_long_words=False)) for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
