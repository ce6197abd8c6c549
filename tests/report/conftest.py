"""A run with curves and a linear probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synco_fast.evaluation.context import Setting
from synco_fast.evaluation.linear import PUBLISHED, evaluate_linear_fast
from synco_fast.runtime.files import write_json
from tests.export.conftest import make_run

__all__ = ["make_run", "told_run"]


@pytest.fixture
def told_run(make_run):
    """A run folder as a whole run leaves it, with made-up curves."""

    def tell(
        overrides: dict[str, Any] | None = None, name: str = "run", knn: float = 0.75, probe: bool = False
    ) -> Path:
        folder = make_run(overrides, name)
        lines = []
        for step in range(1, 9):
            values = {"epoch": step / 4, "loss": 5 - step / 4, "queue_top1": step / 10, "top1": 0.0, "data_wait": 0.1}
            values |= {"images_per_second": 300.0, "similarity/positive": 0.5 + step / 20, "similarity/noisy": 0.6}
            lines.append({"kind": "train", "step": step, **values})
        lines += [{"kind": "evaluation", "step": 4 * e, "epoch": e, "knn": knn - 0.1 * (2 - e)} for e in (0, 1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"knn_before": knn - 0.2, "knn_after": knn, "chance": 1 / 3, "epochs": 2.0, "data_wait": 0.1}
        write_json(folder / "summary.json", {**summary, "images_per_second": 300.0, "source": "images"})
        if probe:
            evaluate_linear_fast(folder, Setting(workers=0), plan=replace(PUBLISHED, epochs=5))
        return folder

    return tell
