"""The benchmark of the step: what it measures is a step, and its ratios are those of its figures."""

from __future__ import annotations

import json
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from synco_fast.bench import step
from synco_fast.bench.baselines.step import plain_step
from synco_fast.bench.step import forward_operations, measure, use_plain_batch_norm
from synco_fast.cli import main
from tests.support.graphs import stand_in
from tests.support.rotation import in_turn

SMALL = {"training.batch": 8, "training.device": "cpu"}


def test_the_plain_loop_learns(tiny):
    torch.manual_seed(0)
    run = plain_step(tiny({**SMALL, "optimizer.lr": 0.3, "model.momentum": 0.99}), torch.device("cpu"))
    torch.manual_seed(0)
    first, noise = torch.randn(2, 8, 3, 32, 32)
    losses = [run(first, first + noise / 10) for _ in range(20)]
    # The loss rises while keys replace the queue's random rows. From then on an encoder that learns nothing moves it by
    # less than 0.06 in 14 steps; one that learns took 0.2 to 0.5 off it.
    assert losses[5] - losses[-1] > 0.2, losses


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_chooses_by_trial_for_the_plain_loop_alone_and_is_put_back(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with step._cudnn_setting(benchmark=True):
        assert torch.backends.cudnn.benchmark
    with step._cudnn_setting(benchmark=False):
        assert torch.backends.cudnn.benchmark == before
        torch.backends.cudnn.benchmark = not before  # as an engine does on a GPU
    assert torch.backends.cudnn.benchmark == before


def test_utilisation_is_of_the_device_that_was_measured():
    for device, expected in (("AMD EPYC", None), ("NVIDIA H100 80GB HBM3", 4 * 3e9 * 60 / 989e12)):
        rows = [{"subject": "synco", "median": 60.0}]
        step._relate(rows, 3_000_000_000, device)
        assert rows[0]["utilisation"] == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("subject", ["encoder", "encoder-plain", "plain", "synco"])
def test_each_subject_is_measured(tiny, subject, monkeypatch):
    seen = []
    runner = step._runner
    monkeypatch.setattr(step, "_runner", lambda *words: seen.append(torch.backends.cudnn.benchmark) or runner(*words))
    found = measure(subject, tiny(SMALL).model_dump(mode="json"), engine="graph", steps=5)
    assert len(found["images_per_second"]) == 5
    assert found["median"] > 0
    assert seen == [subject == "plain"]
    assert (found["loss"] is None) == subject.startswith("encoder")
    assert (found["notes"] == []) == (subject == "plain"), "a graph needs a GPU, and that is said"


def test_the_limit_normalises_as_pytorch_does_with_the_same_weights(tiny):
    from synco_fast.methods.build import build_encoder

    encoder = build_encoder(tiny({"model.batch_norm_groups": 1, "model.norm": "plain"}))
    before = dict(encoder.named_parameters())
    images = torch.randn(4, 3, 32, 32)
    encoder.train()
    expected = encoder(images)
    use_plain_batch_norm(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(type(module) is torch.nn.BatchNorm2d for module in norms)
    assert all(parameter is before[name] for name, parameter in encoder.named_parameters())
    torch.testing.assert_close(encoder(images), expected)


def test_operations_are_counted_as_two_for_a_multiply_add(tiny):
    config = tiny(
        {"model.backbone": "resnet18", "model.backbone_args": {}, "augment.size": 224, "augment.evaluation_resize": 224}
    )
    assert forward_operations(config) == pytest.approx(2 * 1.814e9, rel=0.01), "ResNet-18 at 224: 1.8 GMACs"


@pytest.mark.slow
@in_turn(2, 3)
def test_the_command_writes_ratios_of_what_it_measured(tiny, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny(SMALL).to_yaml())
    words = ["bench", "step", "--config", str(tmp_path / "tiny.yaml"), "--subjects", "encoder", "moco"]
    words += ["--backends", "blockwise", "nonsense"]
    assert main([*words, "--steps", "5", "--threads", "1", "--json", str(tmp_path / "step.json")]) == 1
    report = json.loads((tmp_path / "step.json").read_text())
    encoder, moco = report["results"]
    (failed,) = report["failed"]
    assert "moco, eager" in failed, "what fails takes nothing else with it"
    assert moco["of_encoder"] == pytest.approx(moco["median"] / encoder["median"])
    assert moco["of_plain"] is None
    assert report["environment"]["threads"] == 1
    assert "images/s" in capsys.readouterr().out


def test_unknown_words_are_refused(capsys):
    assert main(["bench", "step", "--subjects", "mocov9"]) == 2
    assert "subjects: found 'mocov9', expected encoder, encoder-plain, plain, moco" in capsys.readouterr().err


def test_a_captured_pass_keeps_the_tensors_that_it_reads(monkeypatch):
    """A graph holds addresses: freed, they would be read and written all the same."""
    stand_in(monkeypatch)
    views = torch.zeros(2)
    alive = weakref.ref(views)
    replay = step._captured(partial(torch.Tensor.sum, views), SimpleNamespace(graphed=True, device=torch.device("cpu")))
    del views
    assert alive() is not None
    del replay
    assert alive() is None
