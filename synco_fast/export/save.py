"""A backbone in the form that another tool loads, with a model card beside it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from synco_fast.export.card import write_card
from synco_fast.export.detectron2 import DEPTHS, write_configurations
from synco_fast.export.layouts import to_detectron2, to_moco
from synco_fast.export.load import Weights, backbone_of, read_weights
from synco_fast.export.onnx import write_onnx
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import atomic_write, write_json

__all__ = ["FORMATS", "Exported", "export_checkpoint"]


@dataclass(frozen=True)
class Exported:
    """What was written: the format, the folder, its files by name, and what a check measured, if there was one."""

    format: str
    folder: Path
    files: tuple[str, ...]
    checks: dict[str, float]


def export_checkpoint(path: Path, format: str, out: Path | None = None, *, licence: str | None = None) -> Exported:
    """Write the query encoder's backbone for another tool, and ``README.md`` as its model card.

    Args:
        path: Whatever `synco_fast.export.load.read_weights` takes.
        format: A key of `FORMATS`.
        out: The folder; ``export/FORMAT`` in the run folder by default, or ``export-FORMAT`` in the working folder.
        licence: What the card states.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its backbone has no place in that format.
        ConfigError: The format is unknown, or a package that it needs is missing.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: found {format!r}, expected {', '.join(FORMATS)}")
    weights = read_weights(path)
    folder = out or (weights.run / "export" / format if weights.run else Path(f"export-{format}"))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: found a file {folder}, expected a folder")
    files, checks, usage = FORMATS[format](weights, folder)
    write_card(folder / "README.md", weights, format=format, files=files, usage=usage, checks=checks, licence=licence)
    return Exported(format, folder, (*files, "README.md"), checks)


Written = tuple[tuple[str, ...], dict[str, float], str]


def _torchvision(weights: Weights, folder: Path) -> Written:
    name = _stock_name(weights, "torchvision")
    with atomic_write(folder / "backbone.pth") as file:
        torch.save(_contiguous(weights.backbone), file)
    usage = (
        f"model = torchvision.models.{name}()\n"
        + (_SMALL_STEM if weights.config.model.small_stem else "")
        + 'missing = model.load_state_dict(torch.load("backbone.pth", weights_only=True), strict=False)\n'
        "assert not missing.unexpected_keys    # what is missing is the classifier alone"
    )
    return ("backbone.pth",), {}, "import torch, torchvision\n\n" + usage


def _timm(weights: Weights, folder: Path) -> Written:
    model = weights.config.model
    name = _stock_name(weights, "timm")
    recipe = weights.config.augment
    arguments = model.backbone_args if not _in_torchvision(model.backbone) else {}
    card = {
        "architecture": name,
        "num_classes": 0,
        "num_features": build_backbone(f"timm/{name}", arguments=arguments)[1],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, recipe.size, recipe.size],
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "crop_pct": recipe.size / recipe.resize,
            "interpolation": "bilinear",
            "num_classes": 0,
        },
    }
    with atomic_write(folder / "model.safetensors") as file:
        save_file(_contiguous(weights.backbone), file)
    write_json(folder / "config.json", card)
    if model.small_stem:
        usage = (
            f"model = timm.create_model({name!r}, num_classes=0)\n{_SMALL_STEM}"
            'model.load_state_dict(load_file("model.safetensors"))'
        )
        return ("model.safetensors", "config.json"), {}, f"{_IMPORTS}from safetensors.torch import load_file\n\n{usage}"
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    usage = f'model = timm.create_model({name!r}, num_classes=0, checkpoint_path="model.safetensors"{words})'
    return ("model.safetensors", "config.json"), {}, f"import timm\n\n{usage}"


def _safetensors(weights: Weights, folder: Path) -> Written:
    described = {"synco_fast": json.dumps(_description(weights))}
    with atomic_write(folder / "backbone.safetensors") as file:
        save_file(_contiguous(weights.backbone), file, metadata=described)
    usage = 'import synco_fast\n\nbackbone = synco_fast.load_backbone("backbone.safetensors")'
    return ("backbone.safetensors",), {}, usage


def _moco(weights: Weights, folder: Path) -> Written:
    content = {
        "epoch": round(weights.epochs or 0),
        "arch": weights.config.model.backbone.rpartition("/")[2],
        "state_dict": to_moco(weights.state),
        "synco_fast": _description(weights),
    }
    with atomic_write(folder / "checkpoint.pth.tar") as file:
        torch.save(content, file)
    usage = (
        f"python main_lincls.py -a {content['arch']} --pretrained checkpoint.pth.tar ... /data/imagenet"
        "    # facebookresearch/moco"
    )
    return ("checkpoint.pth.tar",), {}, usage


def _detectron2(weights: Weights, folder: Path) -> Written:
    name = _stock_name(weights, "torchvision")
    if name not in DEPTHS or weights.config.model.small_stem:
        raise CheckpointError(
            f"{weights.file}: found {weights.config.model.backbone}, expected {', '.join(DEPTHS)} with their own stem "
            "for detectron2, whose C4 head is made of bottlenecks"
        )
    arrays = {key: value.numpy() for key, value in to_detectron2(weights.backbone).items()}
    content = {"model": arrays, "__author__": "synco-fast", "matching_heuristics": True}
    with atomic_write(folder / "backbone.pkl") as file:
        file.write_bytes(pickle.dumps(content))
    configurations = write_configurations(folder, weights.config, DEPTHS[name])
    usage = (
        f"python train_net.py --config-file {configurations[0]} --num-gpus 8    # facebookresearch/moco, detection/, "
        "which registers Res5ROIHeadsExtraNorm"
    )
    return ("backbone.pkl", *configurations), {}, usage


def _onnx(weights: Weights, folder: Path) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    difference = write_onnx(backbone_of(weights), weights.config.augment.size, folder / "backbone.onnx")
    usage = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("backbone.onnx")\n'
        '(features,) = session.run(None, {"images": images})    # float32 (B, 3, '
        f"{weights.config.augment.size}, {weights.config.augment.size}), normalised as below"
    )
    return ("backbone.onnx",), {"largest difference to PyTorch, of the largest feature": difference}, usage


FORMATS: dict[str, Callable[[Weights, Path], Written]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "detectron2": _detectron2,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "moco": _moco,
}
"""By name, what writes it; each returns its files, its checks, and the lines that load it."""

_IMPORTS = "import timm, torch\n"
_SMALL_STEM = (
    "model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)\n"
    "model.maxpool = torch.nn.Identity()\n"
)


def _description(weights: Weights) -> dict[str, Any]:
    return {
        "config": weights.config.model_dump(mode="json"),
        "step": weights.step,
        "epochs": weights.epochs,
        "imported": weights.imported,
    }


def _in_torchvision(name: str) -> bool:
    """As `build_backbone` decides."""
    prefix, _, bare = name.rpartition("/")
    return prefix != "timm" and bare in torchvision.models.list_models(module=torchvision.models)


def _stock_name(weights: Weights, library: str) -> str:
    """The model of ``library`` that takes these weights by name and shape.

    Raises:
        CheckpointError: It has none of that name, or one of other names or shapes.
    """
    model = weights.config.model
    bare = model.backbone.rpartition("/")[2]
    known = (
        torchvision.models.list_models(module=torchvision.models) if library == "torchvision" else timm.list_models()
    )
    own = _in_torchvision(model.backbone) == (library == "torchvision")
    shapes = {name: value.shape for name, value in weights.backbone.items()}
    if bare in known:
        module, _ = build_backbone(
            f"{library}/{bare}", arguments=model.backbone_args if own else None, small_stem=model.small_stem
        )
        if {name: value.shape for name, value in module.state_dict().items()} == shapes:
            return bare
    other = "timm" if library == "torchvision" else "safetensors"
    arguments = f" with {model.backbone_args}" if model.backbone_args else ""
    raise CheckpointError(
        f"{weights.file}: found {model.backbone}{arguments}, expected a model that {library} has under that name and "
        f"shape; --format {other} takes it"
    )


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """In plain layout: channels-last strides are nobody else's business."""
    return {name: value.contiguous() for name, value in state.items()}
