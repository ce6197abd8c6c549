"""Plots of a run: its curves, and the augmented pairs that the model saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synco_fast.data.pipelines.base import Batch
from synco_fast.kernels import FAMILIES
from synco_fast.runtime.style import COLOURS

__all__ = ["draw_curves", "draw_pairs"]

matplotlib.use("Agg")


def draw_curves(
    lines: list[dict[str, Any]], path: Path, *, title: str, steps_per_epoch: int, chance: float | None
) -> None:
    """Loss, kNN, hardness and throughput over epochs, as one PNG.

    Args:
        lines: From `read_metrics`.
        path: Where the PNG goes.
        title: The title.
        steps_per_epoch: Steps per epoch.
        chance: Chance level of kNN, drawn as a line.
    """
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (loss, knn), (hardness, speed) = figure.subplots(2, 2)
    figure.suptitle(title, fontsize=13)

    def curve(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, colour: str, **style: Any) -> None:
        points = [(row["step"] / steps_per_epoch, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.6, **style)

    curve(loss, train, "loss", "loss", COLOURS[0])
    loss.set_title("contrastive loss")
    accuracy = loss.twinx()
    curve(accuracy, train, "queue_top1", "top-1 against the queue", COLOURS[1])
    accuracy.set_ylim(0, 1)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles = [line for axes in (loss, accuracy) for line in axes.get_lines()]
    loss.legend(handles, [str(line.get_label()) for line in handles], fontsize=8, loc="center right")

    curve(knn, evaluations, "knn", "kNN", COLOURS[2], marker="o", markersize=4)
    if chance is not None:
        knn.axhline(chance, color="gray", linestyle=":", label="chance")
    knn.set_ylim(0, 1)
    knn.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    knn.set_title("kNN accuracy on the held-out split" if evaluations else "kNN: not evaluated")
    if evaluations:
        knn.legend(fontsize=8)

    curve(hardness, train, "similarity/positive", "positive", COLOURS[7])
    curve(hardness, train, "similarity/hard", "hard (mean of Q^N)", "gray", linestyle="--")
    for colour, family in zip(COLOURS, FAMILIES, strict=False):
        curve(hardness, train, f"similarity/{family.name}", f"{family.number} {family.name}", colour)
    hardness.set_title("hardness: cosine to the query")
    if hardness.get_lines():
        hardness.legend(fontsize=7, ncol=2)

    curve(speed, train, "images_per_second", "images per second", COLOURS[0])
    speed.set_ylim(bottom=0)
    speed.set_title("throughput, images per second")
    for axes in (loss, knn, hardness, speed):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_pairs(batch: Batch, path: Path, *, pairs: int = 24) -> None:
    """The two views of each image side by side, as one PNG."""
    count = min(pairs, len(batch.image_ids))
    columns = 6
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * 1.9, rows * 1.15 + 0.5), layout="constrained")
    figure.suptitle("pairs of views, as the encoder saw them before normalisation", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.axis("off")
        if place < count:
            views = [part[place].permute(1, 2, 0).numpy() for part in (batch.first, batch.second)]
            gap = np.full((views[0].shape[0], max(1, views[0].shape[1] // 16), 3), 255, np.uint8)
            axes.imshow(np.concatenate([views[0], gap, views[1]], axis=1), interpolation="nearest")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
