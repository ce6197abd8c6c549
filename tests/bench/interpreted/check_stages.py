from __future__ import annotations

import pytest
import torch

from synco_fast.bench import stages
from synco_fast.bench.launches import recorded, time_launches
from synco_fast.bench.loss import Shape, bare
from synco_fast.bench.variants import _agree, _outputs, applied, variants_of
from synco_fast.kernels.triton import config
from tests.support.rotation import todays

CPU = torch.device("cpu")
SMALL = Shape(2, 300, 64, 20, synthetic=12)


def compared(shape=SMALL, tied=False):
    lines = []
    right = stages.check_stages(shape, CPU, lines.append, tied=tied, repeats=1)
    return right, lines


@pytest.mark.parametrize("dtype", todays(["float32", "bfloat16", "float16"]))
def test_every_launch_is_right(dtype):
    right, lines = compared(Shape(3, 300, 48, 20, dtype, 60))
    assert right, [line for line in lines if line.get("wrong")]
    made = [line["launch"] for line in lines if "launch" in line]
    assert [line["stage"] for line in lines if "stage" in line] == [*made, "repeats"]
    assert set(made) <= set(stages.CHECKS), "each has a comparison"


def test_the_slow_way_is_right_and_a_wrong_one_is_named(monkeypatch):
    right, lines = compared(tied=True)
    assert right, [line for line in lines if line.get("wrong")]
    left = [line["rows left"] for line in lines if line.get("stage") == "select"]
    assert left == [SMALL.rows], "every row was flagged"
    for name, spoil in (
        ("fill", lambda a: a["p_room"].add_(1 << 20)),
        ("choose", lambda a: a["p_hard"][:, -1].add_(1)),
    ):
        check = stages.CHECKS[name]

        def spoilt(arguments, expected, check=check, spoil=spoil):
            spoil(arguments)
            return check(arguments, expected)

        with monkeypatch.context() as patch:
            patch.setitem(stages.CHECKS, name, spoilt)
            right, lines = compared(tied=True)
        assert not right
        assert next(line["stage"] for line in lines if line.get("wrong")) == name


SPOILT = {
    "sample": lambda a: a["p_sample"].view(-1)[1:2].add_(0.01),
    "rank": lambda a: a["p_shift"].add_(0.01),
    "scan": lambda a: a["p_sum"].mul_(1.001),
    "mix": lambda a: a["p_total"].mul_(1.01),
    "reduce": lambda a: a["p_loss"].add_(1e-3),
    "select": lambda a: a["p_hard"][:, 0].add_(1),
}


@pytest.mark.parametrize("name", todays(list(SPOILT), 2))
def test_a_wrong_launch_is_named(name, monkeypatch):
    check = stages.CHECKS[name]

    def spoilt(arguments, expected):
        SPOILT[name](arguments)
        return check(arguments, expected)

    monkeypatch.setitem(stages.CHECKS, name, spoilt)
    right, lines = compared()
    assert not right
    wrong = [line["stage"] for line in lines if line.get("wrong")]
    assert wrong[0] == name


def test_launches_are_recorded_and_timed_one_by_one():
    run = bare("triton", SMALL, CPU)
    names = [one.name for one in recorded(run)]
    assert names[0] == "sample"
    assert names[-1] == "reduce"
    found = time_launches(run, CPU, repeats=1)
    assert [line["launch"] for line in found] == names
    assert all(line["microseconds"] > 0 for line in found)


def test_variants_give_the_same_and_leave_nothing_behind():
    before = dict(config.MIXES)
    expected = _outputs(SMALL, CPU)
    variants = [variant for variant in variants_of(SMALL, CPU) if variant.holder is config.MIXES]
    assert variants
    with applied(variants[0]):
        assert before != config.MIXES
        assert _agree(_outputs(SMALL, CPU), expected)
    assert before == config.MIXES
    wrong = tuple(tensor + 1 if tensor.is_floating_point() else tensor for tensor in expected)
    assert not _agree(wrong, expected)
