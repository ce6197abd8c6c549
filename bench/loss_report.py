"""Plots of the loss benchmark: time and memory against batch size and queue length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["best_seconds", "draw_loss"]


def best_seconds(result: dict[str, Any]) -> float:
    """A backend's best time: called, or replayed as a CUDA graph."""
    found = min(result["median_s"], result.get("graph_s", result["median_s"]))
    return float(found)


def draw_loss(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw time and peak extra memory against B at one K, and against K at one B. The dotted line is the time floor.

    Args:
        results: Results of `sweep`, each with ``floor_s``; failed ones are skipped.
        title: Title, such as device and versions.
        path: The PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [result for result in results if "failed" not in result]
    length, rows = (_most_common([result[name] for result in done]) for name in ("length", "rows"))
    columns = (
        ("rows", f"queries B, at K = {length:,}", [result for result in done if result["length"] == length]),
        ("length", f"queue length K, at B = {rows:,}", [result for result in done if result["rows"] == rows]),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for (time, memory), (name, label, points) in zip(axes.T, columns, strict=True):
        for backend in dict.fromkeys(result["backend"] for result in points):
            line = sorted((result for result in points if result["backend"] == backend), key=lambda found: found[name])
            x = [result[name] for result in line]
            time.plot(x, [best_seconds(result) for result in line], "o-", label=backend)
            memory.plot(x, [max(result["extra_mib"], 0.1) for result in line], "o-", label=backend)
        floor = sorted({(result[name], result["floor_s"]) for result in points})
        time.plot(*zip(*floor, strict=True), "k:", label="floor")
        time.set(xscale="log", yscale="log")
        memory.set(yscale="log", xlabel=label)
        memory.set_xticks(sorted({result[name] for result in points}))
        memory.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        memory.xaxis.minorticks_off()
    axes[0, 0].set_ylabel("seconds, forward and gradient")
    axes[1, 0].set_ylabel("peak extra MiB")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _most_common(values: list[int]) -> int:
    """The most common value; the largest one in a tie."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
