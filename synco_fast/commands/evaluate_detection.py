"""``synco-fast evaluate detection``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from synco_fast.commands.options import add_setting, print_result, setting_of
from synco_fast.commands.parser import Verbs

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast evaluate detection``."""
    command = verbs.add(
        "evaluate detection",
        _evaluate_detection,
        "COCO metrics of torchvision's Faster R-CNN (with masks: Mask R-CNN) fine-tuned on the backbone.",
        "torchrun --nproc-per-node 8 -m synco_fast evaluate detection runs/synco-r50-200 --data voc:/data/voc",
    )
    add_setting(command)
    command.add_argument("--steps", type=int, help="iterations: 24000 for VOC, 180000 for COCO by default")
    command.add_argument("--batch", type=int, help="images a step over all processes, 16 by default")
    command.add_argument("--lr", type=float, help="0.02 by default")
    command.add_argument("--size", type=int, help="short side of every image; 800, and several in training, by default")
    command.add_argument("--freeze", action="store_true", help="the backbone stays as it is")
    command.add_argument("--seed", type=int, default=0)


def _evaluate_detection(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.detection.finetune import evaluate_detection, published_plan
    from synco_fast.runtime.errors import ConfigError

    given = {name: getattr(options, name) for name in ("steps", "batch", "lr", "size")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"{name}: found {value}, expected above 0")
    plan = published_plan("voc" if (options.data or "").startswith("voc:") else "coco")
    if "steps" in given:
        share = given["steps"] / plan.steps
        drops, warmup = tuple(round(share * drop) for drop in plan.drops), min(plan.warmup, given["steps"] // 10)
        plan = replace(plan, drops=drops, warmup=warmup)
    if "size" in given:
        plan = replace(plan, sizes=(given["size"],))
    plan = replace(plan, **given, freeze=options.freeze, seed=options.seed)
    result = evaluate_detection(options.checkpoint, setting_of(options), plan=plan, console=console)
    rows = [
        ("detector", result["detector"]),
        ("images", f"{result['train_images']:,} to train on, {result['test_images']:,} to test on"),
        ("iterations, batch, lr", f"{plan.steps:,}, {plan.batch}, {plan.lr:g}"),
    ]
    print_result(result, options, console, rows)
    return 0
