"""The HTML report of a run: self-contained, works offline."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from synco_fast.evaluation.context import EvalOptions, for_features, open_context
from synco_fast.report.figures import draw_confusion, draw_map, draw_run
from synco_fast.report.gallery import flatten, look_around
from synco_fast.report.runs import Run, read_run
from synco_fast.runtime.errors import CheckpointError, DataError, DivergedError
from synco_fast.runtime.files import write_text

__all__ = ["write_report"]


def write_report(folder: Path, out: Path | None = None, options: EvalOptions | None = None) -> Path:
    """Write the page, ``report.html`` in the run folder by default.

    Missing results, such as a linear probe, are listed with the command that makes them. If the images or the
    checkpoint are gone, the page says so and shows the rest.

    Args:
        folder: The run folder.
        out: The file to write.
        options: Source, device and workers for the pictures of neighbours.

    Raises:
        ConfigError: The folder is not a run.
    """
    run = read_run(folder)
    out = out or folder / "report.html"
    pairs = folder / "plots" / "pairs.png"
    probe = run.probe.values if run.probe else {}
    environment = Environment(
        loader=PackageLoader("synco_fast.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(
        run=run,
        title=f"{run.config.method.name} on {run.summary.get('source', run.config.data.source)}",
        tiles=_tiles(run),
        curves={title: _uri(svg) for title, svg in draw_run(run).items()},
        pairs=_uri(pairs.read_bytes(), "image/png") if pairs.is_file() else None,
        **_gallery(folder, options or EvalOptions()),
        confusion=_uri(draw_confusion(probe["confusion"], probe["class_names"])) if "confusion" in probe else None,
        probe=probe,
        results=[
            (name, _percent(value), _percent(result.values.get("chance")))
            for result in run.results
            for name, value in result.headline.items()
        ],
        configuration=run.config.to_yaml(),
    )
    write_text(out, text)
    return out


def _percent(value: float | None) -> str:
    """An accuracy, or that there is none."""
    return "none" if value is None else f"{value:.1%}"


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The key figures at the top."""
    summary = run.summary
    rank = summary.get("feature_rank")
    return [
        ("kNN before", _percent(summary.get("knn_before"))),
        ("kNN after", _percent(run.knn)),
        *([("best kNN", f"{best['knn']:.1%}, epoch {best['epoch']:g}")] if (best := summary.get("best")) else []),
        *((name, _percent(value)) for name, value in (run.probe.columns if run.probe else {}).items()),
        ("chance", _percent(run.chance)),
        ("effective rank", "none" if rank is None else f"{rank:.1f}"),
        ("epochs", f"{summary.get('epochs', 0):.3g}"),
        ("images/s", f"{run.throughput:,.0f}" if run.throughput else "none"),
        ("data wait", _percent(summary.get("data_wait"))),
    ]


def _gallery(folder: Path, options: EvalOptions) -> dict[str, Any]:
    """Neighbours and map, or the reason why they are missing."""
    try:
        context = open_context(folder, for_features(options))
        found = look_around(context)
    except (CheckpointError, DataError, DivergedError) as error:
        return {"gallery": None, "map": None, "map_by": None, "missing": str(error)}
    points, by = flatten(found.features)
    names = list(context.train.classes or ())
    title = f"{len(points):,} held-out images"
    return {"gallery": found, "map": _uri(draw_map(points, found.labels, names, title)), "map_by": by, "missing": None}


def _uri(content: str | bytes, kind: str = "image/svg+xml") -> str:
    data = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
