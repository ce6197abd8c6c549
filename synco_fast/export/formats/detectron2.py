"""``backbone.pkl`` for detectron2, with the published detection configurations beside it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import yaml

from synco_fast.config import Config
from synco_fast.export.formats import Written
from synco_fast.export.layouts import to_detectron2
from synco_fast.export.load import Weights
from synco_fast.export.stock import stock_name
from synco_fast.runtime.errors import CheckpointError
from synco_fast.runtime.files import atomic_write, write_text

__all__ = ["DEPTHS", "write", "write_configurations"]

DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}
"""The bottleneck ResNets that detectron2 builds, by depth."""

_VOC: dict[str, Any] = {
    "MODEL": {"MASK_ON": False, "ROI_HEADS": {"NUM_CLASSES": 20}},
    "INPUT": {"MIN_SIZE_TRAIN": list(range(480, 801, 32)), "MIN_SIZE_TEST": 800},
    "DATASETS": {"TRAIN": ["voc_2007_trainval", "voc_2012_trainval"], "TEST": ["voc_2007_test"]},
    "SOLVER": {"STEPS": [18000, 22000], "MAX_ITER": 24000, "WARMUP_ITERS": 100},
}
_COCO: dict[str, Any] = {
    "MODEL": {"MASK_ON": True},
    "INPUT": {"MIN_SIZE_TRAIN": list(range(640, 801, 32)), "MIN_SIZE_TEST": 800},
    "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]},
    "SOLVER": {"STEPS": [120000, 160000], "MAX_ITER": 180000},
}
_ABOUT = (
    "# The C4 detector that MoCo, MoCHi and SynCo report: {what}.\n"
    "# Res5ROIHeadsExtraNorm is registered by detection/train_net.py of facebookresearch/moco.\n"
)


def write(weights: Weights, folder: Path) -> Written:
    """Write the backbone for the C4 detectors of facebookresearch/moco.

    Raises:
        CheckpointError: The backbone is not a ResNet-50, 101 or 152 with the standard stem.
    """
    name = stock_name(weights, "torchvision")
    if name not in DEPTHS or weights.config.model.small_stem:
        raise CheckpointError(
            f"{weights.file}: found {weights.config.model.backbone}, expected {', '.join(DEPTHS)} with their own stem "
            "for detectron2, whose C4 head is made of bottlenecks"
        )
    arrays = {key: value.numpy() for key, value in to_detectron2(weights.backbone).items()}
    with atomic_write(folder / "backbone.pkl") as file:
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "synco-fast", "matching_heuristics": True}))
    configurations = write_configurations(folder, weights.config, DEPTHS[name])
    usage = (
        f"python train_net.py --config-file {configurations[0]} --num-gpus 8    # facebookresearch/moco, detection/, "
        "which registers Res5ROIHeadsExtraNorm"
    )
    return ("backbone.pkl", *configurations), {}, usage


def write_configurations(folder: Path, config: Config, depth: int) -> tuple[str, ...]:
    """Write the two configurations and return their names.

    Args:
        folder: Folder of ``backbone.pkl``.
        config: Gives mean and standard deviation of the channels.
        depth: Depth of the ResNet.
    """
    written = []
    for name, part, what in (
        (f"voc_R_{depth}_C4_24k.yaml", _VOC, "PASCAL VOC, trainval 07+12, 24k iterations"),
        (f"coco_R_{depth}_C4_2x.yaml", _COCO, "COCO 2017 with masks, 2x schedule"),
    ):
        values = _merge(_common(config, depth), part)
        text = _ABOUT.format(what=what) + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
        write_text(folder / name, text)
        written.append(name)
    return tuple(written)


def _common(config: Config, depth: int) -> dict[str, Any]:
    """The values of facebookresearch/moco, detection/configs, with this run's weights and pixel statistics."""
    return {
        "MODEL": {
            "META_ARCHITECTURE": "GeneralizedRCNN",
            "WEIGHTS": "backbone.pkl",
            "PIXEL_MEAN": [round(255 * value, 3) for value in config.augment.mean],
            "PIXEL_STD": [round(255 * value, 3) for value in config.augment.std],
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {"DEPTH": depth, "NORM": "SyncBN", "STRIDE_IN_1X1": False},
            "RPN": {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000},
            "ROI_HEADS": {"NAME": "Res5ROIHeadsExtraNorm"},
        },
        "INPUT": {"FORMAT": "RGB"},
        "SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02},
        "TEST": {"PRECISE_BN": {"ENABLED": True}},
    }


def _merge(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in part.items():
        merged[key] = _merge(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged
