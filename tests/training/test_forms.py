"""Which form computes what: asked, proved, refused, kept across a stop, and the same on all processes. No GPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synco_fast.commands.pretrain import _print_summary
from synco_fast.data.sources.open import open_source
from synco_fast.kernels import momentum, ops
from synco_fast.kernels.proof import KERNELS
from synco_fast.kernels.views.reference import plain_views
from synco_fast.methods import contrastive
from synco_fast.models.batch_norm import SplitBatchNorm2d
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.first_use import Outcome, key_of
from synco_fast.training.step import forms
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.forms import Form, choose_forms, choose_views, forms_state
from synco_fast.training.tuning import autotune
from synco_fast.training.tuning.autotune import Auto

from ..support.training import assert_identical, newest, screen, stop_after, trainer

ALONE = HostGroup(DistEnv())
PORTABLE = {"loss": "blockwise", "norm": "native", "momentum": "foreach"}
FUSED = dict.fromkeys(PORTABLE, "triton")


class FakeProver:
    """Knows what passes; every other kernel fails."""

    def __init__(self, *passing, device="fake"):
        self.passing, self.facts, self.asked = passing, {"device": device}, []

    def key(self, kernel, shapes):
        return key_of(kernel, shapes, self.facts)

    def prove(self, wanted):
        self.asked.append(dict(wanted))
        return {name: Outcome(name in self.passing, "" if name in self.passing else "it is wrong") for name in wanted}


@pytest.fixture
def served(monkeypatch):
    """Let every kernel serve the CPU, as if it were a GPU."""
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(KERNELS, name, kernel._replace(unserved=lambda shapes, device: None))


@pytest.fixture
def engine(tiny):
    def make(overrides=None):
        made = Engine(tiny(overrides), steps_per_epoch=4)
        made.lines = []
        made.note = made.lines.append
        return made

    return make


def names(engine):
    return {part: form.name for part, form in engine.forms.items()}


def backends(engine):
    """What the method was told."""
    norms = {part.backend for part in engine.method.modules() if isinstance(part, SplitBatchNorm2d)}
    return engine.method.settings.backend, norms, engine.method.momentum_backend


def test_on_a_cpu_the_portable_forms_run_and_nobody_is_told(engine, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = engine()
    choose_forms(made, ALONE)
    assert names(made) == PORTABLE
    assert all(form.why for form in made.forms.values())
    assert backends(made) == ("auto", {"auto"}, "auto")
    assert made.lines == []


def test_the_interpreter_is_no_device_to_prove_on(engine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = engine()
    choose_forms(made, ALONE)
    assert names(made) == PORTABLE
    assert made.lines == []


def test_what_is_proved_is_used_and_what_fails_is_named(engine, served):
    made, prover = engine(), FakeProver("loss", "norm")
    choose_forms(made, ALONE, prover=prover)
    assert names(made) == {**FUSED, "momentum": "foreach"}
    assert made.forms["loss"] == Form("triton", "validated on this device")
    assert made.forms["momentum"] == Form("foreach", "it is wrong")
    assert backends(made) == ("triton", {"triton"}, "auto")
    assert made.lines == ["momentum: using foreach instead of the fused kernel: it is wrong"]


def test_the_shapes_are_those_of_the_run(engine, served):
    made, prover = engine({"training.accumulate": 2, "method.mask_same_image": True}), FakeProver()
    choose_forms(made, ALONE, prover=prover)
    (asked,) = prover.asked
    loss = asked["loss"]
    assert (loss["calls"], loss["length"], loss["dim"], loss["dtype"]) == ([[4, True]], 32, 16, "float32")
    # The first epoch has no synthetic negatives, the second one has.
    assert [values["mixed"] for values in loss["negatives"]] == [0, 4]
    assert (asked["norm"]["images"], asked["norm"]["dtype"]) == (4, "float32")
    assert {(8, 8, 8, 1, True, False), (8, 8, 8, 1, True, True)} <= {tuple(one) for one in asked["norm"]["layers"]}
    sizes = sum(size * count for _, size, count in asked["momentum"]["sizes"])
    assert sizes == sum(parameter.numel() for parameter in made.method.encoder.parameters())
    json.dumps(asked)


@pytest.mark.parametrize(
    ("overrides", "expected", "left"),
    [
        ({"method.backend": "triton"}, "triton", {"norm", "momentum"}),
        ({"method.backend": "reference"}, "reference", {"norm", "momentum"}),
        ({"training.fused": "none"}, "blockwise", None),
    ],
)
def test_what_is_asked_for_needs_no_proof(engine, served, monkeypatch, overrides, expected, left):
    monkeypatch.setattr(contrastive, "unserved_by_triton", lambda *_: None)
    made, prover = engine(overrides), FakeProver("loss", "norm", "momentum")
    choose_forms(made, ALONE, prover=prover)
    assert made.forms["loss"].name == expected
    assert [set(asked) for asked in prover.asked] == ([left] if left else [])


def test_plain_norms_stay_plain(engine, served):
    made = engine({"model.norm": "plain", "model.batch_norm_groups": 1})
    choose_forms(made, ALONE, prover=FakeProver(*PORTABLE))
    assert made.forms["norm"] == Form("plain", "no layer is fused")


def test_methods_without_queue_or_target_have_fewer_parts(tiny, served):
    for name, parts in (("byol", {"norm", "momentum"}), ("simclr", {"norm"})):
        made, prover = Engine(tiny({"method.name": name}), steps_per_epoch=4), FakeProver("norm", "momentum")
        choose_forms(made, ALONE, prover=prover)
        assert names(made) == dict.fromkeys(parts, "triton")
        assert prover.asked[0]["norm"]["images"] == 16, "both views pass together"


def test_a_gpu_is_proved_on_by_its_own_number(monkeypatch):
    monkeypatch.setattr(forms, "device_facts", lambda index: {"device": f"GPU {index}"})
    said = []
    prover = forms._prover_of(SimpleNamespace(device=torch.device("cuda", 3), note=said.append))
    assert (prover.device, prover.facts) == ("cuda:3", {"device": "GPU 3"})
    prover.say("a line")
    assert said == ["a line"]
    assert forms._prover_of(SimpleNamespace(device=torch.device("cpu"))) is None


def test_the_page_lists_every_kernel():
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("### First use")[2].partition("###")[0].splitlines() if line[:1] == "|"]
    assert len(rows) == 2 + len(KERNELS)
    for row, kernel in zip(rows[2:], KERNELS.values(), strict=True):
        assert f"| `{kernel.fused}` | `{kernel.portable}`" in row


# -- what makes the views ----------------------------------------------------------------------------------------


class Views:
    """A pipeline that kernels can make the views of."""

    def __init__(self, sides=(16, 24)):
        given = {"sides": sides, "views": 16, "dtype": torch.bfloat16, "image": None, "channels": 3, "planar": False}
        self.kernel_input, self.made_by = {**given, "sigma": 2.0}, None

    def use_kernels(self, make):
        self.made_by = make


def test_views_are_made_by_kernels_that_are_validated_at_every_side(engine, served):
    made, prover, pipeline = engine(), FakeProver("augment"), Views()
    choose_views(made, ALONE, pipeline, prover=prover)
    assert made.forms == {"augment": Form("triton", "validated on this device")}
    assert pipeline.made_by is forms.make_views
    (asked,) = prover.asked
    assert (asked["augment"]["sides"], asked["augment"]["dtype"]) == ([16, 24], "bfloat16")
    json.dumps(asked)
    assert made.lines == []


@pytest.mark.parametrize(
    ("overrides", "passing", "why", "said"),
    [
        ({}, (), "it is wrong", ["augment: using operators instead of the fused kernel: it is wrong"]),
        ({"training.fused": "none"}, ("augment",), "training.fused=none", []),
    ],
)
def test_other_views_are_the_pipelines_own(engine, served, overrides, passing, why, said):
    made, pipeline = engine(overrides), Views()
    choose_views(made, ALONE, pipeline, prover=FakeProver(*passing))
    assert made.forms["augment"] == Form("operators", why)
    assert pipeline.made_by is None
    assert made.lines == said


def test_on_a_cpu_views_are_the_pipelines_own_and_nothing_is_said(engine, monkeypatch):
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        made, pipeline = engine(), Views()
        choose_views(made, ALONE, pipeline)
        assert made.forms["augment"].name == "operators"
        assert (pipeline.made_by, made.lines) == (None, [])


def test_a_pipeline_without_use_for_kernels_has_no_such_part(engine, served):
    made, none = engine(), Views()
    none.kernel_input = None
    for pipeline in (object(), none):
        made.forms = {"loss": Form("triton", ""), "augment": Form("triton", "of another pipeline")}
        choose_views(made, ALONE, pipeline, prover=FakeProver("augment"))
        assert set(made.forms) == {"loss"}


def test_a_resumed_run_keeps_what_makes_its_views_or_says_so(engine, served):
    made = engine()
    made.forms = {"augment": Form("operators", "it is wrong")}
    again, pipeline = engine(), Views()
    choose_views(again, ALONE, pipeline, kept=forms_state(made), prover=FakeProver("augment"))
    assert again.forms["augment"] == Form("operators", "kept from the start of the run")
    assert (pipeline.made_by, again.lines) == (None, [])
    made.forms = {"augment": Form("triton", "validated on this device")}
    choose_views(again, ALONE, pipeline, kept=forms_state(made), prover=FakeProver())
    said = "augment: the run used triton and continues with operators (it is wrong); it is no longer equal bit for bit"
    assert again.lines[-1] == said


def test_a_run_trains_on_fused_views_and_resumes_with_them_to_the_bit(tiny, tmp_path, served, monkeypatch):
    """Resident, with plain PyTorch in the kernels' place; the checkpoint and the summary name the part."""
    monkeypatch.setattr(forms, "_prover_of", lambda engine: FakeProver("augment"))
    monkeypatch.setattr(forms, "make_views", plain_views)
    config = {"data.pipeline": "resident", "training.epochs": 1, "evaluation.every": 0}
    whole = trainer(tiny(config), tmp_path / "whole").run()
    assert whole.forms["augment"] == {"name": "triton", "why": "validated on this device"}
    assert whole.forms["views"]["name"] == "resident"
    trainer(tiny(config), tmp_path / "parts", after_step=stop_after(2)).run()
    trainer(tiny(config), tmp_path / "parts", resume=tmp_path / "parts").run()
    assert newest(tmp_path / "parts")["forms"]["names"]["augment"] == "triton"
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    trainer(tiny({**config, "training.fused": "none"}), tmp_path / "own").run()
    assert not torch.equal(
        newest(tmp_path / "own")["method"]["queue.rows"], newest(tmp_path / "whole")["method"]["queue.rows"]
    ), "the views differ by rounding, so that it shows what made them"


def test_pipelines_are_timed_with_the_kernels_that_they_would_use(tiny, served, monkeypatch):
    monkeypatch.setattr(forms, "_prover_of", lambda engine: FakeProver("augment"))
    made, tried = Engine(tiny(), 4), []
    split = open_source(made.config.data.source).train
    for rates, name, part in (((1.0, 9.0), "resident", "triton"), ((9.0, 1.0), "torchvision", None)):
        left = iter(rates)
        auto = Auto(made, split, ALONE, lambda line, style: None)
        auto.begin(None)

        def rate(engine, using, pipeline, *rest, left=left, **more):
            tried.append(getattr(pipeline, "_make", None))
            return next(left), None

        monkeypatch.setattr(autotune, "try_pipeline", rate)
        auto._try_pipelines(["torchvision", "resident"], "eager", 1e-3, {"step": 0, "epoch": 0})
        assert auto.name == name
        assert (made.forms["augment"].name if "augment" in made.forms else None) == part
        auto.pipeline.close()
    assert tried == [None, forms.make_views] * 2


# -- a resumed run ----------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_forms(engine, served):
    first = engine()
    choose_forms(first, ALONE, prover=FakeProver("loss"))
    state = forms_state(first)
    # What failed then passes today: the bits of the run's end would be others.
    again, prover = engine(), FakeProver("loss", "norm", "momentum")
    choose_forms(again, ALONE, kept=state, prover=prover)
    assert names(again) == names(first)
    assert again.forms["norm"] == Form("native", "kept from the start of the run")
    assert set(prover.asked[0]) == {"loss"}
    assert again.lines == []


def test_a_resumed_run_that_cannot_keep_them_says_so(engine, served):
    first = engine()
    choose_forms(first, ALONE, prover=FakeProver("loss"))
    again = engine()
    choose_forms(again, ALONE, kept=forms_state(first), prover=FakeProver())
    assert again.forms["loss"].name == "blockwise"
    said = "loss: the run used triton and continues with blockwise (it is wrong); it is no longer equal bit for bit"
    assert again.lines[-1] == said


def test_on_another_device_they_are_chosen_anew(engine, served):
    made = engine()
    choose_forms(made, ALONE, kept={"device": "Other", "names": PORTABLE}, prover=FakeProver(*PORTABLE))
    assert names(made) == FUSED
    assert len(made.lines) == 3


def test_a_run_of_before_there_was_a_choice_keeps_the_portable_forms(engine, served):
    made, prover = engine(), FakeProver(*PORTABLE)
    choose_forms(made, ALONE, kept={}, prover=prover)
    assert names(made) == PORTABLE
    assert prover.asked in ([], [{}])


def test_run_folder_and_checkpoint_name_the_forms(tiny, tmp_path, served, monkeypatch):
    """A whole run and its resumption, with the operators' own fallback in the place of the kernels."""
    prover = FakeProver("loss", "momentum")
    monkeypatch.setattr(forms, "_prover_of", lambda engine: prover)
    short = {"training.epochs": 1, "training.max_steps": 1, "evaluation.every": 0}
    console, text = screen()
    monkeypatch.setattr(ops, "_note", lambda reason: None)
    monkeypatch.setattr(momentum, "_note", lambda reason: None)
    summary = trainer(tiny(short), tmp_path / "run", console=console).run()
    expected = {"loss": "triton", "norm": "native", "momentum": "triton"}
    others = {"views": "torchvision", "engine": "eager", "precision": "fp32"}
    assert {part: form["name"] for part, form in summary.forms.items()} == expected | others
    for file in ("environment.json", "summary.json"):
        found = json.loads((tmp_path / "run" / file).read_text())["forms"]
        assert found == summary.forms
        assert found["norm"] == {"name": "native", "why": "it is wrong"}
    assert "norm: using native instead of the fused kernel: it is wrong" in text.getvalue()
    assert newest(tmp_path / "run")["forms"]["names"] == expected
    _print_summary(summary, console)
    assert (
        "loss triton, norm native, momentum triton, precision fp32, views torchvision, engine eager" in text.getvalue()
    )
    prover.passing = ()
    console, text = screen()
    trainer(tiny({**short, "training.max_steps": 2}), tmp_path / "run", resume=tmp_path / "run", console=console)
    assert "loss: the run used triton and continues with blockwise (it is wrong)" in text.getvalue()


# -- several processes ------------------------------------------------------------------------------------------


class Job:
    """Threads that gather as the ranks of a job do."""

    def __init__(self, world):
        self.world, self.barrier, self.given = world, threading.Barrier(world, timeout=20), [None] * world

    def group(self, rank):
        return SimpleNamespace(env=DistEnv(rank, self.world), gather=lambda value: self.gather(rank, value))

    def gather(self, rank, value):
        self.given[rank] = value
        self.barrier.wait()
        values = list(self.given)
        self.barrier.wait()
        return values

    def run(self, *provers, wanted):
        found = [None] * self.world

        def one(rank):
            found[rank] = forms._agreed(self.group(rank), provers[rank], wanted[rank])

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


WANTED = {"loss": {"length": 3}, "norm": {"images": 2}}


def test_equal_devices_are_asked_once_and_all_choose_alike():
    provers = [FakeProver("loss"), FakeProver("loss", "norm"), FakeProver()]
    found = Job(3).run(*provers, wanted=[WANTED] * 3)
    assert found[0] == found[1] == found[2] == {"loss": Outcome(True), "norm": Outcome(False, "it is wrong")}
    assert [set(asked) for prover in provers for asked in prover.asked] == [{"loss", "norm"}, set(), set()]


def test_unlike_devices_are_asked_each_and_the_worst_decides_for_all():
    provers = [FakeProver("loss", "norm"), FakeProver("loss", device="older"), FakeProver(device="older")]
    found = Job(3).run(*provers, wanted=[WANTED] * 3)
    assert found[0] == found[1] == found[2]
    assert found[0]["loss"].passed
    assert not found[0]["norm"].passed
    assert [set(asked) for prover in provers for asked in prover.asked] == [{"loss", "norm"}, {"loss", "norm"}, set()]


def test_what_one_process_cannot_run_none_does():
    found = Job(2).run(FakeProver("loss", "norm"), FakeProver("norm"), wanted=[WANTED, {"norm": WANTED["norm"]}])
    assert not found[0]["loss"].passed
    assert "another process" in found[0]["loss"].reason
    assert found[0]["norm"] == found[1]["norm"] == Outcome(True)
