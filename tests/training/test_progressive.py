"""Progressive resizing: the side of the views by epoch, in the steps, the figures, the engines and a resumed run."""

from __future__ import annotations

import json

import pytest
import torch

from synco_fast.config import build_config
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch
from synco_fast.export.save import export_checkpoint
from synco_fast.methods.base import StepInputs
from synco_fast.presets import load_config
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import ConfigError
from synco_fast.training.run import throughput
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.throughput import Throughput
from synco_fast.training.step import forms
from synco_fast.training.step.compiled import GRAPH_WARMUP, Compiled, GraphedStep, allow_shapes
from synco_fast.training.step.engine import Engine
from synco_fast.training.tuning import trials
from synco_fast.training.tuning.trials import try_largest

from ..support.graphs import Graph, stand_in
from ..support.training import assert_identical, figures, newest, pretrain, stop_after, trainer

#: Sides 16, 24, 24, 32 over four epochs of four steps.
GROWING = {
    "augment.min_size": 16,
    "augment.size_step": 8,
    "augment.start_ramp": 0,
    "augment.end_ramp": 3,
    "training.epochs": 4,
    "evaluation.every": 2,
}


def sizes(epochs, **fields):
    recipe = Recipe(**fields)
    return [recipe.size_at(epoch) for epoch in range(epochs)]


def test_the_side_rises_along_the_ramp_in_multiples_as_in_ffcv():
    found = sizes(100, size=224, min_size=128, start_ramp=60, end_ramp=80)
    assert found[:61] == [128] * 61
    assert found[80:] == [224] * 20
    exact = [128 + 96 * (epoch - 60) / 20 for epoch in range(60, 81)]
    assert all(size % 32 == 0 and abs(size - x) <= 16 for size, x in zip(found[60:81], exact, strict=True))
    assert found == sorted(found)
    recipe = Recipe(size=224, min_size=128, start_ramp=60, end_ramp=80)
    assert recipe.ramp(100) == {128: 64, 160: 6, 192: 7, 224: 23}
    assert recipe.grows
    assert (recipe.at(70).size, recipe.at(70).grows, recipe.at(70).blur_sigma) == (192, False, recipe.blur_sigma)
    assert recipe.resize == 256, "an evaluation has the size of the end"


def test_ends_that_are_no_multiple_are_kept_and_no_ramp_is_one_side():
    assert sizes(4, size=100, min_size=50, start_ramp=0, end_ramp=3) == [50, 64, 96, 100]
    assert sizes(3, size=100, min_size=90, start_ramp=0, end_ramp=2) == [90, 96, 100]
    assert sizes(3, size=40) == sizes(3, size=40, min_size=40) == [40, 40, 40]
    assert Recipe(size=40).at(3) == Recipe(size=40)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"augment.min_size": 256}, "augment.min_size: found 256, expected up to 224 (size)"),
        ({"augment.min_size": 128, "augment.start_ramp": 9, "augment.end_ramp": 9}, "augment.start_ramp: found 9"),
        (
            {"augment.min_size": 128, "augment.end_ramp": 200},
            "augment.end_ramp: found 200, expected below 200 (training.epochs), or augment.min_size null",
        ),
        ({"augment.min_size": 128, "augment.size_step": 0}, "augment.size_step: found 0, expected 1 to 1,024"),
    ],
)
def test_a_ramp_that_cannot_be_is_named_in_one_line(overrides, says):
    with pytest.raises(ConfigError) as caught:
        build_config({}, overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_size_that_the_network_cannot_take_is_refused_at_the_start(tiny):
    vit = {"model.backbone": "timm/vit_tiny_patch16_224", "model.backbone_args": {"img_size": 32, "depth": 1}}
    with pytest.raises(ConfigError, match=r"augment\.min_size: found 16, which timm/vit_tiny_patch16_224"):
        Engine(tiny({**GROWING, **vit}), 4)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_grows_and_one_that_is_stopped_within_the_ramp_is_never_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("synco_fast.training.step.engine._SETTLING_STEPS", 0)
    short = {"training.epochs": 3, "augment.end_ramp": 2, "training.batch": 16, "evaluation.every": 0}
    config, seen, side = tiny({**GROWING, **short}), [], [16, 16, 24, 24, 32, 32]
    whole = pretrain(config, tmp_path / "whole")
    assert not trainer(config, tmp_path / "parts", after_step=stop_after(3)).run().finished
    again = trainer(config, tmp_path / "parts", resume=tmp_path / "parts")
    step = again.task.train_step
    again.task.train_step = lambda batch, number: (seen.append((number, batch.first.shape[-1])), step(batch, number))
    assert again.run().finished
    assert seen == [(number, side[number]) for number in range(3, 6)]
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert [line["view_size"] for line in read_metrics(tmp_path / "whole")] == side
    shown = (tmp_path / "whole" / "screen.txt").read_text()
    assert shown.count("views of 24 pixels") == shown.count("epoch 2: views of 24 pixels") == 1
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert whole.images_per_second_by_size == summary["images_per_second_by_size"]
    assert list(whole.images_per_second_by_size) == ["16", "24", "32"]


def test_the_bar_shows_the_side(tiny, tmp_path):
    run = trainer(tiny(GROWING), tmp_path / "run")
    assert [run.task.title(step) for step in (0, 4, 15)] == ["epoch 1/4, 16 px", "epoch 2/4, 24 px", "epoch 4/4, 32 px"]
    run.task.close()


def test_a_fixed_side_is_said_nowhere(tiny, tmp_path):
    summary = pretrain(tiny({"training.max_steps": 2, "evaluation.every": 0}), tmp_path / "run")
    assert summary.images_per_second_by_size == {}
    assert "view_size" not in read_metrics(tmp_path / "run")[0]
    assert "pixels" not in (tmp_path / "run" / "screen.txt").read_text()


def test_throughput_is_told_by_side_and_settles_after_a_change(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    speed = Throughput(batch=8, settle=1)
    for size, seconds in ((16, 1), (16, 1), (32, 4)):
        speed.begin(size)
        for _ in range(3):
            now[0] += seconds
            speed.step()
        speed.pop()
    assert speed.by_size == {16: (5.0, 40), 32: (8.0, 16)}, "the first step of each side compiles"
    assert speed.images_per_second_by_size == {"16": 8, "32": 2}
    other = Throughput(8, 1)
    other.load_state_dict(speed.state_dict())
    assert other.by_size == speed.by_size


# -- the engines ------------------------------------------------------------------------------------------------------


def test_a_graph_is_captured_anew_for_views_of_another_side(monkeypatch):
    pools = iter(range(9))
    stand_in(monkeypatch, graph_pool_handle=lambda: next(pools))
    seen, captured = [], []

    def compute(inputs, step, key, momentum):
        if Graph.capturing is None:
            seen.append((int(step), inputs.queries[0].shape[0]))
        else:
            captured.append(inputs.queries[0].shape[0])
            Graph.capturing.replay = lambda: seen.append((int(step), inputs.queries[0].shape[0]))

    run = GraphedStep(compute, torch.device("cpu"), lambda line: None)
    side = [2] * (GRAPH_WARMUP + 2) + [3] * (GRAPH_WARMUP + 2)
    for number, size in enumerate(side):
        one = torch.full((size,), float(number))
        run(StepInputs((one,), (one,), (), torch.tensor([number])), number, 0, 0.9)
    assert seen == list(enumerate(side))
    assert captured == [2, 3], "once each, after as many eager steps"
    assert next(pools) == 2, "a pool of memory for each"


def test_a_step_is_compiled_for_every_side(monkeypatch):
    from torch._dynamo import config as dynamo

    compiled, sides = [], 4
    monkeypatch.setattr("synco_fast.training.step.compiled.BACKEND", lambda graph, inputs: compiled.append(1) or graph)
    monkeypatch.setattr("synco_fast.training.step.compiled._CODE_PER_SHAPE", 1)
    torch._dynamo.reset()
    notes = []
    # Not by `monkeypatch`, which would delete the setting afterwards.
    with dynamo.patch(recompile_limit=2):
        allow_shapes(sides)
        double = Compiled(lambda x: x * 2, "the encoder", notes.append)
        for side in range(2, 2 + sides):
            assert torch.equal(double(torch.ones(side)), torch.full((side,), 2.0))
    torch._dynamo.reset()
    assert (len(compiled), notes) == (sides, [])


def test_the_norm_is_validated_at_every_side(tiny):
    layers = forms._shapes(Engine(tiny(GROWING), 4))["norm"]["layers"]
    assert {8, 6, 4} <= {layer[1] for layer in layers}
    assert {layer[1] for layer in forms._shapes(Engine(tiny(), 4))["norm"]["layers"]}.isdisjoint({6})


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(trials, "_is_gpu", lambda engine: True)


def test_the_largest_step_is_tried_before_the_first_one_and_leaves_no_trace(tiny, as_if_on_a_gpu):
    engine, plain = (Engine(tiny(GROWING), 4) for _ in range(2))
    before, sides, step = {k: v.clone() for k, v in engine.method.state_dict().items()}, [], engine.step

    def watched(batch, number, epoch):
        sides.append((batch.first.shape[-1], epoch))
        step(batch, number, epoch)

    engine.step = watched
    try_largest(engine, 0)
    assert set(sides) == {(32, 3)}
    assert all(torch.equal(value, before[name]) for name, value in engine.method.state_dict().items())
    batch = Batch(*torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8), torch.arange(8))
    for one in (engine, plain):
        one.step(batch, 0, 0)
    assert engine.replica_hash() == plain.replica_hash()


def test_too_little_memory_for_the_largest_step_is_one_line_at_the_start(tiny, as_if_on_a_gpu, monkeypatch):
    def full(self, batch, step, epoch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(tiny(GROWING), 4)
    monkeypatch.setattr(Engine, "step", full)
    with pytest.raises(ConfigError, match=r"augment\.size: found 32, expected less: a step at that size"):
        try_largest(engine, 0)


def test_nothing_is_tried_on_a_cpu_or_with_one_side(tiny, monkeypatch):
    monkeypatch.setattr(Engine, "step", None)
    try_largest(Engine(tiny(GROWING), 4), 0)
    monkeypatch.setattr(trials, "_is_gpu", lambda engine: True)
    try_largest(Engine(tiny(), 4), 0)


def test_auto_measures_at_the_full_size(tiny, monkeypatch, tmp_path):
    from synco_fast.training import pretraining
    from synco_fast.training.tuning import autotune

    sides = []
    monkeypatch.setattr(autotune, "MIN_STEPS", 1)
    monkeypatch.setattr(
        autotune,
        "try_engines",
        lambda engine, names, batches, *rest, **more: (
            sides.extend(batch.first.shape[-1] for batch in batches) or [trials.EngineTrial("eager", 1.0)]
        ),
    )
    task = pretraining.Pretraining(tiny({**GROWING, "data.pipeline": "torchvision"}), control=HostGroup(DistEnv()))
    task.begin(tmp_path, fresh=True)
    (tmp_path / "plots").mkdir()
    (tmp_path / "environment.json").write_text("{}")
    first = next(iter(task.batches(0)))
    task.close()
    assert sides == [32] * 4
    assert first.first.shape[-1] == 16


# -- what stands where ------------------------------------------------------------------------------------------------


def test_generated_pairs_have_one_size(tiny):
    with pytest.raises(ConfigError, match=r"augment\.min_size: found 16, expected null with generated pairs"):
        tiny({**GROWING, "generated.pair": "joint"})


def test_the_model_card_states_the_sides(make_run):
    run = make_run(GROWING)
    export_checkpoint(run, "safetensors")
    card = (run / "export" / "safetensors" / "README.md").read_text()
    assert "| views in training | 1 epochs of 16 pixels, 2 epochs of 24 pixels, 1 epochs of 32 pixels |" in card
    assert "central crop of 32" in card


def test_the_preset_saves_pixels_by_its_ramp():
    config, plain = load_config("synco-r50-fast"), load_config("synco-r50-200")
    assert config.method == plain.method
    assert config.training == plain.training
    ramp = config.augment.ramp(config.training.epochs)
    assert sum(ramp.values()) == 200
    assert (min(ramp), max(ramp)) == (128, 224)
    share = sum(epochs * (size / 224) ** 2 for size, epochs in ramp.items()) / 200
    assert share == pytest.approx(0.55, abs=0.01), "docs/training.md states it"
