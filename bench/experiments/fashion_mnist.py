"""Fashion-MNIST record: kNN accuracy of MoCo v2, MoCHi and SynCo at equal budget, over seeds.

``python -m synco_fast.bench.experiments.fashion_mnist`` pretrains with the preset ``fashion-mnist``: every method with
every seed, for the same number of steps. It compares the kNN accuracy of each encoder with raw pixels and with the
encoders before training. It writes ``record.json``, a table and a figure to ``bench/records/fashion-mnist``. Existing
runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from synco_fast.bench.experiments.common import FASHION_MNIST, METHODS, must, over_seeds, read_json
from synco_fast.data.workers import available_cores
from synco_fast.runtime.style import COLOURS


def pretrain(method: str, seed: int, runs: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain one run in its own process, and return its summary."""
    folder = runs / f"{method}-{seed}"
    if not (folder / "summary.json").exists():
        words: list[object] = ["--config", "fashion-mnist", "--seed", seed, "--data", options.data, "--out", folder]
        words += ["--data.workers", 0, "--method.name", method, "--training.epochs", options.epochs]
        must("pretrain", *words, threads=max(1, available_cores() // options.parallel))
    return read_json(folder / "summary.json")


def raw_pixels(options: argparse.Namespace) -> float:
    """The kNN accuracy of raw pixels, by the same protocol as for the encoders."""
    import torch
    from torch import nn

    from synco_fast.data.sources.open import open_source
    from synco_fast.evaluation.knn import periodic_knn
    from synco_fast.presets import load_config

    config = load_config("fashion-mnist")
    plain = config.augment.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    source = open_source(options.data)
    return periodic_knn(nn.Flatten(), source, plain, config.evaluation, device=torch.device("cpu"), workers=0).accuracy


def draw(record: dict[str, Any], runs: Path, path: Path) -> None:
    """Draw the kNN accuracy of each run over the epochs, and the baselines."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for (method, title), colour in zip(METHODS.items(), COLOURS, strict=False):
        for seed in record["seeds"]:
            lines = (runs / f"{method}-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            points = [(line["epoch"], line["knn"]) for line in map(json.loads, lines) if line["kind"] == "evaluation"]
            label = title if seed == record["seeds"][0] else None
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, alpha=0.8, label=label)
    axes.axhline(record["raw_pixels"], color="gray", linestyle="--", label="raw pixels")
    axes.set_xlabel("epoch")
    axes.set_ylabel("kNN accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.set_title("Fashion-MNIST, equal budget")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""

    def row(title: str, found: dict[str, Any]) -> str:
        values = ", ".join(f"{value:.1%}" for value in found["values"])
        above = 100 * (found["mean"] - record["before"]["mean"])
        return f"| {title} | {found['mean']:.1%} | {100 * found['deviation']:.1f} | {above:+.1f} | {values} |"

    protocol, environment = record["protocol"], record["environment"]
    lines = [
        "# Fashion-MNIST: MoCo v2, MoCHi and SynCo at equal budget",
        "",
        "Made by `python -m synco_fast.bench.experiments.fashion_mnist`; the figures are in `record.json`.",
        "",
        f"Preset `fashion-mnist`: {protocol['steps']:,} steps of {protocol['batch']} images "
        f"({protocol['epochs']} epochs) with a {protocol['backbone']}, the same for every method. Synthetic negatives: "
        f"{protocol['count_scale']:g} of the published counts. Weighted kNN, "
        f"k = {protocol['neighbours']}: {protocol['queries']:,} test images against {protocol['bank']:,} labelled "
        "training images. Mean over seeds, and sample standard deviation in percentage points.",
        "",
        f"| features | kNN | deviation | gain in points | seeds {', '.join(map(str, record['seeds']))} |",
        "|---|---|---|---|---|",
        f"| raw pixels | {record['raw_pixels']:.1%} | | | |",
        row("encoder before training", record["before"]),
        *(row(title, record["after"][method]) for method, title in METHODS.items()),
        "",
        "![kNN accuracy over epochs](knn.png)",
        "",
        f"Measured on {environment['device']}, {environment['cores']} cores; torch {environment['torch']}, "
        f"timm {environment['timm']}, Python {environment['python']}; commit {environment.get('commit', 'unknown')}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the missing runs, then write the record."""
    parser = argparse.ArgumentParser(description="Record Fashion-MNIST: three methods, equal budget, several seeds.")
    parser.add_argument("--data", default=FASHION_MNIST, help="an image source")
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="folder of the runs")
    parser.add_argument("--record", type=Path, default=Path("bench/records/fashion-mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=2, help="parallel runs, which share the cores")
    options = parser.parse_args()

    options.runs.mkdir(parents=True, exist_ok=True)
    jobs = [(method, seed) for seed, method in product(options.seeds, METHODS)]
    with ThreadPoolExecutor(options.parallel) as pool:
        found = pool.map(lambda job: pretrain(job[0], job[1], options.runs, options), jobs)
        summaries = dict(zip(jobs, found, strict=True))

    from synco_fast.presets import load_config

    config = load_config("fashion-mnist", {"training.epochs": options.epochs})
    record = {
        "environment": summaries[jobs[0]]["environment"],
        "seeds": options.seeds,
        "protocol": {
            "epochs": options.epochs,
            "steps": summaries[jobs[0]]["steps"],
            "batch": config.training.batch,
            "backbone": "ResNet-10 of half the width",
            "neighbours": config.evaluation.k,
            "bank": config.evaluation.train_images,
            "queries": config.evaluation.images,
            "count_scale": config.method.count_scale,
        },
        "raw_pixels": raw_pixels(options),
        "before": over_seeds([summaries["moco", seed]["knn_before"] for seed in options.seeds]),
        "after": {
            method: over_seeds([summaries[method, seed]["knn_after"] for seed in options.seeds]) for method in METHODS
        },
    }
    options.record.mkdir(parents=True, exist_ok=True)
    (options.record / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.record / "README.md").write_text(table(record), encoding="utf-8")
    draw(record, options.runs, options.record / "knn.png")
    print(table(record))


if __name__ == "__main__":
    main()
