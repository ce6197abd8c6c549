"""The model card: architecture, training and results of exported weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from synco_fast.config import Config
from synco_fast.export.load import Weights
from synco_fast.methods import METHODS, extra_of, with_queue
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import UserError
from synco_fast.runtime.files import read_json, write_text
from synco_fast.runtime.results import read_results

__all__ = ["has_card", "known_results", "write_card"]

#: Begins the first sentence of every card, by which a card is told from other files of its name.
_ABOUT = "The backbone without its projection head"


def has_card(folder: Path) -> bool:
    """Whether a folder has a model card, as that of an export does."""
    card = folder / "README.md"
    return card.is_file() and _ABOUT in card.read_text(encoding="utf-8", errors="replace")


def known_results(weights: Weights) -> dict[str, str]:
    """The results in a run folder that are of these weights: the run's own kNN and effective rank, and evaluations.

    The name of each has departures from the published protocol, and images that are not the run's own.
    """
    if weights.run is None:
        return {}
    found: dict[str, str] = {}
    summary, step = _json(weights.run / "summary.json"), weights.step
    best = summary.get("best") or {}
    last = step is None or summary.get("steps", step) == step
    knn = summary.get("knn_after") if last else None
    if step is not None and best.get("step") == step:
        knn = best["knn"]
    if knn is not None:
        found["kNN during pretraining"] = f"{knn:.1%} (chance {summary['chance']:.1%})"
    if summary.get("feature_rank") is not None and last:
        found["effective rank of the features (RankMe)"] = f"{summary['feature_rank']:.1f}"
    results, _ = read_results(
        weights.run / "evaluation",
        own=weights.config.evaluation.source or weights.config.data.source,
        step=step,
        checkpoint=weights.file.name,
        read=_json,
    )
    for result in results:
        chance = result.values.get("chance")
        said = f" (chance {chance:.1%})" if chance is not None else ""
        found |= {name: f"{value:.1%}{said}" for name, value in result.headline.items()}
    return found


def _json(file: Path) -> dict[str, Any]:
    """A JSON file; a damaged one is ignored, since the card is useful without it."""
    try:
        return read_json(file)
    except UserError:
        return {}


def write_card(
    path: Path,
    weights: Weights,
    *,
    format: str,
    files: tuple[str, ...],
    usage: str,
    checks: dict[str, float],
    licence: str | None,
) -> None:
    """Write the card as Markdown.

    Args:
        path: The file.
        weights: What was exported.
        format: The export's format.
        files: Written beside the card.
        usage: Lines of code that load the weights.
        checks: Measurements made during the export.
        licence: The licence of the weights, as their owner states it.
    """
    config = weights.config
    environment = {**describe_environment(), **_json(weights.run / "environment.json" if weights.run else Path())}
    forms = environment.pop("forms", {})
    used = [f"{part} {form['name']}" for part, form in forms.items()]
    results = known_results(weights)
    lines = [
        *_front_matter(config, format, licence),
        f"# {config.model.backbone}, pretrained by {config.method.name}",
        "",
        f"{_ABOUT}, for {format}: {', '.join(f'`{name}`' for name in files)}.",
        "",
        "```",
        usage,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(weights).items()),
        "",
        "## Results",
        "",
        *([f"- {name}: {value}" for name, value in results.items()] or ["None recorded beside the checkpoint."]),
        *(f"- {name}: {value:.1e}" for name, value in checks.items()),
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + (f"; {', '.join(used)}" if used else ""),
        "",
        "## Licence",
        "",
        licence or "Not stated. The licence of the training images may bind the weights.",
        "",
    ]
    write_text(path, "\n".join(lines))


def _facts(weights: Weights) -> dict[str, str]:
    """What the weights are and how they were trained: the card's first table."""
    config = weights.config
    rows = {
        "method": _method(config),
        "backbone": config.model.backbone
        + (f" with {config.model.backbone_args}" if config.model.backbone_args else "")
        + (", small stem" if config.model.small_stem else ""),
        "data": config.data.source if not weights.imported else "not recorded in the imported file",
        "epochs": f"{weights.epochs:.3g}" if weights.epochs is not None else "not recorded",
    }
    if config.model.init is not None:
        rows["started from"] = config.model.init
    if weights.imported:
        known = (value if key == "from" else f"{key} {value}" for key, value in weights.imported.items() if value)
        rows["imported from"] = ", ".join(known)
    else:
        rows |= {
            "steps": f"{weights.step:,} of {config.training.batch} images",
            **_negatives(config),
            "seed": str(config.seed),
        }
    recipe = config.augment
    if recipe.grows and not weights.imported:
        ramp = recipe.ramp(config.training.epochs).items()
        rows["views in training"] = ", ".join(f"{epochs} epochs of {size} pixels" for size, epochs in ramp)
    rows["input"] = (
        f"RGB in [0, 1], short side to {recipe.resize} pixels, central crop of {recipe.size}, minus mean "
        f"{recipe.mean}, divided by {recipe.std}"
    )
    return rows


def _front_matter(config: Config, format: str, licence: str | None) -> list[str]:
    """The Hugging Face Hub's YAML block: library, task, tags, licence."""
    fields: dict[str, Any] = {
        "library_name": "timm" if format == "timm" else "synco-fast",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", "contrastive-learning", config.method.name],
    }
    if licence is not None and re.fullmatch(r"[A-Za-z0-9.-]+", licence):
        fields["license"] = licence.lower()
    elif licence is not None:
        fields |= {"license": "other", "license_name": licence}
    return ["---", *yaml.safe_dump(fields, sort_keys=False).splitlines(), "---", ""]


def _method(config: Config) -> str:
    """Title and paper of the method, and of its extra, if any."""
    spec, extra = METHODS[config.method.name], extra_of(config)
    parts = [(spec.title, spec.arxiv), *([(extra.title, extra.arxiv)] if extra else [])]
    return " with ".join(f"{title} ([arXiv {number}](https://arxiv.org/abs/{number}))" for title, number in parts)


def _negatives(config: Config) -> dict[str, str]:
    """The negatives of a method with a queue."""
    if config.method.name not in with_queue():
        return {}
    negatives = config.method.negatives()
    counts = [f"{negatives.count_of(family)} {family.name}" for family in negatives.active()]
    return {
        "queue, temperature": f"{config.method.queue:,}, {config.method.temperature:g}",
        "synthetic negatives per query": ", ".join(counts) or "none",
    }
