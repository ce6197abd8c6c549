"""The record of progressive resizing: images a second by side of the views, and kNN at equal time and equal epochs.

``python -m synco_fast.bench.experiments.progressive`` measures steps of ``synco-r50-fast`` at each side. Then it trains
on the demo images (and on a part of Fashion-MNIST: ``--presets demo fashion-mnist``) with views of one side and with
views that grow, over seeds. Everything runs on one thread of this process and is timed by its processor time, so that
other load on the machine counts for little. Runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from synco_fast.bench.experiments.common import FASHION_MNIST, measured_on, over_seeds, write_record
from synco_fast.config import Config
from synco_fast.data.pipelines.base import Batch
from synco_fast.evaluation.knn import periodic_knn
from synco_fast.presets import load_config
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import read_json
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer
from synco_fast.training.step.engine import Engine

_PRESET, _BATCH, _ROUNDS = "synco-r50-fast", 8, 3
_GROWING = {"augment.min_size": 16, "augment.size_step": 8}
#: By preset: what the arms of the comparison change, by title.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "32 throughout": {"training.epochs": 6},
        "growing, equal epochs": {"training.epochs": 6, **_GROWING, "augment.start_ramp": 1, "augment.end_ramp": 4},
        "growing, equal time": {"training.epochs": 7, **_GROWING, "augment.start_ramp": 2, "augment.end_ramp": 5},
    },
    "fashion-mnist": {
        "32 throughout": {"training.epochs": 4},
        "growing, equal time": {"training.epochs": 5, **_GROWING, "augment.start_ramp": 1, "augment.end_ramp": 3},
    },
}


def rates(sides: list[int]) -> dict[int, list[float]]:
    """Images per second of processor time of whole steps, by side of the views, in alternating rounds."""
    found: dict[int, list[float]] = {side: [] for side in sides}
    overrides = {
        "training.batch": _BATCH,
        "model.batch_norm_groups": 1,
        "method.queue": 4096,
        "method.warmup_epochs": 0,
    }
    engine = Engine(load_config(_PRESET, {**overrides, "training.device": "cpu"}), steps_per_epoch=1)
    for number in range(_ROUNDS + 1):
        for side in sides:
            views = torch.randint(0, 256, (2, _BATCH, 3, side, side), dtype=torch.uint8)
            begun = time.process_time()
            engine.step(Batch(views[0], views[1], torch.arange(_BATCH)), number, 0)
            if number:  # the first round fills caches
                found[side].append(_BATCH / (time.process_time() - begun))
    return found


def arm(preset: str, title: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: kNN before and after it, and the processor time of its training."""
    folder = options.runs / f"{preset}-{title.replace(',', '').replace(' ', '-')}-{seed}"
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    overrides = {"data.workers": 0, "seed": seed, "training.device": "cpu", "evaluation.every": 0}
    if preset == "fashion-mnist":
        overrides |= {"data.source": options.data, "data.fraction": options.fraction}
    config = load_config(preset, {**overrides, **ARMS[preset][title]})
    clock = {"begun": 0.0, "ended": 0.0}

    def before(run: Trainer[Any]) -> None:
        clock["begun"] = clock["begun"] or time.process_time()

    def after(run: Trainer[Any]) -> None:
        clock["ended"] = time.process_time()

    task = Pretraining(config)
    untrained = _knn(task, config)
    run = Trainer(task, folder, console=Console(quiet=True), before_step=before, after_step=after)
    summary = run.run()
    result = {
        "preset": preset,
        "title": title,
        "seed": seed,
        "epochs": config.training.epochs,
        "ramp": config.augment.ramp(config.training.epochs),
        "steps": summary.steps,
        "seconds": clock["ended"] - clock["begun"],
        "before": untrained,
        "after": _knn(task, config),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result, flush=True)
    return result


def _knn(task: Pretraining, config: Config) -> float:
    backbone = task.method.encoder.backbone
    found = periodic_knn(
        backbone, task.source, config.augment, config.evaluation, device=torch.device("cpu"), workers=0
    )
    return float(found.accuracy)


def _name(preset: str, record: dict[str, Any]) -> str:
    part = f" on {record['fraction']:.0%} of its images" if preset == "fashion-mnist" else ""
    return f"`{preset}`{part}"


def table(record: dict[str, Any]) -> str:
    """The record as a page."""
    full = statistics.median(record["rates"][str(max(map(int, record["rates"])))])
    lines = [
        "# Progressive resizing: images a second, and kNN at equal time",
        "",
        f"Made by `python -m synco_fast.bench.experiments.progressive --presets {' '.join(record['runs'])}`; the "
        "figures are in `record.json`. One thread, processor time.",
        "",
        f"Steps of `{_PRESET}` (ResNet-50, {_BATCH} images, one batch-norm group), median of {_ROUNDS} rounds:",
        "",
        "| side of the views | images/s | against the largest | pixels of the largest |",
        "|---|---|---|---|",
    ]
    largest = max(map(int, record["rates"]))
    for side, values in record["rates"].items():
        rate = statistics.median(values)
        lines.append(f"| {side} | {rate:.2f} | {rate / full:.2f}x | {(int(side) / largest) ** 2:.2f} |")
    ramp = {int(side): epochs for side, epochs in record["ramp"].items()}
    epochs = sum(ramp.values())
    spent = sum(count * full / statistics.median(record["rates"][str(side)]) for side, count in ramp.items()) / epochs
    pixels = sum(count * (side / largest) ** 2 for side, count in ramp.items()) / epochs
    lines += [
        "",
        f"The {epochs} epochs of the preset ({', '.join(f'{count} at {side}' for side, count in ramp.items())}) have "
        f"{pixels:.2f} of the pixels of {epochs} at {largest}. By these rates they take {spent:.2f} of its time.",
        "",
        "Whole runs, evaluated at 32 pixels; seconds of training; kNN as in training, mean over seeds:",
    ]
    for preset, found in record["runs"].items():
        before = ", ".join(f"{value:.1%}" for value in found["before"]["values"])
        lines += [
            "",
            f"| {_name(preset, record)} | epochs by side | steps | seconds | kNN | by seed |",
            "|---|---|---|---|---|---|",
            f"| before training | | | | {found['before']['mean']:.1%} | {before} |",
        ]
        for title, one in found["arms"].items():
            shown = ", ".join(f"{count} at {side}" for side, count in one["ramp"].items())
            values = ", ".join(f"{value:.1%}" for value in one["after"]["values"])
            cells = [title, shown, f"{one['steps']:,}", f"{one['seconds']['mean']:.0f}", f"{one['after']['mean']:.1%}"]
            lines.append(f"| {' | '.join(cells)} | {values} |")
    lines += ["", f"{measured_on(record['environment'], ' shared with other work')}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the record."""
    parser = argparse.ArgumentParser(description="Record progressive resizing: speed by side, kNN at equal time.")
    parser.add_argument("--data", default=FASHION_MNIST, help="an image source")
    parser.add_argument("--fraction", type=float, default=0.3, help="of the training images")
    parser.add_argument("--runs", type=Path, default=Path("runs/progressive"), help="where the runs go")
    parser.add_argument("--record", type=Path, default=Path("bench/records/progressive"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--presets", nargs="+", choices=list(ARMS), default=["demo"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    config = load_config(_PRESET)
    ramp = config.augment.ramp(config.training.epochs)
    measured = options.runs / "rates.json"
    if not measured.exists():
        measured.write_text(json.dumps(rates(list(ramp))), encoding="utf-8")
    found = {
        preset: {title: [arm(preset, title, seed, options) for seed in options.seeds] for title in ARMS[preset]}
        for preset in options.presets
    }
    record = {
        "environment": describe_environment(torch.device("cpu")),
        "rates": read_json(measured),
        "ramp": {str(side): epochs for side, epochs in ramp.items()},
        "fraction": options.fraction,
        "seeds": options.seeds,
        "runs": {
            preset: {
                "before": over_seeds([one["before"] for one in arms["32 throughout"]]),
                "arms": {
                    title: {
                        "ramp": runs[0]["ramp"],
                        "steps": runs[0]["steps"],
                        "seconds": over_seeds([one["seconds"] for one in runs]),
                        "after": over_seeds([one["after"] for one in runs]),
                    }
                    for title, runs in arms.items()
                },
            }
            for preset, arms in found.items()
        },
    }
    write_record(options.record, record, table(record))


if __name__ == "__main__":
    main()
