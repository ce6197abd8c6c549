"""A made-up detection set of bright and dark rectangles, in both layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


def scene(number: int) -> tuple[Image.Image, list[int], int]:
    """A gray image with one rectangle: its x, y, width and height, and whether it is dark (0) or bright (1)."""
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
