"""Generated-pairs record: fractions of the unlabelled images, with and without pairs, at equal encoder steps.

``python -m synco_fast.bench.experiments.generated_pairs`` trains a generator on 10, 20 and 100 % of Fashion-MNIST's
unlabelled images. Then it trains encoders on the same images with each of the `ARMS`, and evaluates them with all
labels by kNN and a linear probe. It writes ``record.json``, a table and figures to ``bench/records/generated-pairs``.
Existing runs are not repeated, so the study can grow by more ``--seeds``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from synco_fast.bench.experiments.common import (
    FASHION_MNIST,
    OverSeeds,
    evaluate,
    measured_on,
    must,
    over_seeds,
    write_record,
)
from synco_fast.data.sources.open import open_source
from synco_fast.evaluation.linear import FAST_RATES
from synco_fast.presets import load_config
from synco_fast.runtime.files import read_json
from synco_fast.runtime.style import COLOURS
from synco_fast.training.run.metrics import read_metrics

#: Title, kind of pair, negatives and color in the figures, by name.
ARMS = {
    "none": ("none", "none", "moco", COLOURS[7]),
    "none-synco": ("none, SynCo's negatives", "none", "synco", "#999999"),
    "frozen": ("frozen pair", "frozen", "moco", COLOURS[1]),
    "joint": ("joint pair", "joint", "moco", COLOURS[0]),
    "joint-synco": ("joint pair, SynCo's negatives", "joint", "synco", COLOURS[2]),
}
#: The compared arms, paired by seed.
COMPARED = (("frozen", "none"), ("joint", "none"), ("joint", "frozen"), ("joint-synco", "none-synco"))
MEASURES = {"knn": "kNN, k 20", "knn_200": "kNN, k 200", "linear": "linear probe"}
#: Fractions of the unlabelled images.
SHARES = (0.1, 0.2, 1.0)
_PROBE_EPOCHS = 30
_PRESET = "fashion-mnist"
_BATCH = 128


def train_generator(share: float, options: argparse.Namespace) -> Path:
    """Run stage one on a fraction of the images, and return its folder."""
    folder: Path = options.runs / f"generator-{share:g}"
    if not (folder / "summary.json").exists():
        words = ["--data", options.data, "--out", folder, "--fraction", share, "--size", 32, "--width", options.width]
        words += ["--steps", options.generator_steps, "--workers", 0, "--seed", 0]
        must("pretrain-generator", *words)
    return folder


def pretrain(arm: str, share: float, seed: int, options: argparse.Namespace, *, steps: int | None = None) -> Path:
    """Run stage two, or a run without pairs, and return its folder. Every fraction gets the same number of steps."""
    folder: Path = options.runs / f"{arm}-{share:g}-{seed}"
    if (folder / "summary.json").exists():
        return folder
    _, pair, base, _ = ARMS.get(arm, ARMS["none"])
    per_epoch = int(share * options.images) // _BATCH
    words: list[object] = ["--config", _PRESET, "--data", options.data, "--out", folder, "--seed", seed]
    words += ["--data.fraction", share, "--data.workers", 0, "--training.batch", _BATCH, "--evaluation.every", 0]
    words += ["--training.epochs", math.ceil(options.steps / per_epoch)]
    words += ["--training.max_steps", options.steps if steps is None else steps]
    words += ["--optimizer.warmup_epochs", options.warmup / per_epoch]
    words += ["--method.name", base, "--method.warmup_epochs", 0]
    words += ["--generated.pair", pair]
    if pair != "none":
        words += ["--generated.checkpoint", options.runs / f"generator-{share:g}", "--generated.width", options.width]
        words += ["--generated.batch", options.pairs, "--generated.ramp_epochs", options.ramp / per_epoch]
        words += ["--generated.weight", options.weight, "--generated.hardness", options.hardness]
        words += ["--generated.floor", options.floor, "--generated.lr", options.lr]
    must("pretrain", *words)
    return folder


def measure(folder: Path) -> dict[str, float]:
    """The accuracies of a run, by the keys of `MEASURES`."""
    knn = evaluate(folder, "knn", ["knn", "--k", "20", "200"])["accuracies"]
    linear = evaluate(folder, "linear_fast", ["linear", "--fast", "--epochs", str(_PROBE_EPOCHS)])
    return {"knn": knn["20"], "knn_200": knn["200"], "linear": linear["top1"]}


def pairs_of(folder: Path) -> dict[str, float]:
    """The generator metrics of a run, from the first and the last line of its log."""
    lines = [line for line in read_metrics(folder) if "similarity/pair" in line]
    shares = [line["generators_time"] for line in read_metrics(folder) if "generators_time" in line]
    found = {"generators_time": statistics.mean(shares)}
    if lines:
        first, last = lines[0], lines[-1]
        found |= {
            "similarity_first": first["similarity/pair"],
            "similarity_last": last["similarity/pair"],
            "below_floor_last": last["similarity/below_floor"],
            "diversity_last": last["generator/diversity"],
            "contrastive_first": first["generator/contrastive"],
            "contrastive_last": last["generator/contrastive"],
        }
    return found


def gather(options: argparse.Namespace, runs: dict[tuple[str, float, int], Path]) -> dict[str, Any]:
    """Build the record from the existing runs."""

    def of_arm(arm: str, share: float, of: Callable[[Path], dict[str, float]]) -> dict[str, OverSeeds]:
        found = [of(runs[arm, share, seed]) for seed in options.seeds]
        return {name: over_seeds([values[name] for values in found]) for name in found[0]}

    config = load_config(_PRESET)
    stage_one = {f"{share:g}": read_json(options.runs / f"generator-{share:g}" / "summary.json") for share in SHARES}
    kept = ("images", "steps", "kid", "kid_network", "diversity")
    return {
        "environment": read_json(runs["none", SHARES[0], options.seeds[0]] / "summary.json")["environment"],
        "stage_one_environment": stage_one[f"{SHARES[0]:g}"]["environment"],
        "seeds": options.seeds,
        "protocol": {
            "source": "Fashion-MNIST, 60,000 training images",
            "steps": options.steps,
            "batch": _BATCH,
            "backbone": "ResNet-10 of half the width",
            "temperature": config.method.temperature,
            "queue": config.method.queue,
            "count_scale": config.method.count_scale,
            "generated": {
                name: getattr(options, name)
                for name in ("width", "generator_steps", "pairs", "weight", "hardness", "ramp", "floor", "lr")
            },
            "probe": {"epochs": _PROBE_EPOCHS, "rates": list(FAST_RATES)},
        },
        "stage_one": {share: {name: found[name] for name in kept} for share, found in stage_one.items()},
        "untrained": of_arm("untrained", 1.0, measure),
        "results": {f"{share:g}": {arm: of_arm(arm, share, measure) for arm in ARMS} for share in SHARES},
        "pairs": {
            f"{share:g}": {arm: of_arm(arm, share, pairs_of) for arm in ARMS if ARMS[arm][1] != "none"}
            for share in SHARES
        },
    }


def draw_accuracies(record: dict[str, Any], path: Path) -> None:
    """Draw the accuracies against the fraction of images: a point for each seed, a line for the mean."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("knn", "linear"), strict=True):
        for place, (arm, (title, _, _, colour)) in enumerate(ARMS.items()):
            found = [record["results"][f"{share:g}"][arm][name] for share in SHARES]
            places = [number + 0.07 * (place - 2) for number in range(len(SHARES))]
            axes.plot(places, [value["mean"] for value in found], color=colour, label=title, linewidth=1.5)
            for where, value in zip(places, found, strict=True):
                axes.plot([where] * len(value["values"]), value["values"], "o", color=colour, markersize=3.5)
        axes.axhline(record["untrained"][name]["mean"], color="gray", linestyle="--", label="before training")
        axes.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        axes.set_xlabel("share of the unlabelled images")
        axes.set_title(f"{MEASURES[name]}, all labels")
        axes.yaxis.set_major_locator(MultipleLocator(0.005))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
        axes.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Fashion-MNIST, {record['protocol']['steps']:,} encoder steps each")
    figure.savefig(path, dpi=110)


def draw_similarity(options: argparse.Namespace, runs: dict[tuple[str, float, int], Path], path: Path) -> None:
    """Draw the similarity of joint pairs over the steps, one panel for each fraction."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, share in zip(figure.subplots(1, len(SHARES), sharey=True), SHARES, strict=True):
        for arm, seed in product(("joint", "joint-synco"), options.seeds):
            lines = [line for line in read_metrics(runs[arm, share, seed]) if "similarity/pair" in line]
            points = [(line["step"], line["similarity/pair"]) for line in lines]
            title, _, _, colour = ARMS[arm]
            label = title if seed == options.seeds[0] else None
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.8, label=label)
        axes.axhline(options.floor, color="gray", linestyle="--", label="floor")
        axes.set_title(f"{share:.0%} of the images")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("similarity of a pair")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _cell(found: OverSeeds, *, form: str = ".1f") -> str:
    """Percent, with a sample standard deviation where there are several seeds."""
    deviation = f" ± {100 * found['deviation']:.1f}" if len(found["values"]) > 1 else ""
    return f"{100 * found['mean']:{form}}{deviation}"


def _accuracy_rows(record: dict[str, Any], name: str) -> Iterable[str]:
    for arm, (title, *_) in ARMS.items():
        cells = (_cell(record["results"][f"{share:g}"][arm][name]) for share in SHARES)
        yield f"| {title} | " + " | ".join(cells) + " |"


def _difference_rows(record: dict[str, Any]) -> Iterable[str]:
    for (name, title), (arm, than) in product(MEASURES.items(), COMPARED):
        cells = []
        for share in SHARES:
            results = record["results"][f"{share:g}"]
            pairs = zip(results[arm][name]["values"], results[than][name]["values"], strict=True)
            cells.append(_cell(over_seeds([one - other for one, other in pairs]), form="+.1f"))
        yield f"| {title} | {ARMS[arm][0]} | {ARMS[than][0]} | " + " | ".join(cells) + " |"


def _pair_rows(record: dict[str, Any]) -> Iterable[str]:
    for share, (arm, (title, pair, *_)) in product(SHARES, ARMS.items()):
        if pair == "none":
            continue
        found = {name: value["mean"] for name, value in record["pairs"][f"{share:g}"][arm].items()}
        cells = ["", "", ""]
        if pair == "joint":
            cells = [
                f"{found['similarity_first']:.3f} to {found['similarity_last']:.3f}",
                f"{found['below_floor_last']:.0%}",
                f"{found['diversity_last']:.2f}",
            ]
        yield f"| {share:.0%} | {title} | " + " | ".join(cells) + f" | {found['generators_time']:.0%} |"


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    protocol, settings, environment = record["protocol"], record["protocol"]["generated"], record["environment"]
    used, timm = ", two runs at a time, one thread each, with some other load", f"timm {environment['timm']}"
    header = "| pair | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"
    rule = "|---" * (1 + len(SHARES)) + "|"
    lines = [
        "# Fashion-MNIST: generated pairs on 10, 20 and 100 % of the unlabelled images",
        "",
        "Made by `python -m synco_fast.bench.experiments.generated_pairs`; every figure is in `record.json`.",
        "",
        f"Encoder: {protocol['backbone']}, {protocol['steps']:,} steps of {protocol['batch']} real images in every "
        "run, so a run on 10 % sees each image ten times as often. "
        f"Each step adds {settings['pairs']} generated pairs (w_syn {settings['weight']:g}). "
        f"w_hard rises to {settings['hardness']:g} over {settings['ramp']} steps, the floor is {settings['floor']:g}, "
        f"and the generators' learning rate {settings['lr']:g}. Stage one: {settings['generator_steps']:,} steps of "
        f"64 images on the same fraction, width {settings['width']}, one generator for each fraction. Synthetic "
        f"negatives: {protocol['count_scale']:g} of the published counts, from the first step. Evaluation: all 60,000 "
        "labelled images and 10,000 test images; linear probe on cached features, "
        f"{protocol['probe']['epochs']} epochs, best of eight learning rates.",
        "",
        f"Percent; mean over seeds {', '.join(map(str, record['seeds']))}, ± sample standard deviation.",
        "",
    ]
    for name, title in MEASURES.items():
        lines += [
            f"**{title}** (before training: {_cell(record['untrained'][name])})",
            "",
            header,
            rule,
            *_accuracy_rows(record, name),
            "",
        ]
    lines += [
        "**Differences at the same seed**, in percentage points:",
        "",
        "| | | minus | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---" * (3 + len(SHARES)) + "|",
        *_difference_rows(record),
        "",
        "![accuracy by fraction](accuracy.png)",
        "",
        "## The pairs",
        "",
        "Similarity of a pair in the first and the last line of the log; at the end the fraction of pairs below the "
        "floor and the diversity; and the generators' part of the step time, without the encoder's pass over the "
        "pairs.",
        "",
        "| fraction | pair | similarity | below floor | diversity | time |",
        "|---|---|---|---|---|---|",
        *_pair_rows(record),
        "",
        "![similarity over steps](similarity.png)",
        "",
        "Joint pairs after training on all images, each image next to its partner:",
        "",
        "![pairs](pairs.png)",
        "",
        "| stage one on | images | KID on " + record["stage_one"]["1"]["kid_network"] + " | diversity |",
        "|---|---|---|---|",
        *(
            f"| {float(share):.0%} | {found['images']:,} | {found['kid']:.4f} | {found['diversity']:.2f} |"
            for share, found in record["stage_one"].items()
        ),
        "",
        "The strength of the update (w_hard, floor, learning rate) and the settings of stage one were chosen by "
        "images, losses and KID of runs on 10 and 20 % with seed 0, not by accuracy.",
        "",
        f"{measured_on(environment, used, timm)}, of stage one "
        f"{record['stage_one_environment'].get('commit', 'unknown')}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the missing runs, then write the record."""
    parser = argparse.ArgumentParser(description="Record generated pairs on shares of Fashion-MNIST.")
    parser.add_argument("--data", default=FASHION_MNIST, help="an image source")
    parser.add_argument("--runs", type=Path, default=Path("runs/generated"), help="folder of the runs")
    parser.add_argument("--record", type=Path, default=Path("bench/records/generated-pairs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=930, help="encoder steps of every run")
    parser.add_argument("--warmup", type=int, default=47, help="warm-up steps of the learning rate")
    parser.add_argument("--generator_steps", type=int, default=2000, help="steps of stage one")
    parser.add_argument("--width", type=int, default=16, help="of generators and discriminator")
    parser.add_argument("--pairs", type=int, default=16, help="generated pairs a step")
    parser.add_argument("--weight", type=float, default=0.5, help="w_syn")
    parser.add_argument("--hardness", type=float, default=0.05, help="w_hard at its end")
    parser.add_argument("--ramp", type=int, default=186, help="steps over which w_hard rises")
    parser.add_argument("--floor", type=float, default=0.9, help="of a pair's similarity")
    parser.add_argument("--lr", type=float, default=2e-4, help="of generators and discriminator")
    parser.add_argument("--parallel", type=int, default=2, help="parallel runs, each on one thread")
    options = parser.parse_args()

    options.images = len(open_source(options.data).train)
    options.runs.mkdir(parents=True, exist_ok=True)
    jobs = [("untrained", 1.0, seed) for seed in options.seeds]
    jobs += [(arm, share, seed) for seed, share, arm in product(options.seeds, SHARES, ARMS)]

    def work(job: tuple[str, float, int]) -> Path:
        folder = pretrain(*job, options, steps=1 if job[0] == "untrained" else None)
        measure(folder)
        return folder

    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda share: train_generator(share, options), SHARES))
        runs = dict(zip(jobs, pool.map(work, jobs), strict=True))

    record = gather(options, runs)
    write_record(options.record, record, table(record))
    draw_accuracies(record, options.record / "accuracy.png")
    draw_similarity(options, runs, options.record / "similarity.png")
    sheets = sorted((runs["joint", 1.0, options.seeds[0]] / "plots").glob("generated-0*.png"))
    shutil.copyfile(sheets[-1], options.record / "pairs.png")


if __name__ == "__main__":
    main()
