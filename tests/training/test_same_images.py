"""Ranks, and a resumed run, whose images differ."""

import re
from copy import deepcopy
from pathlib import Path

import pytest

from synco_fast.data.sources.check import keep_list
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.stream import StreamSettings
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import DataError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.same_images import SameImages


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Ranks(HostGroup):
    """The last rank of a job, and what the others say; None is the same."""

    def __init__(self, others):
        super().__init__(DistEnv())
        self.env, self.others = DistEnv(len(others), len(others) + 1), others

    def gather(self, value):
        return [*(value if other is None else other for other in self.others), value]


def test_ranks_with_other_images_end_with_one_line(image_folder):
    split = open_source(str(image_folder)).train
    same = SameImages(split, "folder", Ranks([None, None]))
    assert same.number == 33
    assert same.changes_since(None, Path("step-3.pt")) is None, "an older version kept no digest"
    more, less = (33, "a"), (32, "b")
    for others, says in (
        ([None, less], "33 on ranks 0, 2, 32 on rank 1"),
        ([less, less, less, None, less, None], "32 on ranks 0-2, 4, 33 on ranks 3, 5-6"),
        ([more], "33 on rank 0, 33 others on rank 1"),
        ([(number, "c") for number in range(6)], "0 on rank 0, 1 on rank 1, 2 on rank 2, 3 on rank 3, ..."),
    ):
        with pytest.raises(DataError) as caught:
            SameImages(split, "folder", Ranks(others))
        assert re.fullmatch(
            rf"data: found different training images: {re.escape(says)}, expected the same on every rank; run "
            r"'synco-fast data check folder' on each machine, or remove .*/synco-fast/lists there",
            str(caught.value),
        )


def test_a_rank_that_does_not_know_how_many_ends_the_others_too(image_folder):
    split = open_source(f"stream:{image_folder}/a.tar", stream=StreamSettings()).train
    with pytest.raises(DataError, match=r"^data\.images: found none and no index .*keeps the number \(rank 1\)$"):
        SameImages(split, "stream", Ranks([(33, "a")]))


def test_a_resumed_run_says_that_its_images_changed(tiny, image_folder):
    """Another image for one of them, then one less; and nothing for a checkpoint of an older version."""
    state = {"step": 3, **Pretraining(tiny()).state_dict()}

    def said(state):
        task = Pretraining(tiny())
        task.load_state_dict(deepcopy(state), Path("step-3.pt"))
        lines = []
        task.note.show_by(lambda line, style: lines.append(line))
        return [line for line in lines if "training images" in line]

    assert said(state) == []
    images = image_folder / "train" / "class1"
    (images / "3.jpg").rename(images / "new.jpg")
    ends = "; from here on the run differs from one that never stopped"
    assert said(state) == [f"the training images changed since step-3.pt: 33 then, 33 others{ends}"]
    keep_list(open_source(str(image_folder)).train, {4: "it is corrupt"})
    assert said(state) == [f"the training images changed since step-3.pt: 33 then, 32 now{ends}"]
    del state["training_images"]
    assert said(state) == []
