"""The plots of a report: SVG, readable on a phone."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from synco_fast.kernels import FAMILIES
from synco_fast.report.runs import Run
from synco_fast.runtime.style import COLOURS

__all__ = ["draw_confusion", "draw_map", "draw_run"]

matplotlib.use("Agg")
#: Inches: 400 pixels of a page, so that text keeps its size at a phone's width.
_WIDTH, _HEIGHT = 4.2, 3.0


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
    """Plots by title: loss, contrastive accuracy, kNN, hardness, throughput, data wait; only logged ones."""
    found = {}
    wanted: list[tuple[str, list[dict[str, Any]], list[tuple[str, str, str]], bool]] = [
        ("Contrastive loss", run.train, [("loss", "loss", COLOURS[0])], False),
        (
            "Top-1 against the queue",
            run.train,
            [("queue_top1", "queue alone", COLOURS[1]), ("top1", "with synthetic negatives", COLOURS[3])],
            True,
        ),
        ("kNN accuracy on the held-out split", run.evaluations, [("knn", "kNN", COLOURS[2])], True),
        (
            "Hardness: cosine to the query",
            run.train,
            [
                ("similarity/positive", "positive", COLOURS[7]),
                ("similarity/hard", "hard (mean of Q^N)", "gray"),
                *(
                    (f"similarity/{family.name}", f"{family.number} {family.name}", colour)
                    for family, colour in zip(FAMILIES, COLOURS, strict=False)
                ),
            ],
            False,
        ),
        ("Throughput, images per second", run.train, [("images_per_second", "images/s", COLOURS[0])], False),
        ("Time spent waiting for data", run.train, [("data_wait", "data wait", COLOURS[3])], True),
    ]
    for title, lines, names, share in wanted:
        figure, axes = _axes(title)
        for name, label, colour in names:
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3)
        if not axes.get_lines():
            continue
        axes.set_xlabel("epoch", fontsize=8)
        if share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_ylim(bottom=0)
        if title.startswith("kNN") and run.chance:
            axes.axhline(run.chance, color="gray", linestyle=":", label="chance")
            axes.set_ylim(0, 1)
        if title.startswith("Throughput"):
            axes.set_ylim(bottom=0)
        if len(axes.get_lines()) > 1:
            axes.legend(fontsize=7, ncol=2 if len(axes.get_lines()) > 4 else 1)
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
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
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
    for label in labels.unique().tolist():
        inside = points[labels == label].numpy()
        name = names[label] if len(names) <= 20 else None
        axes.scatter(inside[:, 0], inside[:, 1], s=5, color=palette(label % palette.N), label=name, linewidths=0)
    # As vector paths, thousands of points would make the page slow.
    for points_drawn in axes.collections:
        points_drawn.set_rasterized(True)
    if len(names) <= 20:
        figure.legend(loc="outside lower center", ncol=4, fontsize=7, markerscale=2, frameon=False)
    return _svg(figure)
