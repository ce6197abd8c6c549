"""A run looks at its own curves, and says once what it sees."""

from __future__ import annotations

import math

from rich.console import Console

from synco_fast.training.loop import Trainer
from synco_fast.training.pretraining import Curves, Pretraining


def test_curves_take_the_hard_negatives_or_else_the_keys():
    curves = Curves()
    assert not curves.add({"loss": 1.0})
    assert curves.add({"queue_top1": 0.5, "similarity/hard": 0.25, "similarity/positive": 0.75})
    assert curves.add({"queue_top1": 0.25, "similarity/hard": math.nan, "similarity/positive": 0.5})
    assert curves == Curves([0.5, 0.25], [0.25, 0.5])


def test_what_the_watch_says_first_is_shown_once(tiny, tmp_path):
    seen = []

    def watch(top1, similarity):
        seen.append((len(top1), len(similarity)))
        return "the embeddings contract" if len(top1) == 3 else None

    with (tmp_path / "screen.txt").open("w") as screen:
        console = Console(file=screen, width=200)
        Trainer(Pretraining(tiny({"training.log_every": 1}), watch=watch), tmp_path / "run", console=console).run()
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert (tmp_path / "screen.txt").read_text().count("the embeddings contract (docs/curves.md)") == 1
