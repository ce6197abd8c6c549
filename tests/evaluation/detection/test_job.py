"""The parts of a detector's fine-tuning by themselves: the detector, its steps and modes, and how it is measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics", reason="the extra 'detection' is not installed")
pytest.importorskip("pycocotools", reason="the extra 'detection' is not installed")

from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.detection import finetune as transfer
from synco_fast.evaluation.detection.datasets import Detections, Steps, open_detection
from synco_fast.evaluation.detection.finetune import build_detector
from synco_fast.export.load import read_weights
from synco_fast.runtime.precision import Precision

from .test_transfer import SMALL

CPU = torch.device("cpu")


class Detector(nn.Module):
    """Its loss is the sum of its weights; its detections are the truth, in the order of the images."""

    def __init__(self, truth=()):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.ones(()))
        self.transform = SimpleNamespace(min_size=(48, 64))
        self.truth, self.seen = iter(truth), []

    def forward(self, images, targets=None):
        modes = self.training, self.backbone.body.training
        if targets is None:
            self.seen.append((*modes, self.transform.min_size))
            return [{**next(self.truth), "scores": torch.ones(1)} for _ in images]
        self.seen.append((*modes, len(images), torch.initial_seed()))
        return {"one": 0.25 * self.weight, "two": 0.75 * self.weight}


def job(detector, source, protocol):
    options = EvalOptions(data=source.spec, workers=0)
    return transfer._Job(detector, source, protocol, options, Precision("fp32", CPU), CPU, None)


@pytest.mark.parametrize("freeze", [False, True])
def test_the_detector_is_that_of_the_protocol_and_of_the_runs_statistics(make_run, freeze):
    weights = read_weights(make_run({"augment.mean": [0.1, 0.2, 0.3], "augment.std": [0.4, 0.5, 0.6]}))
    made = build_detector(weights, 3, masks=True, protocol=replace(SMALL, freeze=freeze, longest=99, sizes=(48, 64)))
    assert made.roi_heads.box_predictor.cls_score.out_features == 4, "with the background"
    assert made.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 4
    assert (made.transform.image_mean, made.transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (made.transform.min_size, made.transform.max_size) == ((48, 64), 99)
    assert {parameter.requires_grad for parameter in made.backbone.body.parameters()} == {not freeze}
    assert all(parameter.requires_grad for parameter in made.backbone.fpn.parameters())
    body = made.backbone.body.state_dict()
    assert all(torch.equal(value, weights.backbone[name]) for name, value in body.items())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_training_takes_rates_decay_modes_and_seeds_of_the_protocol(voc, tmp_path, monkeypatch, freeze):
    detector = Detector()
    monkeypatch.setattr(transfer._Job, "measure", lambda job, images: (job.detector.eval(), {"box": {"AP": 0.125}})[1])
    protocol = replace(
        SMALL, steps=6, drops=(4,), warmup=2, lr=0.5, momentum=0.0, weight_decay=0.25, freeze=freeze, seed=7
    )
    source = open_detection(f"voc:{voc}")
    assert job(detector, source, protocol).train(tmp_path / "state.pt", {"made": "here"}, fresh=False) == 0.125
    weight = 1.0
    for step in range(6):
        weight -= protocol.rate(step) * (1 + 0.25 * weight)
    assert detector.weight.item() == pytest.approx(weight, abs=1e-5)
    assert [mode[:3] for mode in detector.seen] == [(True, not freeze, 4)] * 6
    assert [mode[3] for mode in detector.seen] == [7 + step for step in range(6)]


def test_a_measurement_is_at_one_size_and_the_truth_has_a_precision_of_one(voc):
    source = open_detection(f"voc:{voc}")
    truth = [{name: source.test[number][1][name] for name in ("boxes", "labels")} for number in range(4)]
    detector = Detector(truth).train()
    assert job(detector, source, SMALL).measure(4)["box"] == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})
    assert detector.seen == [(False, False, (64,))] * 4
    assert detector.transform.min_size == (48, 64), "training goes on with its own sizes"
    masked = job(detector, replace(source, masks=True), SMALL)
    found = masked._prediction({**truth[0], "scores": torch.ones(1), "masks": torch.tensor([[[[0.4, 0.6]]]])})
    assert found["masks"].tolist() == [[[False, True]]]


def test_every_epoch_has_an_order_of_its_own_and_parts_follow_one_another(voc):
    first, second = ([number for step in Steps(32, 8, 0, *ends) for _, number in step] for ends in ((0, 4), (4, 8)))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    test = open_detection(f"voc:{voc}").test
    twice = Detections([test.parts[0], test.parts[0]], test.convert)
    assert len(twice) == 8
    for number in range(8):
        assert torch.equal(twice[number][0], test[number % 4][0])
