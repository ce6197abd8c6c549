"""Detection transfer on a made-up set of bright and dark rectangles, in both layouts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchmetrics", reason="the extra 'detection' is not installed")
pytest.importorskip("pycocotools", reason="the extra 'detection' is not installed")

from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.detection import finetune as transfer
from synco_fast.evaluation.detection.datasets import Steps, open_detection
from synco_fast.evaluation.detection.finetune import evaluate_detection, published_protocol
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.runtime.precision import Precision
from tests.support.detection import scene
from tests.support.rotation import in_turn

CPU = torch.device("cpu")
SMALL = replace(
    published_protocol("voc"),
    steps=24,
    drops=(20,),
    warmup=5,
    batch=4,
    sizes=(64,),
    size=64,
    keep_every=15,
    regions=16,
    proposals=32,
    detections=5,
)


def test_both_layouts_give_the_same_objects(voc, coco):
    by_voc, by_coco = open_detection(f"voc:{voc}"), open_detection(f"coco:{coco}")
    assert (len(by_voc.train), len(by_voc.test), len(by_voc.classes)) == (8, 4, 20)
    assert (len(by_coco.train), by_coco.classes, by_coco.masks) == (9, ("dog", "bottle"), True)
    assert by_coco.train.sha256() != by_coco.test.sha256()
    for number in range(4):
        _, (x, y, width, height), label = scene(8 + number)
        image, target = by_voc.test[number]
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
        assert target["boxes"].tolist() == [[x, y, x + width, y + height]]
        assert by_voc.classes[int(target["labels"]) - 1] == ("cat", "dog")[label]
        _, other = by_coco.test[number]
        assert torch.equal(other["boxes"], target["boxes"])
        assert int(other["labels"]) == label + 1
        assert other["masks"].shape == (1, 64, 64)
        assert other["masks"][0, y : y + height, x : x + width].float().mean() > 0.9
    assert by_coco.test[4][1]["masks"].shape == (0, 64, 64), "an image without objects"


def test_no_image_is_trained_and_tested_on(voc):
    """trainval holds val; without a test, val is tested on."""
    sets = voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    names = (sets / "trainval.txt").read_text().splitlines(keepends=True)
    whole = open_detection(f"voc:{voc}")
    assert whole.sets == ("VOC2007 trainval", "VOC2007 test")
    (sets / "test.txt").unlink()
    (sets / "val.txt").write_text("".join(names[5:]))
    with pytest.raises(DataError, match="found no VOCdevkit"):
        open_detection(f"voc:{voc}")
    (sets / "train.txt").write_text("".join(names[:5]))
    with pytest.warns(
        UserWarning, match="found no VOC2007 test in .*: trained on VOC2007 train, tested on VOC2007 val"
    ):
        part = open_detection(f"voc:{voc}")
    assert (len(part.train), len(part.test)) == (5, 3)
    assert not set(part.train.parts[0].images) & set(part.test.parts[0].images)
    assert len({each.sha256() for source in (whole, part) for each in (source.train, source.test)}) == 4
    shutil.copytree(sets.parents[1], sets.parents[2] / "VOC2012")
    with pytest.warns(UserWarning, match="trained on VOC2007 trainval and VOC2012 train, tested on VOC2012 val"):
        open_detection(f"voc:{voc}")


def test_an_unknown_class_is_one_line_from_a_worker_too(voc):
    file = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    file.write_text(file.read_text().replace("dog", "unicorn"))
    train = open_detection(f"voc:{voc}").train
    with pytest.raises(DataError, match=r"^data: found an object 'unicorn', expected the twenty classes of VOC$"):
        list(transfer._loader(train, [[0], [1]], EvalOptions(workers=1)))


def test_a_half_trained_detector_is_that_of_its_precision_and_images(make_run, voc, monkeypatch):
    origins = []
    monkeypatch.setattr(transfer, "build_detector", lambda *arguments, **named: torch.nn.Linear(1, 1))
    monkeypatch.setattr(transfer._Job, "train", lambda job, state, made_by, fresh: origins.append(made_by) or 0.0)
    monkeypatch.setattr(transfer._Job, "measure", lambda job, images: {"box": {"AP": 0.5}})
    run, options = make_run(), EvalOptions(data=f"voc:{voc}", workers=0, precision="fp32")
    sets = voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    for precision, name in (("fp32", None), ("bf16", None), ("fp32", "trainval"), ("fp32", "test")):
        if name:
            (sets / f"{name}.txt").write_text("".join((sets / f"{name}.txt").read_text().splitlines(keepends=True)[1:]))
        found = evaluate_detection(run, replace(options, precision=precision), protocol=SMALL)
    assert len({repr(origin) for origin in origins}) == 4
    assert (found["train_set"], found["test_set"]) == ("VOC2007 trainval", "VOC2007 test")
    assert found["step"] == 8, "by which a comparison knows the checkpoint, also that of best.pt"


def test_several_processes_on_cpus_are_refused(make_run, voc, monkeypatch):
    monkeypatch.setattr(transfer, "world", lambda: 2)
    options = EvalOptions(data=f"voc:{voc}", device="cpu", workers=0)
    with pytest.raises(
        ConfigError, match=r"^device: found 2 processes on CPUs, expected one, or a GPU for each: batch"
    ):
        evaluate_detection(make_run(), options, protocol=SMALL)


def test_an_image_that_cannot_be_read_is_one_line_from_a_worker_too(voc):
    folder = voc / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages" / "000001.jpg").unlink()
    (folder / "Annotations" / "000002.xml").write_text("<annotation>")
    train = open_detection(f"voc:{voc}").train
    for number in (1, 2):
        with pytest.raises(
            DataError, match=rf"^data: cannot read the image .*00000{number}.jpg or its annotation \(.*\)$"
        ):
            list(transfer._loader(train, [[number]], EvalOptions(workers=1)))


def test_a_training_measured_by_other_rules_goes_on(voc, tmp_path, monkeypatch):
    """Earlier versions measured VOC as COCO; only the figure from before the first step is measured again."""
    measured = []
    monkeypatch.setattr(transfer._Job, "measure", lambda job, images: measured.append(images) or {"box": {"AP": 0.25}})
    source, protocol, state = open_detection(f"voc:{voc}"), replace(SMALL, steps=0), tmp_path / "state.pt"
    job = transfer._Job(
        torch.nn.Linear(1, 1), source, protocol, EvalOptions(workers=0), Precision("fp32", CPU), CPU, None
    )
    optim = transfer.OptimStep(
        transfer.build_sgd(transfer.decayed_without_norms(job.detector), lr=1, momentum=0, weight_decay=0, device=CPU),
        scaled=False,
        device=CPU,
    )
    for about, times in (({"metric": "VOC 2007"}, 0), ({}, 1)):
        transfer._save(state, {"made_by": {"made": "here"}, **about}, 0, 0.5, job.detector, optim)
        assert job.train(state, {"made": "here"}, fresh=False) == (0.25 if times else 0.5)
        assert len(measured) == times


def test_difficult_objects_are_trained_on_and_not_counted(voc):
    """As in detectron2: left out of training they would be background."""
    sets = voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    (sets / "test.txt").write_text("000003\n")
    source = open_detection(f"voc:{voc}")
    assert (source.train[0, 3][1]["labels"].tolist(), source.test[0][1]["difficult"].tolist()) == ([12], [1])
    assert source.metric == "VOC 2007"


def test_training_images_are_flipped_with_their_boxes(voc):
    train = open_detection(f"voc:{voc}", seed=3).train
    flipped = 0
    for epoch in range(8):
        image, target = train[epoch, 1]
        _, (x, y, width, height), _ = scene(1)
        left = 64 - x - width
        box = target["boxes"][0].tolist()
        assert box in ([x, y, x + width, y + height], [left, y, left + width, y + height])
        flipped += box[0] == left
        assert image[:, y + 2 : y + height - 2, int(box[0]) + 2 : int(box[2]) - 2].mean() > 0.7
    assert 0 < flipped < 8


def test_weight_decay_spares_batch_norm():
    """As in detectron2 (WEIGHT_DECAY_NORM 0)."""
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2), frozen)
    decayed, norms = transfer.decayed_without_norms(net)
    assert decayed == {"params": [*net[0].parameters(), *net[2].parameters()]}
    assert norms == {"params": [net[1].weight, net[1].bias], "weight_decay": 0.0}


def test_average_precision_is_that_of_coco():
    """Four objects of five are found: precision is 1 up to a recall of 0.8, which 81 of COCO's 101 thresholds are."""
    box, label = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1])
    target = {"boxes": box, "labels": label, "iscrowd": torch.tensor([0])}

    class Detector(torch.nn.Module):
        transform, found = SimpleNamespace(min_size=(64,)), 0

        def forward(self, pictures):
            self.found += 1
            return [{"boxes": box, "labels": label, "scores": torch.ones(1)} if self.found < 5 else nothing]

    nothing = {"boxes": torch.empty(0, 4), "labels": label[:0], "scores": torch.empty(0)}
    source = SimpleNamespace(test=[(torch.zeros(3, 64, 64), target)] * 5, masks=False, metric="COCO")
    device = torch.device("cpu")
    options = EvalOptions(workers=0)
    job = transfer._Job(Detector(), source, SMALL, options, Precision("fp32", device), device, None)
    assert job.measure(5)["box"] == {name: pytest.approx(81 / 101) for name in ("AP", "AP50", "AP75")}


def test_steps_go_through_every_image_and_on():
    whole = list(Steps(10, 4, seed=0, start=0, end=5))
    assert sorted(number for batch in whole[:3] for epoch, number in batch if epoch == 0) == list(range(10))
    assert list(Steps(10, 4, seed=0, start=3, end=5)) == whole[3:]
    halves = [list(Steps(10, 4, seed=0, start=0, end=5, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]


def test_the_published_schedules():
    voc = published_protocol("voc")
    assert [voc.rate(step) for step in (0, 100, 17999, 18000, 22000)] == pytest.approx(
        [2e-5, 0.02, 0.02, 0.002, 0.0002], rel=1e-3
    )
    assert (voc.sizes[0], voc.sizes[-1], voc.batch) == (480, 800, 16)
    assert published_protocol("coco").steps == 180000


@pytest.mark.slow
@in_turn(0, 2)
def test_a_detector_learns(make_run, voc):
    found = evaluate_detection(make_run(), EvalOptions(data=f"voc:{voc}", workers=0, precision="fp32"), protocol=SMALL)
    assert found["box"]["AP50"] > found["chance"] + 0.1
    assert set(found["headline"]) == {"VOC box AP", "VOC box AP50", "VOC box AP75"}
    assert found["detector"] == "Faster R-CNN with FPN"


@pytest.mark.slow
@in_turn(1, 2)
def test_stopped_and_resumed_is_never_stopped(make_run, voc, monkeypatch):
    run, protocol = make_run(), replace(SMALL, steps=4, keep_every=2)
    options = EvalOptions(data=f"voc:{voc}", workers=0, precision="fp32")
    evaluate_detection(run, replace(options, out=run / "whole"), protocol=protocol)
    keep = transfer._save

    def stop(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_detection(run, options, protocol=protocol)
    monkeypatch.setattr(transfer, "_save", keep)
    evaluate_detection(run, options, protocol=protocol)
    one, other = (torch.load(run / folder / "detection_voc.pt")["detector"] for folder in ("whole", "evaluation"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_masks_with_a_frozen_backbone(make_run, coco):
    protocol = replace(SMALL, steps=2, freeze=True)
    found = evaluate_detection(
        make_run(), EvalOptions(data=f"coco:{coco}", workers=0, precision="fp32"), protocol=protocol
    )
    assert found["detector"] == "Mask R-CNN with FPN"
    assert found["backbone_unchanged"] is True
    assert set(found["mask"]) == {"AP", "AP50", "AP75"}
    assert all(0 <= value <= 1 for value in found["mask"].values())


def test_what_cannot_be_detected_on(make_run, voc, coco, tmp_path):
    run = make_run()
    for data, says in (
        ("/data/voc", "found the source '/data/voc', expected voc:FOLDER"),
        (f"voc:{tmp_path}", "found no VOCdevkit"),
        (f"coco:{tmp_path}", "instances_train2017.json"),
    ):
        with pytest.raises(DataError, match=says):
            evaluate_detection(run, EvalOptions(data=data))
    with pytest.raises(ConfigError, match="data: found none"):
        evaluate_detection(run, EvalOptions())
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"bottle"', '"vase"'))
    with pytest.raises(DataError, match="expected the same"):
        evaluate_detection(run, EvalOptions(data=f"coco:{coco}"))
    file.write_text("[]")
    with pytest.raises(DataError, match="found annotations that cannot be read"):
        evaluate_detection(run, EvalOptions(data=f"coco:{coco}"))
    mobile = make_run({"model.backbone": "mobilenet_v3_small", "model.backbone_args": {}}, "mobile")
    with pytest.raises(ConfigError, match="expected ResNets, whose stages are layer1"):
        evaluate_detection(mobile, EvalOptions(data=f"voc:{voc}"))
