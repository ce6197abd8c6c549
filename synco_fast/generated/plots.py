"""Plots of generators: sheets of samples, and curves of both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import save_image

from synco_fast.runtime.style import plain

__all__ = ["draw_generator_curves", "draw_pair_curves", "draw_samples"]

_SCALE = 2
#: A curve marks each point up to this many.
_FEW = 20
_VERDICTS = (
    "discriminator accuracy",
    (("discriminator/real", "real"), ("discriminator/generated", "generated")),
)


def draw_samples(images: Tensor, path: Path) -> None:
    """Images (n, 3, H, W) in [0, 1] in rows of eight, twice their size, as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    large = images.detach().float().cpu().clamp(0, 1)
    for axis in (2, 3):
        large = torch.repeat_interleave(large, _SCALE, dim=axis)
    save_image(large, path, nrow=8, padding=_SCALE, pad_value=1.0)


def draw_generator_curves(lines: list[dict[str, Any]], path: Path, *, title: str, network: str | None) -> None:
    """Losses, discriminator accuracy, diversity and KID over steps, as one PNG.

    Args:
        lines: From `read_metrics`.
        path: Where the PNG goes.
        title: The title.
        network: KID's feature network; None if KID was not measured.
    """
    _draw_panels(
        lines,
        path,
        title,
        ("losses", (("generator/loss", "generator"), ("discriminator/loss", "discriminator"))),
        _VERDICTS,
        ("diversity, relative to real images", (("generator/diversity", "diversity"),)),
        (f"KID on {network}" if network else "KID: not measured", (("generator/kid", "moving average"),)),
    )


def draw_pair_curves(lines: list[dict[str, Any]], path: Path, *, title: str, floor: float) -> None:
    """Stage two over steps: similarity of the pairs, losses, w_hard, discriminator accuracy, diversity and cost.

    Args:
        lines: From `read_metrics`.
        path: Where the PNG goes.
        title: The title.
        floor: The floor of the similarity.
    """
    lines = [line | {"floor": floor} if "similarity/pair" in line else line for line in lines]
    _draw_panels(
        lines,
        path,
        title,
        (
            "similarity of a pair (should fall to the floor)",
            (("similarity/pair", "mean"), ("similarity/pair_lowest", "lowest"), ("floor", "floor")),
        ),
        (
            "contrastive losses",
            (("loss", "real"), ("generated/loss", "generated"), ("generator/contrastive", "generators")),
        ),
        ("weight w_hard", (("generator/hardness", "w_hard"),)),
        ("adversarial losses", (("generator/loss", "generators"), ("discriminator/loss", "discriminator"))),
        _VERDICTS,
        (
            "shares",
            (
                ("generators_time", "share of a step's time"),
                ("generator/diversity", "diversity, relative to real images"),
                ("similarity/below_floor", "pairs below the floor"),
            ),
        ),
    )


def _draw_panels(
    lines: list[dict[str, Any]], path: Path, title: str, *panels: tuple[str, tuple[tuple[str, str], ...]]
) -> None:
    """Draw panels in two rows, each with a heading and curves by name and label."""
    columns = len(panels) // 2
    figure = Figure(figsize=(5.5 * columns, 7.2), layout="constrained")
    figure.suptitle(plain(title), fontsize=13)
    for axes, (heading, curves) in zip(figure.subplots(2, columns).flat, panels, strict=True):
        for name, label in curves:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                marker = "o" if len(points) <= _FEW else None
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, marker=marker, markersize=4)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.get_lines():
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
