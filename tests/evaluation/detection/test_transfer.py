"""Detection transfer on a made-up set of bright and dark rectangles, in both layouts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics", reason="the extra 'detection' is not installed")
pytest.importorskip("pycocotools", reason="the extra 'detection' is not installed")

from synco_fast.evaluation.context import Setting
from synco_fast.evaluation.detection import finetune as transfer
from synco_fast.evaluation.detection.datasets import Steps, open_detection
from synco_fast.evaluation.detection.finetune import evaluate_detection, published_plan
from synco_fast.runtime.errors import ConfigError, DataError
from tests.export.conftest import make_run

__all__ = ["make_run"]

SMALL = replace(
    published_plan("voc"),
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


def scene(number: int) -> tuple[Image.Image, list[int], int]:
    """A grey image with one rectangle: its x, y, width and height, and whether it is dark (0) or bright (1)."""
    rng = np.random.default_rng(number)
    x, y = rng.integers(2, 24, 2).tolist()
    width, height = rng.integers(24, 38, 2).tolist()
    pixels = rng.normal(128, 8, (64, 64, 3))
    pixels[y : y + height, x : x + width] += 110 * (1 if number % 2 else -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), [x, y, width, height], number % 2


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc" / "VOCdevkit" / "VOC2007"
    for inside in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / inside).mkdir(parents=True)
    for name, numbers in (("trainval", range(8)), ("test", range(8, 12))):
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{number:06d}\n" for number in numbers))
        for number in numbers:
            image, (x, y, width, height), label = scene(number)
            image.save(root / "JPEGImages" / f"{number:06d}.jpg", quality=95)
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
            box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
            name = ("cat", "dog")[label]
            one = f"<object><name>{name}</name><difficult>{int(number == 3)}</difficult><bndbox>{box}</bndbox></object>"
            (root / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{one}</annotation>")
    return tmp_path / "voc"


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for name, numbers in (("train2017", range(8)), ("val2017", range(8, 12))):
        (root / name).mkdir()
        images, annotations = [], []
        for number in numbers:
            image, (x, y, width, height), label = scene(number)
            image.save(root / name / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
            outline = [x, y, x + width, y, x + width, y + height, x, y + height]
            one = {"id": number + 1, "image_id": number, "category_id": (18, 44)[label], "iscrowd": 0}
            annotations.append(one | {"bbox": [x, y, width, height], "area": width * height, "segmentation": [outline]})
        images.append({"id": 99, "file_name": "0.png" if name == "train2017" else "8.png", "height": 64, "width": 64})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}]
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def test_both_layouts_give_the_same_objects(voc, coco):
    by_voc, by_coco = open_detection(f"voc:{voc}"), open_detection(f"coco:{coco}")
    assert (len(by_voc.train), len(by_voc.test), len(by_voc.classes)) == (8, 4, 20)
    assert (len(by_coco.train), by_coco.classes, by_coco.masks) == (9, ("dog", "bottle"), True)
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


def test_training_images_are_flipped_with_their_boxes_and_leave_difficult_objects_out(voc):
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
    assert len(train[0, 3][1]["labels"]) == 0, "a difficult object is not trained on"


def test_steps_go_through_every_image_and_on():
    whole = list(Steps(10, 4, seed=0, start=0, end=5))
    assert sorted(number for batch in whole[:3] for epoch, number in batch if epoch == 0) == list(range(10))
    assert list(Steps(10, 4, seed=0, start=3, end=5)) == whole[3:]
    halves = [list(Steps(10, 4, seed=0, start=0, end=5, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]


def test_the_published_schedules():
    voc = published_plan("voc")
    assert [voc.rate(step) for step in (0, 100, 17999, 18000, 22000)] == pytest.approx(
        [2e-5, 0.02, 0.02, 0.002, 0.0002], rel=1e-3
    )
    assert (voc.sizes[0], voc.sizes[-1], voc.batch) == (480, 800, 16)
    assert published_plan("coco").steps == 180000


@pytest.mark.slow
def test_a_detector_learns(make_run, voc):
    found = evaluate_detection(make_run(), Setting(data=f"voc:{voc}", workers=0, precision="fp32"), plan=SMALL)
    assert found["box"]["AP50"] > found["chance"] + 0.1
    assert set(found["headline"]) == {"VOC box AP", "VOC box AP50", "VOC box AP75"}
    assert found["detector"] == "Faster R-CNN with FPN"


@pytest.mark.slow
def test_stopped_and_resumed_is_never_stopped(make_run, voc, monkeypatch):
    run, plan = make_run(), replace(SMALL, steps=4, keep_every=2)
    setting = Setting(data=f"voc:{voc}", workers=0, precision="fp32")
    evaluate_detection(run, replace(setting, out=run / "whole"), plan=plan)
    keep = transfer._keep

    def stop(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "_keep", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_detection(run, setting, plan=plan)
    monkeypatch.setattr(transfer, "_keep", keep)
    evaluate_detection(run, setting, plan=plan)
    one, other = (torch.load(run / folder / "detection_voc.pt")["detector"] for folder in ("whole", "evaluation"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_masks_with_a_frozen_backbone(make_run, coco):
    plan = replace(SMALL, steps=2, freeze=True)
    found = evaluate_detection(make_run(), Setting(data=f"coco:{coco}", workers=0, precision="fp32"), plan=plan)
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
            evaluate_detection(run, Setting(data=data))
    with pytest.raises(ConfigError, match="data: found none"):
        evaluate_detection(run, Setting())
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"bottle"', '"vase"'))
    with pytest.raises(DataError, match="expected the same"):
        evaluate_detection(run, Setting(data=f"coco:{coco}"))
    file.write_text("[]")
    with pytest.raises(DataError, match="found annotations that cannot be read"):
        evaluate_detection(run, Setting(data=f"coco:{coco}"))
    mobile = make_run({"model.backbone": "mobilenet_v3_small", "model.backbone_args": {}}, "mobile")
    with pytest.raises(ConfigError, match="expected ResNets, whose stages are layer1"):
        evaluate_detection(mobile, Setting(data=f"voc:{voc}"))
