"""``synco-fast evaluate detection``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.console import Console

from synco_fast.commands.options import (
    add_eval_options,
    add_options,
    check_ranges,
    eval_options,
    load_torch,
    print_result,
)
from synco_fast.commands.parser import Commands

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast evaluate detection``."""
    command = commands.add(
        "evaluate detection",
        _evaluate_detection,
        "Fine-tune torchvision's Faster R-CNN (with masks: Mask R-CNN) on the backbone and report average precision.",
        "torchrun --nproc-per-node 8 -m synco_fast evaluate detection runs/synco-r50-200 --data voc:/data/voc",
        joint=True,
    )
    add_eval_options(command, "voc:FOLDER or coco:FOLDER; must be given")
    command.add_argument("--steps", type=int, help="iterations; 24000 for VOC, 180000 for COCO by default")
    command.add_argument("--batch", type=int, help="images per step over all processes, 16 by default")
    command.add_argument("--lr", type=float, help="learning rate, 0.02 by default")
    command.add_argument("--size", type=int, help="short side of every image; 800, and several in training, by default")
    command.add_argument("--freeze", action="store_true", help="freeze the backbone")
    add_options(command, "seed")
    command.set_defaults(check=_check)


def _check(options: argparse.Namespace) -> str:
    """Check source and ranges of the options; the name of the result."""
    from synco_fast.runtime.errors import ConfigError

    layout, colon, _ = (options.data or "").partition(":")
    if layout not in ("voc", "coco") or not colon:
        raise ConfigError(f"data: found {options.data or 'none'}, expected voc:FOLDER or coco:FOLDER")
    check_ranges(options, steps=0, batch=0, lr=0, size=0)
    return f"detection_{layout}"


def _evaluate_detection(options: argparse.Namespace, console: Console) -> int:
    given = check_ranges(options, steps=0, batch=0, lr=0, size=0)
    load_torch(console)
    from synco_fast.evaluation.detection.finetune import evaluate_detection, published_protocol

    protocol = published_protocol(options.data.partition(":")[0])
    if "steps" in given:
        share = given["steps"] / protocol.steps
        drops = tuple(round(share * drop) for drop in protocol.drops)
        protocol = replace(protocol, drops=drops, warmup=min(protocol.warmup, given["steps"] // 10))
    if "size" in given:
        protocol = replace(protocol, sizes=(given["size"],))
    protocol = replace(protocol, **given, freeze=options.freeze, seed=options.seed)
    result = evaluate_detection(options.checkpoint, eval_options(options), protocol=protocol, console=console)
    rows = [
        ("detector", result["detector"]),
        ("trained on", f"{result['train_set']}, {result['train_images']:,} images"),
        ("tested on", f"{result['test_set']}, {result['test_images']:,} images"),
        ("average precision", f"as of {result['metric']}, over overlaps from 0.5 to 0.95"),
        ("iterations, batch, lr", f"{protocol.steps:,}, {protocol.batch}, {protocol.lr:g}"),
    ]
    print_result(result, options, console, rows, chance="AP before training")
    return 0
