"""Detection datasets in the layouts of PASCAL VOC and COCO: images with boxes, and masks where there are any."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from synco_fast.data.errors import one_line
from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.seeding import derive_seed
from synco_fast.runtime.errors import ConfigError, DataError

__all__ = ["DetectionSource", "Detections", "Steps", "open_detection"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

Target = dict[str, Any]


class _Raw(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class DetectionSource:
    """Both splits and the classes, counted from 1; 0 is the background.

    Attributes:
        spec: The source as given.
        layout: ``voc`` or ``coco``.
        train, test: Images with targets.
        classes: Class names in order of label.
        masks: Whether objects have masks.
        sets: What the layout calls the images of ``train`` and of ``test``.
        metric: Whose average precision is measured: ``COCO``, ``VOC 2007`` or ``VOC 2012``.
    """

    spec: str
    layout: str
    train: Detections
    test: Detections
    classes: tuple[str, ...]
    masks: bool
    sets: tuple[str, str]
    metric: str


class Detections(Dataset[tuple[Tensor, Target]]):
    """Images as float32 (3, H, W) in [0, 1], and targets as torchvision's detectors take them.

    A target holds ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` (n,) int64, ``iscrowd`` (n,), of VOC
    ``difficult`` (n,), and with masks ``masks`` (n, H, W) bool.

    Args:
        parts: Datasets of images and raw annotations, concatenated.
        convert: Converts a raw annotation to a target, given the dataset, number and image.
        augment: Whether images are flipped at random and crowds excluded, for training.
        seed: Seed of the flips.
    """

    def __init__(
        self, parts: list[_Raw], convert: Callable[[_Raw, Any, Any], Target], *, augment: bool = False, seed: int = 0
    ) -> None:
        self.parts, self.convert, self.augment, self.seed = parts, convert, augment, seed
        self.flip = v2.RandomHorizontalFlip()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def sha256(self) -> str:
        """SHA-256 over the names of the images, in their order."""
        digest = hashlib.sha256()
        for part in self.parts:
            for name in _names(part):
                digest.update(name.encode(errors="backslashreplace") + b"\0")
        return digest.hexdigest()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, number = key if isinstance(key, tuple) else (0, key)
        inside = number
        for part in self.parts:
            if inside < len(part):
                break
            inside -= len(part)
        try:
            picture, annotation = part[inside]
            image = tv_tensors.Image(v2.functional.pil_to_tensor(picture.convert("RGB")))
        except (OSError, SyntaxError) as error:  # the latter of a damaged PNG or of damaged XML
            name = _names(part)[inside]
            raise DataError(f"data: cannot read the image {name} or its annotation ({one_line(error)})") from error
        target = self.convert(part, annotation, picture)
        if self.augment:
            keep = ~target["iscrowd"].bool()
            target = {name: _rows(value, keep) for name, value in target.items()}
            with contextlib.nullcontext() if get_worker_info() else torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, epoch, number))
                image, target = self.flip(image, target)
        return image.as_subclass(Tensor).float() / 255, {
            name: value.as_subclass(Tensor) for name, value in target.items()
        }


def _names(part: Any) -> list[str]:
    """The names of the images in one of torchvision's datasets of VOC or COCO."""
    if isinstance(part, torchvision.datasets.CocoDetection):
        return [part.coco.imgs[number]["file_name"] for number in part.ids]
    return list(part.images)


def _rows(value: Tensor, keep: Tensor) -> Tensor:
    """The chosen rows; boxes and masks keep their types, so that a flip moves them."""
    return tv_tensors.wrap(value[keep], like=value) if isinstance(value, tv_tensors.TVTensor) else value[keep]


class Steps:
    """Endless batch sampler: the images of each step; ranks take equal parts.

    Args:
        length: Number of images.
        batch: Images per step, over all ranks.
        seed: Seed of the order of each epoch.
        start, end: Steps to yield.
        rank, world: This process and how many there are.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int, end: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch, self.seed = length, batch, seed
        self.start, self.end, self.rank, self.world = start, end, rank, world

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        for step in range(self.start, self.end):
            places = range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
            batch = []
            for epoch, place in (divmod(place, self.length) for place in places):
                if epoch not in orders:
                    orders = {epoch: epoch_order(self.length, seed=self.seed, epoch=epoch).tolist(), **_newest(orders)}
                batch.append((epoch, orders[epoch][place]))
            yield batch


def _newest(orders: dict[int, list[int]]) -> dict[int, list[int]]:
    """Keep the epoch before: a step may cross the border."""
    return dict(list(orders.items())[:1])


def open_detection(spec: str, *, seed: int = 0) -> DetectionSource:
    """Open ``voc:FOLDER`` or ``coco:FOLDER``.

    VOC: the folder that holds ``VOCdevkit/VOC2007`` and, where it is there, ``VOCdevkit/VOC2012``; trained on the
    trainval images of both, tested on test 2007. Where there is no test, val 2012 or else val 2007 is tested on,
    and the train images of that year are trained on; a warning says so. COCO:
    ``annotations/instances_train2017.json``, ``instances_val2017.json`` and the folders ``train2017`` and ``val2017``.

    Raises:
        DataError: Part of the layout is missing, or an object has an unknown class.
        ConfigError: pycocotools, which reads COCO, is missing.
    """
    layout, colon, rest = spec.partition(":")
    if not colon or layout not in ("voc", "coco"):
        raise DataError(f"data: found the source {spec!r}, expected voc:FOLDER or coco:FOLDER")
    folder = Path(rest).expanduser()
    return _open_voc(spec, folder, seed) if layout == "voc" else _open_coco(spec, folder, seed)


def _open_voc(spec: str, folder: Path, seed: int) -> DetectionSource:
    sets = folder / "VOCdevkit" / "{year}" / "ImageSets" / "Main"

    def found(year: str, name: str) -> bool:
        return (Path(str(sets).format(year=f"VOC{year}")) / f"{name}.txt").is_file()

    def part(year: str, name: str) -> _Raw:
        opened: _Raw = torchvision.datasets.VOCDetection(str(folder), year=year, image_set=name)
        return opened

    tested = next(
        ((year, name) for year, name in (("2007", "test"), ("2012", "val"), ("2007", "val")) if found(year, name)), None
    )
    trained = []
    for year in ("2007", "2012"):
        # trainval holds val: what is tested on must not be trained on.
        names = ("train",) if tested == (year, "val") else ("trainval", "train")
        trained += [(year, name) for name in names if found(year, name)][:1]
    if not trained or tested is None:
        raise DataError(
            f"data: found no VOCdevkit/VOC2007/ImageSets/Main with trainval.txt and test.txt in {folder} (or VOC2012, "
            "or train.txt and val.txt)"
        )
    named = " and ".join(f"VOC{year} {name}" for year, name in trained), f"VOC{tested[0]} {tested[1]}"
    if tested[1] == "val":
        warnings.warn(
            f"data: found no VOC2007 test in {folder}: trained on {named[0]}, tested on {named[1]}", stacklevel=3
        )
    # Difficult objects are trained on, as in detectron2 and so in MoCo: dropped, they would count as background.
    train = Detections([part(*pair) for pair in trained], _voc_target, augment=True, seed=seed)
    test = Detections([part(*tested)], _voc_target)
    return DetectionSource(spec, "voc", train, test, VOC_CLASSES, masks=False, sets=named, metric=f"VOC {tested[0]}")


def _voc_target(part: _Raw, annotation: Any, picture: Any) -> Target:
    objects = annotation["annotation"].get("object", [])
    boxes, labels, difficult = [], [], []
    for one in objects:
        if one["name"] not in VOC_CLASSES:
            raise DataError(f"data: found an object {one['name']!r}, expected the twenty classes of VOC")
        corners = (float(one["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
        left, top, right, bottom = corners
        # VOC counts pixels from 1, and its last pixel is inclusive.
        boxes.append([left - 1, top - 1, right, bottom])
        labels.append(VOC_CLASSES.index(one["name"]) + 1)
        difficult.append(int(one.get("difficult", 0)))
    target = _target(boxes, labels, [0] * len(boxes), picture)
    return target | {"difficult": torch.tensor(difficult, dtype=torch.int64)}


def _open_coco(spec: str, folder: Path, seed: int) -> DetectionSource:
    if importlib.util.find_spec("pycocotools") is None:
        raise ConfigError("data: found coco without pycocotools: pip install 'synco-fast[detection]'")
    splits: list[Any] = []
    for name in ("train2017", "val2017"):
        annotations = folder / "annotations" / f"instances_{name}.json"
        if not annotations.is_file() or not (folder / name).is_dir():
            raise DataError(f"data: found no {annotations} with a folder {folder / name}")
        try:
            # pycocotools prints to standard output, where a command's table goes.
            with contextlib.redirect_stdout(io.StringIO()):
                splits.append(torchvision.datasets.CocoDetection(str(folder / name), str(annotations)))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{annotations}: found annotations that cannot be read ({error})") from error
    categories = [{number: one["name"] for number, one in split.coco.cats.items()} for split in splits]
    if categories[0] != categories[1]:
        raise DataError(
            f"data: found {len(categories[0])} classes among the training images of {folder} and {len(categories[1])} "
            "others among the held-out ones, expected the same"
        )
    order = {number: place + 1 for place, number in enumerate(sorted(categories[0]))}
    masks = any(one.get("segmentation") for one in splits[0].coco.anns.values())
    convert = _CocoTarget(order, masks)
    names = tuple(categories[0][number] for number in sorted(categories[0]))
    train = Detections([splits[0]], convert, augment=True, seed=seed)
    test = Detections([splits[1]], convert)
    return DetectionSource(spec, "coco", train, test, names, masks, ("train2017", "val2017"), "COCO")


@dataclass(frozen=True)
class _CocoTarget:
    """Annotations to a target; ``order`` maps category numbers to labels."""

    order: dict[int, int]
    masks: bool

    def __call__(self, part: Any, annotation: Any, picture: Any) -> Target:
        kept = [one for one in annotation if one["bbox"][2] > 0 and one["bbox"][3] > 0]
        boxes = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in kept)]
        crowd = [int(one.get("iscrowd", 0)) for one in kept]
        target = _target(boxes, [self.order[one["category_id"]] for one in kept], crowd, picture)
        if self.masks:
            drawn = [torch.from_numpy(part.coco.annToMask(one)).bool() for one in kept]
            size = (len(kept), picture.height, picture.width)
            target["masks"] = tv_tensors.Mask(torch.stack(drawn) if drawn else torch.zeros(size, dtype=torch.bool))
        return target


def _target(boxes: list[list[float]], labels: list[int], crowd: list[int], picture: Any) -> Target:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(picture.height, picture.width)),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.tensor(crowd, dtype=torch.int64),
    }
