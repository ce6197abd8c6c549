"""The panels of a run's picture and of its report are the same, and mark where synthetic negatives begin."""

from itertools import groupby

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from synco_fast.data.pipelines.base import Batch
from synco_fast.training.run.plots import PANELS, draw_curves, draw_pairs, draw_panel, synthetic_start


def train(step: int, **values: float) -> dict:
    return {"kind": "train", "step": step, "epoch": step / 10, "loss": 5.0, "similarity/positive": 0.4, **values}


BEFORE = [train(step) for step in (10, 20)]
AFTER = [train(step, **{"similarity/mixed": 0.5, "similarity/hard": 0.4}) for step in (30, 40)]


def test_the_start_of_synthetic_negatives_is_found_where_there_is_one():
    assert synthetic_start([*BEFORE, *AFTER]) == 3.0
    assert synthetic_start(BEFORE) is None
    assert synthetic_start(AFTER) is None, "from the first step on"
    assert synthetic_start([]) is None


def drawn(number: int, lines: list[dict]) -> list[str]:
    axes = Figure().subplots()
    return [str(line.get_label()) for line in axes.get_lines()] if draw_panel(axes, PANELS[number], lines) else []


def test_it_is_marked_in_loss_and_hardness():
    assert drawn(0, [*BEFORE, *AFTER]) == ["loss", "synthetic negatives begin"]
    assert "synthetic negatives begin" in drawn(3, [*BEFORE, *AFTER])
    assert drawn(0, BEFORE) == ["loss"]
    assert drawn(2, BEFORE) == [], "no evaluation, no panel"


def test_top_1_with_synthetic_negatives_is_drawn_where_there_are_any():
    both = {"top1": 0.1, "queue_top1": 0.2}
    assert drawn(1, [line | both for line in BEFORE]) == ["queue alone"]
    assert drawn(1, [line | both for line in AFTER]) == ["queue alone", "all negatives"]
    assert drawn(1, [line | {"top1": 0.1} for line in BEFORE]) == ["all negatives"], "a method without a queue"


def test_a_panel_takes_its_curves_from_both_kinds_of_lines():
    evaluation = {"kind": "evaluation", "step": 20, "epoch": 2.0, "knn": 0.5, "feature_rank": 30.0}
    ranks = next(number for number, panel in enumerate(PANELS) if panel.title.startswith("effective rank"))
    assert drawn(ranks, [train(10, key_rank=12.0), evaluation]) == ["keys", "backbone features"]
    assert drawn(ranks, [train(10, key_rank=12.0)]) == ["keys"]


def test_one_curve_of_several_is_named():
    axes = Figure().subplots()
    ranks = next(panel for panel in PANELS if panel.title.startswith("effective rank"))
    assert draw_panel(axes, ranks, [train(10, key_rank=12.0)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["keys"]


def test_a_long_title_stays_in_the_picture(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **words: titles.append(text))
    draw_curves([], tmp_path / "empty.png", title="synco on /data/" + "a folder of images " * 10, chance=None)
    assert max(map(len, titles[0].splitlines())) <= 110


@pytest.mark.usefixtures("rendered")
def test_a_picture_of_everything_and_of_nothing(tmp_path):
    evaluation = {"kind": "evaluation", "step": 40, "epoch": 4.0, "knn": 0.5}
    draw_curves([*BEFORE, *AFTER, evaluation], tmp_path / "curves.png", title="cost_$5_to_$10", chance=0.1)
    draw_curves([], tmp_path / "empty.png", title="run", chance=None)
    for name in ("curves.png", "empty.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("rendered")
def test_pairs_are_told_apart_by_their_gaps(tmp_path):
    """The white gap between two pairs is several times the one between the views of a pair."""
    dark = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    draw_pairs(Batch(dark, dark.clone(), torch.arange(12)), tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    row = pixels[(pixels < 100).sum(axis=1).argmax()] > 128
    inside = [len(list(run)) for white, run in groupby(row) if white][1:-1]
    assert len(inside) == 11, "six pairs a row"
    assert min(inside[1::2]) > 4 * max(inside[::2])
