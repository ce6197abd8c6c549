"""The plots of a report: SVG, readable on a phone."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from synco_fast.report.runs import Run
from synco_fast.runtime.style import columns_of, plain, told_apart
from synco_fast.training.run.plots import PANELS, draw_panel

__all__ = ["draw_confusion", "draw_map", "draw_run"]

#: Inches: 400 pixels of a page, so that text keeps its size at a phone's width.
_WIDTH, _HEIGHT = 4.2, 3.0
#: Characters of a class's name beside the confusion matrix, in the legend of the map, and in a line of that legend.
_TICK, _LABEL, _LINE = 20, 30, 72


def _axes(title: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "synco-fast"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_run(run: Run) -> dict[str, str]:
    """The panels of the run's own picture, by title; only those with something logged."""
    found = {}
    for panel in PANELS:
        title = panel.title if panel.title.startswith("kNN") else panel.title[0].upper() + panel.title[1:]
        figure, axes = _axes(title)
        if draw_panel(axes, panel, [*run.train, *run.evaluations], chance=run.chance):
            found[title] = _svg(figure)
    return found


def draw_confusion(confusion: list[list[int]], names: list[str]) -> str:
    """Plot the confusion matrix, normalised by true class (rows)."""
    counts = np.array(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes("rows: true class, columns: predicted", height=4.2)
    axes.grid(visible=False)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.7, format=lambda value, _: f"{value:.0%}").ax.tick_params(labelsize=7)
    if len(names) == len(counts) <= 20:
        labels = [plain(name) for name in told_apart(names, _TICK)]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
        if len(names) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    return _svg(figure)


def draw_map(points: Tensor, labels: Tensor, names: list[str], title: str) -> str:
    """Plot points (n, 2), coloured by class."""
    figure, axes = _axes(title, height=4.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    palette = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
    if len(names) > palette.N:
        axes.set_title(f"{title}; {len(names)} classes share {palette.N} colours", fontsize=10)
    told = told_apart(names, _LABEL)
    for label in labels.unique().tolist():
        inside = points[labels == label].numpy()
        name = plain(told[label]) if len(names) <= palette.N else None
        axes.scatter(inside[:, 0], inside[:, 1], s=5, color=palette(label % palette.N), label=name, linewidths=0)
    # As vector paths, thousands of points would make the page slow.
    for points_drawn in axes.collections:
        points_drawn.set_rasterized(True)
    if len(names) <= palette.N:
        figure.legend(
            loc="outside lower center", ncol=columns_of(told, _LINE), fontsize=7, markerscale=2, frameon=False
        )
    return _svg(figure)
