"""End-to-end record from the command line: pretrain with each method, evaluate, export, report, compare.

``python -m synco_fast.bench.experiments.transfer`` runs ``synco-fast`` on Fashion-MNIST like a user, at a budget for
two CPU cores. It writes ``record.json``, the comparison and a table to ``bench/records/transfer``. Every step resumes
where an earlier call stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from synco_fast.bench.experiments.common import (
    FASHION_MNIST,
    METHODS,
    call,
    evaluate,
    measured_on,
    must,
    over_seeds,
    write_record,
)
from synco_fast.runtime.files import read_json

FORMATS = ("torchvision", "timm", "detectron2", "safetensors", "onnx", "moco")
#: Evaluations by title: the result file, and the arguments.
EVALUATIONS = {
    "kNN": ("knn", ["knn", "--k", "20", "200"]),
    "linear, cached features": ("linear_fast", ["linear", "--fast", "--epochs", "30"]),
    "1 % labels": (
        "finetune_1",
        ["finetune", "--percent", "1", "--lr", "0.02", "0.1", "--epochs", "20", "--batch", "64"],
    ),
}
#: MoCo's protocol on random crops, at 1/50 of its epochs, to compare with the fast variant on one run.
LINEAR = ("linear", ["linear", "--epochs", "2"])


def pretrain(folder: Path, method: str, seed: int, options: argparse.Namespace, steps: int) -> None:
    """Pretrain one run, unless it exists."""
    if (folder / "summary.json").exists():
        return
    words: list[object] = [
        "--data.source",
        options.data,
        "--data.workers",
        0,
        "--evaluation.every",
        0,
        "--training.epochs",
        1,
    ]
    words += ["--training.max_steps", steps, "--method.warmup_epochs", 0, "--method.name", method]
    must("pretrain", "--config", "fashion-mnist", "--seed", seed, "--out", folder, *words)


def export(folder: Path) -> dict[str, str]:
    """For each format: the check that passed, or the reason why the format was refused."""
    found = {}
    for name in FORMATS:
        code, said, _ = call("export", folder, "--format", name, "--json", folder / f"export-{name}.json")
        if code not in (0, 2):
            raise SystemExit(f"export to {name} ended with {code}: {said}")
        if code == 2:
            found[name] = f"refused: {said.partition('found ')[2]}"
        else:
            checks = read_json(folder / f"export-{name}.json")["checks"]
            found[name] = "written" + "".join(f", {key} {value:.0e}" for key, value in checks.items())
    return found


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    titles = ["kNN, k 20", "kNN, k 200", "linear, cached features", "1 % labels"]

    def cell(found: dict[str, Any]) -> str:
        deviation = f" ± {100 * found['deviation']:.1f}" if len(found["values"]) > 1 else ""
        return f"{found['mean']:.1%}{deviation}"

    rows = [
        f"| {title} | {len(record['results'][key][titles[0]]['values'])} | "
        + " | ".join(cell(record["results"][key][name]) for name in titles)
        + " |"
        for key, title in {"untrained": "after one step", **METHODS}.items()
    ]
    agreement = [
        f"| {METHODS[method]} | {found['top1']:.1%} | {found['agreement']['other_top1']:.1%} | "
        f"{-found['agreement']['difference_in_points']:+.1f} |"
        for method, found in record["linear"].items()
    ]
    environment, protocol = record["environment"], record["protocol"]
    timm = f"timm {environment['timm']}"
    lines = [
        "# Fashion-MNIST from pretraining to export, on the command line",
        "",
        "Made by `python -m synco_fast.bench.experiments.transfer`; the figures are in `record.json`.",
        "",
        f"Preset `fashion-mnist` (a ResNet-10 of half the width) for {protocol['steps']} steps of {protocol['batch']} "
        "images, with synthetic negatives from the first step; then evaluation on all 60,000 and 10,000 images. "
        "Linear: 30 epochs on cached features, best of eight learning rates. 1 % labels: 600 images, 20 epochs, batch "
        "64, best of two learning rates. These budgets are a fraction of the published ones, so the figures show that "
        "the evaluations work, not which method is better.",
        "",
        "| encoder | seeds | " + " | ".join(titles) + " |",
        "|---|---|" + "---|" * len(titles),
        *rows,
        "",
        "Chance is 10.0%. With several seeds: mean and sample standard deviation. The machine had other load, which "
        "varied between runs, so the throughput in the figure is not comparable.",
        "",
        "![the runs compared](comparison.png)",
        "",
        "## Agreement of the fast linear probe",
        "",
        "| seed 0 | random crops, 2 epochs | cached features, 30 epochs | cached minus crops, points |",
        "|---|---|---|---|",
        *agreement,
        "",
        "After two epochs on random crops the classifier is far from converged. So this is the cost of a short budget; "
        "the agreement at full length has not been measured yet.",
        "",
        "## Export of the SynCo run",
        "",
        *(f"- {name}: {said}" for name, said in record["exports"].items()),
        "",
        f"{measured_on(environment, ' with other load, one thread', timm)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the missing steps, then write the record."""
    parser = argparse.ArgumentParser(description="Record Fashion-MNIST from pretraining to export.")
    parser.add_argument("--data", default=FASHION_MNIST, help="an image source")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"), help="folder of the runs")
    parser.add_argument("--record", type=Path, default=Path("bench/records/transfer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    runs = {("untrained", 0): options.runs / "untrained-0"}
    pretrain(runs["untrained", 0], "moco", 0, options, steps=1)
    for seed in options.seeds:
        for method in METHODS:
            runs[method, seed] = options.runs / f"{method}-{seed}"
            pretrain(runs[method, seed], method, seed, options, options.steps)
    results: dict[str, dict[str, list[float]]] = {}
    for (method, _), folder in runs.items():
        inside = results.setdefault(method, {})
        for title, (file, words) in EVALUATIONS.items():
            found = evaluate(folder, file, words)
            if file == "knn":
                for k, accuracy in found["accuracies"].items():
                    inside.setdefault(f"kNN, k {k}", []).append(accuracy)
            else:
                inside.setdefault(title, []).append(found["top1"])
    linear = {"synco": evaluate(runs["synco", options.seeds[0]], *LINEAR)}
    shown = runs["synco", options.seeds[0]]
    exports = export(shown)
    must("report", shown, "--workers", "0")
    options.record.mkdir(parents=True, exist_ok=True)
    trained = [folder for (method, _), folder in runs.items() if method != "untrained"]
    must("compare", *trained, "--out", options.record / "comparison.png", "--json", options.runs / "comparison.json")

    summary = read_json(shown / "summary.json")
    record = {
        "environment": summary["environment"],
        "seeds": options.seeds,
        "protocol": {"steps": options.steps, "batch": 128, "evaluations": {k: v[1] for k, v in EVALUATIONS.items()}},
        "results": {
            method: {name: over_seeds(values) for name, values in part.items()} for method, part in results.items()
        },
        "linear": {
            method: {key: found[key] for key in ("top1", "best", "epochs", "lr", "agreement")}
            for method, found in linear.items()
        },
        "exports": exports,
    }
    write_record(options.record, record, table(record))


if __name__ == "__main__":
    main()
