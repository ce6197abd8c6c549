"""What ``auto`` stands for: measured in a long run, without a trace in what is trained, and kept on resume."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest
import torch

from synco_fast.data.pipelines import build
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.build import pipelines_for
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import DataError
from synco_fast.runtime.optim_step import OptimStep
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.step import engine as engine_module
from synco_fast.training.step.engine import Engine
from synco_fast.training.tuning import autotune, trials
from synco_fast.training.tuning.autotune import Auto, fastest
from synco_fast.training.tuning.trials import EngineTrial, trial, try_engines, try_pipeline

from ..support.training import assert_identical, figures, flat, newest, pretrain, stop_after, trainer

ALONE = HostGroup(DistEnv())
ENGINE_ALONE = {"data.pipeline": "torchvision", "evaluation.every": 0}


class Fake:
    """In the place of torch.compile's wrapper: the function itself, or something wrong with it."""

    wrong = ""

    def __init__(self, function, title, note):
        self.function, self.title, self.note, self.works = function, title, note, True

    def __call__(self, views):
        if self.wrong == "fails" and self.works:
            self.note(f"torch.compile failed for {self.title}; running it eagerly: no")
            self.works = False
        if self.wrong == "raises":
            raise ValueError("out of luck\nand more")
        found = self.function(views)
        if self.wrong == "weights" and found.requires_grad:
            found.register_hook(lambda gradient: -gradient)
        return found.roll(1, 0) if self.wrong == "losses" else found


@pytest.fixture
def fake(monkeypatch):
    """Runs of any length measure, without a clock: the fake compiled engine takes half of eager's time."""
    monkeypatch.setattr(engine_module, "Compiled", Fake)
    monkeypatch.setattr(Fake, "wrong", "")
    monkeypatch.setattr(autotune, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(autotune, "MIN_STEPS", 1)
    monkeypatch.setattr(autotune, "COMPILE_PAYS", 0.0)

    def timed(engine, batches, steps, step, epoch):
        for number in range(3):
            engine.step(batches[number % len(batches)], step + number, epoch)
        return [0.5 if engine.form == "compile" else 1.0]

    monkeypatch.setattr(trials, "_timed", timed)
    return Fake


def table(folder):
    return json.loads((folder / "engines.json").read_text())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("raises", "ValueError: out of luck"),
        ("losses", "its losses are"),
        ("weights", "its weights are"),
    ],
)
def test_what_fails_or_computes_something_else_is_out(tiny, fake, monkeypatch, wrong, says):
    monkeypatch.setattr(fake, "wrong", wrong)
    # Steps so small that a wrong gradient is in the weights before it is in the losses.
    engine = Engine(tiny({"optimizer.lr": 1e-6}), 4)
    eager, compiled = try_engines(engine, ["eager", "compile"], [batch(0), batch(1)], ALONE, step=4, epoch=1)
    assert (eager.reason, eager.seconds, compiled.seconds) == (None, 1.0, None)
    assert says in compiled.reason
    assert "\n" not in compiled.reason
    assert engine.form == "eager"


def test_auto_that_ends_at_eager_is_eager_to_the_bit(tiny, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "wrong", "fails")
    for name, engine in (("auto", "auto"), ("eager", "eager")):
        pretrain(tiny({**ENGINE_ALONE, "training.engine": engine, "training.max_steps": 6}), tmp_path / name)
    assert_identical(newest(tmp_path / "auto"), newest(tmp_path / "eager"), without=("/config/training", "/chosen"))
    assert figures(tmp_path / "auto") == figures(tmp_path / "eager")
    assert newest(tmp_path / "auto")["chosen"] == {"engine": "eager"}
    assert newest(tmp_path / "eager")["chosen"] == {}
    assert not (tmp_path / "eager" / "engines.json").exists()
    found = table(tmp_path / "auto")
    assert (found["engine"], found["pipeline"], found["need"]) == ("eager", "torchvision", 8)
    rows = {row["engine"]: row for row in found["engines"]}
    assert rows["eager"]["reason"] is None
    assert rows["graph"]["reason"] == rows["compile+graph"]["reason"] == "no GPU"
    assert rows["compile"]["reason"] == "torch.compile failed for the query encoder; running it eagerly: no"
    said = (tmp_path / "auto" / "screen.txt").read_text()
    assert said.count("engine eager: eager 8, compile out (") == 1


def test_the_fastest_is_taken_and_kept_on_resume(tiny, tmp_path, fake, monkeypatch):
    config = tiny({**ENGINE_ALONE, "training.max_steps": 6})
    pretrain(config, tmp_path / "whole")
    assert "engine compile: compile 16, eager 8, graph out (no GPU)" in (tmp_path / "whole" / "screen.txt").read_text()
    trainer(config, tmp_path / "parts", after_step=stop_after(3)).run()
    assert newest(tmp_path / "parts")["chosen"] == {"engine": "compile"}
    for file in ("environment.json", "summary.json"):
        assert json.loads((tmp_path / "whole" / file).read_text())["forms"]["engine"]["name"] == "compile"
    monkeypatch.setattr(autotune, "try_engines", None)  # the choice is in the checkpoint
    run = trainer(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert run.task.engine.form == "compile"
    run.run()
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    # Whoever names an engine gets it, on resume as well.
    named = trainer(tiny({**ENGINE_ALONE, "training.engine": "eager"}), tmp_path / "parts", resume=tmp_path / "parts")
    assert named.task.engine.form == "eager"
    named.task.close()


def test_a_short_run_measures_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "try_engines", None)
    auto = Pretraining(tiny())._auto
    assert auto.state_dict() == {"chosen": None}
    auto.settle(autotune.MIN_STEPS - 1, tmp_path)
    assert auto.state_dict() == {"chosen": {"engine": "eager", "pipeline": "torchvision"}}
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    ("steps", "device", "engine_open", "scope"),
    [
        (autotune.MIN_STEPS, "cpu", False, "all"),
        (autotune.MIN_STEPS - 1, "cpu", True, None),
        (autotune.MIN_STEPS - 1, "cuda", True, "graph"),
        (autotune.MIN_GRAPH_STEPS, "cuda", True, "graph"),
        (autotune.MIN_GRAPH_STEPS, "cuda", False, None),
        (autotune.MIN_GRAPH_STEPS - 1, "cuda", True, None),
    ],
)
def test_a_shorter_run_on_a_gpu_tries_only_the_graph(steps, device, engine_open, scope):
    assert autotune.scope_of(steps, torch.device(device), engine_open=engine_open) == scope


def test_a_short_measurement_neither_compiles_nor_takes_long(tiny, tmp_path, fake, monkeypatch):
    tried = []

    def try_engines(engine, names, *rest, seconds, **more):
        tried.append((list(names), seconds))
        return [EngineTrial("eager", 1.0)]

    monkeypatch.setattr(autotune, "try_engines", try_engines)
    task = Pretraining(tiny(ENGINE_ALONE))
    task._auto._measure([task._auto.name], 300, tmp_path, short=True)
    assert tried == [(["eager"], autotune._GRAPH_SECONDS)]
    rows = {row["engine"]: row["reason"] for row in table(tmp_path)["engines"]}
    assert rows["compile"] == "the run is too short to compile for"
    task.close()


def test_compiling_on_a_cpu_must_pay(tiny, tmp_path, fake, monkeypatch):
    """Eager takes a second a step by the fake clock: 59 minutes are too few, 61 are not."""
    monkeypatch.setattr(autotune, "COMPILE_PAYS", 3600.0)
    for steps, chosen in ((59 * 60, "eager"), (61 * 60, "compile")):
        task = Pretraining(tiny(ENGINE_ALONE))
        task._auto.settle(steps, tmp_path)
        rows = {row["engine"]: row["reason"] for row in table(tmp_path)["engines"]}
        assert rows["compile"] == ("the run is too short to compile for" if chosen == "eager" else None)
        assert task.engine.form == chosen
        task.close()


def test_less_than_noise_changes_nothing():
    def rows(eager, other, **more):
        return [EngineTrial("eager", eager), EngineTrial("compile", other, **more)]

    assert fastest(rows(1.0, 0.98)) == "eager"
    assert fastest(rows(1.0, 0.96)) == "compile"
    assert fastest(rows(1.0, 0.5, reason="no")) == "eager"
    assert fastest(rows(None, 0.5)) == "eager"
    assert fastest([*rows(1.0, 0.9), EngineTrial("graph", 0.8)]) == "graph"


def batch(number):
    generator = torch.Generator().manual_seed(number)
    first, second = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(first, second, torch.arange(8) + 8 * number)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
def test_a_trial_leaves_no_trace(tiny, optimizer):
    """Before the first step, and in the middle: weights, queue, optimizer, counters, metrics, random numbers."""
    engine = Engine(tiny({"optimizer.name": optimizer, "optimizer.lr": 0.1}), 4)

    def state():
        return flat([engine.state_dict(), torch.get_rng_state(), random.getstate()])

    for step in range(2):
        before = {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in state().items()}
        with trial(engine):
            for number in range(3):
                engine.step(batch(number), number, 1)
            engine.means.pop()
            torch.rand(3)
        # Of synthetic negatives that no row met, the metric is NaN.
        assert_identical(before, state(), without=("//0/means/sums/similarity",))
        engine.step(batch(step), step, 0)
    assert all(parameter.grad is not None for parameter in engine.trainable.parameters())


def test_what_disagrees_or_fails_on_another_process_is_out(tiny, fake):
    class Other(HostGroup):
        asked = 0

        def max(self, *numbers):
            self.asked += 1
            return (1,) if self.asked == 4 else numbers  # the second engine's turn, after three questions about eager

    found = try_engines(
        Engine(tiny(), 4), ["eager", "compile"], [batch(0), batch(1)], Other(DistEnv()), step=4, epoch=1
    )
    assert [each.reason for each in found] == [None, "another process refused it"]


class Made:
    """A pipeline that is only closed."""

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("rates", "taken", "tried"),
    [
        ({"torchvision": 98.0}, "torchvision", ["torchvision"]),
        ({"torchvision": 50.0, "dali": 97.5, "resident": 0.0}, "dali", ["torchvision", "dali"]),
        ({"torchvision": 50.0, "dali": 40.0, "resident": 60.0}, "resident", ["torchvision", "dali", "resident"]),
        ({"torchvision": 50.0, "dali": 40.0, "resident": None}, "torchvision", ["torchvision", "dali", "resident"]),
        ({"torchvision": 20.0, "dali": 40.0, "resident": 30.0}, "dali", ["torchvision", "dali", "resident"]),
    ],
)
def test_the_need_of_the_step_decides_which_pipeline_serves(tiny, monkeypatch, rates, taken, tried):
    task = Pretraining(tiny())
    auto, made = task._auto, {}
    auto.pipeline.close()

    def build(name):
        if rates[name] is None:
            raise DataError("data.pipeline: found too much")
        made[name] = Made()
        return made[name]

    monkeypatch.setattr(auto, "_build", build)
    auto.name, auto.pipeline = "torchvision", build("torchvision")
    monkeypatch.setattr(
        autotune,
        "try_pipeline",
        lambda engine, using, pipeline, control, **place: (
            next(rates[name] for name, one in made.items() if one is pipeline),
            None,
        ),
    )
    fed = auto._try_pipelines(["torchvision", "dali", "resident"], "eager", 8 / 100.0, {})
    assert [each.pipeline for each in fed] == tried
    assert [each.reason for each in fed if each.images_per_second is None] == (
        ["data.pipeline: found too much"] if None in rates.values() else []
    )
    assert auto.name == taken
    assert auto.pipeline is made[taken]
    assert {name for name, one in made.items() if not one.closed} == {taken}


class Failing(Made):
    """A pipeline that fails at the batch of this number."""

    def __init__(self, whole, good):
        super().__init__()
        self.whole, self.good = whole, good
        self.set_epoch = whole.set_epoch

    def __iter__(self):
        yield from islice(self.whole, self.good)
        raise RuntimeError("received 0 items of ancdata\nand more")


def test_a_pipeline_that_fails_drops_out(tiny, monkeypatch):
    """Whatever fails, and when: the run goes on with another pipeline."""
    monkeypatch.setattr(trials, "SECONDS", 0.0)
    task = Pretraining(tiny())
    auto, whole = task._auto, task._auto.pipeline
    made = {"dali": Failing(whole, 3), "resident": Failing(whole, 0)}
    monkeypatch.setattr(auto, "_build", lambda name: made[name])
    before = [parameter.clone() for parameter in auto._engine.trainable.parameters()]
    place = {"step": 0, "epoch": 0}
    fed = auto._try_pipelines(["dali", "resident", "none", "torchvision"], "eager", 1e-9, place)
    assert [each.reason for each in fed[:2]] == ["RuntimeError: received 0 items of ancdata"] * 2
    assert fed[2].reason == "KeyError: 'none'"
    assert fed[3].images_per_second > 0
    assert (auto.name, auto.pipeline) == ("torchvision", whole)
    assert all(each.closed for each in made.values())
    for parameter, old in zip(auto._engine.trainable.parameters(), before, strict=True):
        assert torch.equal(parameter, old), "the steps before the failure leave no trace"
    task.close()


def test_a_pipeline_that_fails_on_another_process_drops_out(tiny, monkeypatch):
    class Two(HostGroup):
        def max(self, *numbers):
            return tuple(max(1, number) for number in numbers)

    task = Pretraining(tiny())
    pipeline = task._auto.pipeline
    place = {"step_seconds": 1.0, "step": 0, "epoch": 0}
    assert try_pipeline(task._auto._engine, "eager", pipeline, Two(DistEnv()), **place) == (None, None)
    task.close()


def test_the_pipeline_of_a_long_run_is_measured(tiny, tmp_path, monkeypatch):
    """By a real clock: whatever comes out is taken, and yields what it would have yielded."""
    monkeypatch.setattr(autotune, "MIN_STEPS", 1)
    monkeypatch.setattr(trials, "SECONDS", 0.0)
    monkeypatch.setattr(autotune, "SERVES", 1e9)  # no pipeline serves, so that both are tried
    task = Pretraining(tiny({"training.engine": "eager"}))
    assert pipelines_for(task._train, torch.device("cpu")) == ["torchvision", "resident"]
    task._auto.settle(8, tmp_path)
    found = table(tmp_path)
    assert [row["pipeline"] for row in found["pipelines"]] == ["torchvision", "resident"]
    assert all(row["images_per_second"] > 0 for row in found["pipelines"])
    assert task._auto.state_dict() == {"chosen": {"pipeline": found["pipeline"]}}
    named = Pretraining(tiny({"data.pipeline": found["pipeline"]}))
    assert type(task.pipeline) is type(named.pipeline)
    task.pipeline.set_epoch(0)
    for one, other in zip(task.pipeline, named.pipeline, strict=True):
        assert torch.equal(one.first, other.first)
    for each in (task, named):
        each.close()


def test_a_checkpoint_settles_the_pipeline(tiny):
    for config, expected in (
        (tiny(), "ResidentPipeline"),
        (tiny({"data.pipeline": "torchvision"}), "TorchvisionPipeline"),
    ):
        task = Pretraining(config)
        chosen = {"engine": "eager", "pipeline": "resident"}
        task._auto.load_state_dict({"chosen": chosen})
        task._auto.begin({"device": "cpu"})
        assert type(task.pipeline).__name__ == expected
        assert task._auto.state_dict() == {"chosen": chosen}
        task.close()


class OneCannot(HostGroup):
    def max(self, *numbers):
        return (1,) * len(numbers)


@pytest.mark.parametrize(
    ("device", "pipeline", "control", "reason"),
    [
        ("NVIDIA H100", "resident", ALONE, "chosen on NVIDIA H100"),
        ("cpu", "dali", ALONE, "data.pipeline: found dali, expected auto, torchvision or resident here, where DALI is"),
        ("cpu", "resident", OneCannot(DistEnv()), "another process cannot"),
    ],
)
def test_a_choice_that_does_not_serve_here_is_made_again(
    tiny, tmp_path, fake, monkeypatch, device, pipeline, control, reason
):
    monkeypatch.setattr(build, "has_dali", lambda: False)
    task, said = Pretraining(tiny()), []
    auto = task._auto
    monkeypatch.setattr(auto, "_control", control)
    task.note.show_by(lambda line, style: said.append(line))
    auto.load_state_dict({"chosen": {"engine": "compile", "pipeline": pipeline}})
    auto.begin({"device": device})
    assert said[-1].startswith(
        f"auto: choosing again, since the run used engine compile and pipeline {pipeline} ({reason}"
    )
    assert said[-1].endswith("; it may no longer be equal bit for bit")
    assert (auto.name, task.engine.form, auto.state_dict()) == ("torchvision", "eager", {"chosen": None})
    monkeypatch.setattr(autotune, "MIN_STEPS", 9)
    auto.settle(8, tmp_path)
    assert auto.state_dict() == {"chosen": {"engine": "eager", "pipeline": "torchvision"}}
    task.close()


def test_a_start_cut_short_leaves_the_measurement_to_the_next_one(tiny, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(autotune, "MIN_STEPS", 5)
    limits = tiny({"training.max_steps": 2}).training
    for step, limited, chosen in ((0, limits, None), (2, None, {"engine": "compile"})):
        task = Pretraining(tiny(ENGINE_ALONE), limits=limited)
        task._auto.load_state_dict({"chosen": None})
        task.begin(tmp_path, fresh=step == 0)
        next(task.batches(step))
        assert task.state_dict()["chosen"] == chosen
        assert (tmp_path / "engines.json").exists() == (chosen is not None)
        task.close()


def test_a_choice_that_is_kept_counts_the_steps_of_the_whole_run(tiny, tmp_path, fake, monkeypatch):
    """Compiling pays in the run, if not in this start: 50 minutes of two hours, by the fake clock."""
    monkeypatch.setattr(autotune, "COMPILE_PAYS", 3600.0)
    task = Pretraining(tiny(ENGINE_ALONE))
    task._auto.settle(50 * 60, tmp_path, whole=120 * 60)
    assert task._auto.state_dict() == {"chosen": {"engine": "compile"}}
    task.close()


@pytest.mark.parametrize("limit", [65536.0, 2048.0, 0.0])
def test_loss_scaling_settles_before_engines_are_compared(tiny, fake, monkeypatch, limit):
    """In fp16 the first steps overflow until the scale is low enough; what always overflows is out."""
    engine = Engine(tiny(), 4)
    engine.update.scale = torch.full((), 65536.0)
    backward = OptimStep.backward

    def overflow(update, loss):
        backward(update, loss)
        if float(update.scale) > limit:
            engine.trainable.get_parameter("backbone.conv1.weight").grad.fill_(torch.inf)

    monkeypatch.setattr(OptimStep, "backward", overflow)
    found = try_engines(engine, ["eager", "compile"], [batch(0), batch(1)], ALONE, step=4, epoch=1)
    if not limit:
        assert [each.reason for each in found] == ["its losses are not finite"]
    else:
        assert [each.reason for each in found] == [None, None]
        assert found[1].loss_error == found[1].weight_error == 0
    assert engine.update.state_dict() == {"scale": 65536.0, "growth": 0}


def test_a_real_clock_measures_both_engines(tiny, tmp_path, monkeypatch):
    """Without a fake clock: whatever comes out, the table holds two times and the run is one of the two."""
    monkeypatch.setattr(engine_module, "Compiled", Fake)
    monkeypatch.setattr(autotune, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(autotune, "MIN_STEPS", 1)
    monkeypatch.setattr(autotune, "COMPILE_PAYS", 0.0)
    monkeypatch.setattr(trials, "SECONDS", 0.0)
    task = Pretraining(tiny(ENGINE_ALONE))
    assert isinstance(task._auto, Auto)
    task._auto.settle(8, tmp_path)
    rows = {row["engine"]: row for row in table(tmp_path)["engines"]}
    assert rows["eager"]["seconds"] > 0
    assert rows["compile"]["seconds"] > 0
    assert rows["compile"]["loss_error"] == rows["compile"]["weight_error"] == 0
    assert task.engine.form == table(tmp_path)["engine"]
    task.close()
