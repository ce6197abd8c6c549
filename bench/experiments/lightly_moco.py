"""The record of MoCo v2 beside lightly's implementation: same views, encoder and budget, over seeds.

``python -m synco_fast.bench.experiments.lightly_moco`` trains both with each seed and writes ``record.json``, a table
and learning curves below ``bench/records/lightly``. Finished runs are not repeated. lightly (``pip install lightly``)
is needed for this record alone; without it one line says so and nothing runs.

Shared are the pipeline's views, the backbone with its initial weights, the learning rate of each step, and the kNN.
Projection head, loss, queue, EMA and the training loop are lightly's and PyTorch's. Batch norm takes the whole batch in
both, and no key is masked, since lightly has neither groups nor masks on one device.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from synco_fast.bench.experiments.common import measured_on, must, over_seeds, write_record
from synco_fast.config import Config
from synco_fast.data.pipelines.base import normalise
from synco_fast.data.sources.open import open_source
from synco_fast.evaluation.knn import periodic_knn
from synco_fast.methods.build import build_encoder
from synco_fast.presets import load_config
from synco_fast.runtime.files import read_json, write_json, write_text
from synco_fast.runtime.style import COLOURS
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.step.optimizer import learning_rate
from synco_fast.training.step.pipeline import open_pipeline

#: What both implementations can do.
_SETTINGS: dict[str, Any] = {
    "method.name": "moco",
    "method.mask_same_image": False,
    "model.batch_norm_groups": 1,
    "training.precision": "fp32",
    "training.engine": "eager",
    # A line a step: the mean over an epoch is then over the same steps as in the other loop.
    "training.log_every": 1,
    "evaluation.every": 1,
}
_TITLES = {"ours": "synco-fast", "lightly": "lightly"}


def config_of(options: argparse.Namespace, seed: int, more: dict[str, Any] | None = None) -> Config:
    """The configuration of both runs of a seed."""
    own = {**_SETTINGS, **options.set, "training.epochs": options.epochs, "seed": seed}
    return load_config(options.config, {**own, **(more or {})})


def train_ours(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """A run by ``synco-fast pretrain``, which resumes."""
    if not read_json(folder / "summary.json").get("finished"):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(config_of(options, seed).to_yaml(), encoding="utf-8")
        must("pretrain", "--config", file, "--out", folder, "--continue")
    lines = read_metrics(folder)
    knn = [line["knn"] for line in lines if line["kind"] == "evaluation"]
    losses: list[list[float]] = [[] for _ in range(options.epochs)]
    for line in lines:
        if line["kind"] == "train":
            losses[min(options.epochs - 1, int(line["epoch"] - 1e-9))].append(line["loss"])
    return {"knn": knn, "loss": [fmean(part) for part in losses]}


def train_lightly(options: argparse.Namespace, seed: int, file: Path) -> dict[str, Any]:
    """MoCo v2 as lightly's own example has it, in a plain PyTorch loop; the result is kept in ``file``."""
    found = read_json(file)
    if found:
        return found
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    config = config_of(options, seed, {"model.norm": "plain"})
    source, device, started = open_source(config.data.source, config.data.limits), torch.device("cpu"), time.monotonic()
    encoder = build_encoder(config)
    torch.manual_seed(seed)
    head = MoCoProjectionHead(encoder.features, config.model.hidden or encoder.features, config.model.dim)
    query = nn.Sequential(encoder.backbone, head)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(
        temperature=config.method.temperature, memory_bank_size=(config.method.queue, config.model.dim)
    )
    settings = config.optimizer
    optimizer = torch.optim.SGD(
        query.parameters(), lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    pipeline = open_pipeline(config, source.train, device=device, dtype=torch.float32)
    length = len(pipeline)
    total, warmup = length * config.training.epochs, round(settings.warmup_epochs * length)

    def evaluate() -> float:
        return periodic_knn(
            encoder.backbone, source, config.augment, config.evaluation, device=device, workers=0
        ).accuracy

    knn, losses = [evaluate()], []
    for epoch in range(config.training.epochs):
        query.train()
        pipeline.set_epoch(epoch)
        of_epoch = []
        for place, batch in enumerate(pipeline):
            step = epoch * length + place
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=config.learning_rate, steps=total, warmup=warmup, schedule=settings.schedule
                )
            update_momentum(query, key, m=config.model.momentum)
            q = query(normalise(batch.first, config.augment))
            with torch.no_grad():
                k = key(normalise(batch.second, config.augment))
            loss = criterion(q, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            of_epoch.append(loss.item())
        losses.append(fmean(of_epoch))
        knn.append(evaluate())
        print(f"lightly, seed {seed}: epoch {epoch + 1}, loss {losses[-1]:.3f}, kNN {knn[-1]:.1%}", flush=True)
    pipeline.close()
    result = {"knn": knn, "loss": losses, "seconds": time.monotonic() - started}
    write_json(file, result)
    return result


def draw(record: dict[str, Any], path: Path) -> None:
    """KNN and loss over epochs: the mean over seeds, and the range of the seeds as a band."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("knn", "kNN accuracy"), ("loss", "loss, mean of each epoch")), strict=True
    ):
        for who, colour in zip(_TITLES, COLOURS, strict=False):
            runs = [record["runs"][who][str(seed)][name] for seed in record["seeds"]]
            columns = list(zip(*runs, strict=True))
            epochs = range(record["epochs"] + 1 - len(columns), record["epochs"] + 1)
            axes.plot(epochs, [fmean(column) for column in columns], color=colour, marker="o", label=_TITLES[who])
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=110)


def table(record: dict[str, Any]) -> str:
    """The record as a page."""
    environment, pairs = record["environment"], record["difference"]
    threads, lightly = f", {environment['threads']} thread", f"lightly {record['lightly']}"

    def row(who: str, name: str, form: str) -> str:
        runs = [record["runs"][who][str(seed)][name] for seed in record["seeds"]]
        cells = []
        for column in zip(*runs, strict=True):
            found = over_seeds(list(column))
            cells.append(f"{found['mean']:{form}} ± {found['deviation'] or 0:{form}}")
        blank = [""] * (record["epochs"] + 1 - len(cells))
        return "| " + " | ".join([f"{_TITLES[who]}, {'kNN' if name == 'knn' else 'loss'}", *blank, *cells]) + " |"

    error = pairs["deviation"] / len(pairs["values"]) ** 0.5 if pairs["deviation"] is not None else float("nan")
    return (
        "\n".join(
            [
                "# MoCo v2: synco-fast and lightly side by side",
                "",
                f"Made by `python -m synco_fast.bench.experiments.lightly_moco {record['command']}`; the figures are "
                "in `record.json`, the whole configuration in `config.yaml`.",
                "",
                f"{record['config']}, {record['epochs']} epochs of {record['steps']} steps, seeds "
                f"{', '.join(map(str, record['seeds']))}. Views, backbone, initial backbone weights, learning "
                "rates and kNN are shared. Head, loss, queue, EMA and loop are lightly's and PyTorch's. Batch norm over"
                " the whole batch, no mask, float32. Mean and sample standard deviation over seeds.",
                "",
                "| | " + " | ".join(f"epoch {number}" for number in range(record["epochs"] + 1)) + " |",
                "|---" * (record["epochs"] + 2) + "|",
                *(row(who, "knn", ".1%") for who in _TITLES),
                *(row(who, "loss", ".3f") for who in _TITLES),
                "",
                f"Final kNN, synco-fast minus lightly at the same seed: {100 * pairs['mean']:+.1f} points, standard "
                f"error {100 * error:.1f} ({', '.join(f'{100 * value:+.1f}' for value in pairs['values'])}).",
                "",
                "![learning curves](curves.png)",
                "",
                f"{measured_on(environment, threads, lightly)}.",
            ]
        )
        + "\n"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the record."""
    parser = argparse.ArgumentParser(description="Record MoCo v2 beside lightly's: same views, encoder and budget.")
    parser.add_argument("--config", default="demo", help="a preset or YAML file")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="further settings by dotted key")
    parser.add_argument("--runs", type=Path, default=Path("runs/lightly"), help="where the runs go")
    parser.add_argument("--record", type=Path, default=Path("bench/records/lightly"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args(words)
    if importlib.util.find_spec("lightly") is None:
        print("skipped: lightly is not installed (pip install lightly)")
        return
    import lightly

    options.runs.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, Any]] = {who: {} for who in _TITLES}
    for seed in options.seeds:
        runs["lightly"][str(seed)] = train_lightly(options, seed, options.runs / f"lightly-{seed}.json")
        runs["ours"][str(seed)] = train_ours(options, seed, options.runs / f"ours-{seed}")
    config = config_of(options, options.seeds[0])
    last = [runs["ours"][str(seed)]["knn"][-1] - runs["lightly"][str(seed)]["knn"][-1] for seed in options.seeds]
    record = {
        "environment": read_json(options.runs / f"ours-{options.seeds[0]}" / "environment.json"),
        "lightly": lightly.__version__,
        "command": f"--config {options.config} --epochs {options.epochs}",
        "config": f"Configuration `{options.config}`",
        "epochs": options.epochs,
        "steps": read_json(options.runs / f"ours-{options.seeds[0]}" / "summary.json")["steps"] // options.epochs,
        "seeds": options.seeds,
        "runs": runs,
        "difference": over_seeds(last),
    }
    write_record(options.record, record, table(record))
    write_text(options.record / "config.yaml", config.to_yaml())
    draw(record, options.record / "curves.png")


if __name__ == "__main__":
    main()
