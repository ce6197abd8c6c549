"""Plots that are made but not rendered: rendering takes two thirds of the time of a run of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

#: Matplotlib's own.
savefig = Figure.savefig


def render_nothing() -> None:
    """From here on in this process, a plot as PNG is one pixel; SVGs, which pages hold, stay as they are."""

    def leave_blank(figure: Figure, file: Path, **options: Any) -> None:
        if options.get("format", "png") == "png":
            Image.new("L", (1, 1)).save(file, "PNG")
        else:
            savefig(figure, file, **options)

    Figure.savefig = leave_blank
