"""Plots of a run: its curves, and the augmented pairs that the model saw."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from synco_fast.data.pipelines.base import Batch
from synco_fast.kernels import FAMILIES
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.style import COLOURS, colour_of, plain

__all__ = ["PANELS", "Panel", "draw_curves", "draw_pairs", "draw_panel", "is_whole", "synthetic_start"]


#: Characters of a line of the picture's title.
_LINE = 110
#: The last chunk of every PNG file.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Panel:
    """One plot over epochs, in a run's own picture and in its report.

    Attributes:
        title: What is drawn, with its unit.
        curves: Name in ``metrics.jsonl``, label and colour of each curve, from whichever lines have it.
        top: The upper end of the axis, where it is fixed.
        from_zero: Whether the axis begins at 0.
        percent: Whether values are shares.
        marks: Whether the start of the synthetic negatives is marked.
        chance: Whether the chance level of a classification is marked.
    """

    title: str
    curves: tuple[tuple[str, str, str], ...]
    top: float | None = None
    from_zero: bool = False
    percent: bool = False
    marks: bool = False
    chance: bool = False


PANELS = (
    Panel("loss", (("loss", "loss", COLOURS[0]),), marks=True),
    Panel(
        "top-1: positive nearer than the negatives",
        (("queue_top1", "queue alone", COLOURS[1]), ("top1", "all negatives", COLOURS[3])),
        from_zero=True,
        percent=True,
        marks=True,
    ),
    Panel(
        "kNN accuracy on the held-out split",
        (("knn", "kNN", COLOURS[2]),),
        top=1.0,
        from_zero=True,
        percent=True,
        chance=True,
    ),
    Panel(
        "hardness: cosine to the query",
        (
            ("similarity/positive", "positive", COLOURS[7]),
            ("similarity/hard", "hardest negatives", "gray"),
            *(
                (f"similarity/{family.name}", f"{family.number} {family.name}", colour_of(place))
                for place, family in enumerate(FAMILIES)
            ),
        ),
        marks=True,
    ),
    Panel(
        "alignment and uniformity: lower is better",
        (("alignment", "alignment of queries and keys", COLOURS[0]), ("uniformity", "uniformity of keys", COLOURS[1])),
        marks=True,
    ),
    Panel(
        "effective rank (RankMe)",
        (("key_rank", "keys", COLOURS[0]), ("feature_rank", "backbone features", COLOURS[2])),
        from_zero=True,
        marks=True,
    ),
    Panel(
        "false negatives among the N nearest keys",
        (("false_negatives", "of the query's class", COLOURS[3]),),
        from_zero=True,
        percent=True,
        marks=True,
        chance=True,
    ),
    Panel("throughput, images per second", (("images_per_second", "images/s", COLOURS[0]),), from_zero=True),
    Panel("time spent waiting for data", (("data_wait", "data wait", COLOURS[3]),), from_zero=True, percent=True),
)


def draw_panel(axes: Axes, panel: Panel, lines: list[dict[str, Any]], *, chance: float | None = None) -> bool:
    """Draw one panel; whether there was anything to draw.

    Args:
        axes: Where.
        panel: What.
        lines: From `read_metrics`, each with its ``epoch``.
        chance: Chance level of a classification, drawn as a line where the panel asks for it.
    """
    # Without synthetic negatives, top-1 with them is top-1 against the queue.
    same = not _with_synthetic(lines) and any("queue_top1" in line for line in lines)
    for name, label, colour in panel.curves:
        if name == "top1" and same:
            continue
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        if points:
            style = "--" if colour == "gray" else "-"
            marker = "o" if len(points) < 30 else None
            axes.plot(
                *zip(*points, strict=True), label=label, color=colour, linestyle=style, marker=marker, markersize=3
            )
    if not axes.get_lines():
        return False
    if panel.marks and (start := synthetic_start(lines)) is not None:
        axes.axvline(start, color="gray", linestyle=":", linewidth=1.2, label="synthetic negatives begin")
    if panel.chance and chance:
        axes.axhline(chance, color="gray", linestyle=":", label="chance")
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.top is not None:
        axes.set_ylim(top=1.05 * panel.top)  # so that the legend and the frame leave a curve at the top visible
    axes.set_xlabel("epoch", fontsize=8)
    if len(axes.get_lines()) > 4:
        # Room above the curves, since so large a legend would cover some of them.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.5 * (high - low))
        axes.legend(fontsize=7, ncol=2, loc="upper center")
    elif len(axes.get_lines()) > 1 or len(panel.curves) > 1:  # also to tell which of several a single curve is
        axes.legend(fontsize=7)
    return True


def synthetic_start(lines: list[dict[str, Any]]) -> float | None:
    """The epoch of the first logged step with synthetic negatives; None if there are none, or from the first on."""
    train = [line for line in lines if line["kind"] == "train"]
    first = next((place for place, line in enumerate(train) if _with_synthetic([line])), 0)
    return float(train[first]["epoch"]) if first else None


def _with_synthetic(lines: list[dict[str, Any]]) -> bool:
    """Whether any line is of a step with synthetic negatives."""
    names = {f"similarity/{family.name}" for family in FAMILIES}
    return any(names & line.keys() for line in lines)


def draw_curves(lines: list[dict[str, Any]], path: Path, *, title: str, chance: float | None) -> None:
    """All panels of `PANELS` over epochs, as one PNG.

    Args:
        lines: From `read_metrics`.
        path: Where the PNG goes.
        title: The title.
        chance: Chance level of a classification.
    """
    figure = Figure(figsize=(14, 10.8), layout="constrained")
    figure.suptitle(plain(textwrap.fill(title, _LINE)), fontsize=13)
    for axes, panel in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        if not draw_panel(axes, panel, lines, chance=chance):
            axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", color="gray", transform=axes.transAxes)
            axes.set_axis_off()
        axes.set_title(panel.title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def is_whole(path: Path) -> bool:
    """Whether there is a PNG file that is not cut short."""
    return path.is_file() and path.read_bytes().endswith(_PNG_END)


def draw_pairs(batch: Batch, path: Path, *, pairs: int = 24) -> None:
    """The two views of each image side by side, as one PNG."""
    count = min(pairs, len(batch.image_ids))
    columns = 6
    rows = -(-count // columns)
    # Far more space than inside a pair.
    layout = ConstrainedLayoutEngine(wspace=0.15)
    figure = Figure(figsize=(columns * 1.9, rows * 1.15 + 0.5), layout=layout)
    figure.suptitle("pairs of views, as the encoder saw them before normalisation", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.axis("off")
        if place < count:
            views = [part[place].permute(1, 2, 0).numpy() for part in (batch.first, batch.second)]
            gap = np.full((views[0].shape[0], max(1, views[0].shape[1] // 64), 3), 255, np.uint8)
            axes.imshow(np.concatenate([views[0], gap, views[1]], axis=1), interpolation="nearest")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
