"""The launch audit of docs/training.md: the operations of one step by phase, as PyTorch dispatches them.

``python -m tests.support.launches`` writes the table anew.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from synco_fast.data.pipelines.base import Batch
from synco_fast.presets import load_config
from synco_fast.runtime.optim_step import OptimStep
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.optimizer import build_optimizer
from synco_fast.training.tuning.audit import count_operations

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- audit: python -m tests.support.launches -->\n", "<!-- end of the audit -->\n"

#: Sizes decide no count; with one group a batch norm is one operation, as on a GPU.
SMALL = {
    "training.device": "cpu",
    "training.precision": "fp32",
    "training.batch": 8,
    "augment.size": 32,
    "augment.evaluation_resize": 32,
    "model.batch_norm_groups": 1,
    "method.queue": 64,
    "method.count_scale": 1 / 64,
    "method.warmup_epochs": 0,
}


def count() -> dict[str, Counter[str]]:
    """The operations of a step of ``synco-r50-200``, with the optimizer that a GPU takes."""
    config = load_config("synco-r50-200", SMALL)
    engine = Engine(config, steps_per_epoch=4)
    cuda = torch.device("cuda")
    engine.optimizer = build_optimizer(engine.trainable, config.optimizer, lr=config.learning_rate, device=cuda)
    engine.update = OptimStep(engine.optimizer, scaled=False, clip=None, device=engine.device)
    engine.update._on_device = True
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = Batch(views[0], views[1], torch.arange(8))
    engine.step(batch, 0, 0)
    return count_operations(lambda: engine.step(batch, 1, 0))


def documented() -> dict[str, int]:
    """The table's numbers."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    return {name: int(number) for name, number, _ in rows}


def write() -> None:
    """Put the table into the page."""
    lines = ["| phase | operations | most of them |", "|---|---|---|"]
    for phase, operations in count().items():
        most = ", ".join(f"{number} `{name.removeprefix('aten::')}`" for name, number in operations.most_common(4))
        lines.append(f"| {phase} | {sum(operations.values())} | {most} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write()
