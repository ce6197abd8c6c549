"""Conversion of published checkpoints to synco-fast's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from synco_fast.config import Config, build_config
from synco_fast.export.layouts import backbone_in, from_moco, is_moco, plain_state
from synco_fast.export.load import Weights
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.checkpoint import FORMAT, load_weights, read_tensors
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import atomic_write

__all__ = ["foreign_state", "import_checkpoint", "read_content"]

_BACKBONE = "encoder.backbone."
#: Side of the images that a ResNet with the small stem is for, as in the preset ``synco-r18-cifar``.
SMALL = 32


def import_checkpoint(
    path: Path, out: Path, *, method: str, backbone: str | None = None, size: int | None = None
) -> Weights:
    """Convert a published checkpoint to synco-fast's format, which every command accepts.

    Args:
        path: In the layout of the authors' checkpoints of MoCo, MoCHi and SynCo (``state_dict`` with
            ``module.encoder_q.*``), or a backbone alone under torchvision's or timm's names (``.pth``,
            ``.safetensors``), with or without a classifier, also in a checkpoint of solo-learn, lightly, MoCo v3, SwAV,
            DINO (its teacher) or VISSL. A ResNet with a stem of 3 x 3 is taken as one with the small stem.
        out: The file to write.
        method: The method that pretrained it: ``moco``, ``mochi`` or ``synco``.
        backbone: The architecture; by default the one named in the file.
        size: Side of the images that evaluations give it; 224 by default, 32 with the small stem.

    Raises:
        CheckpointError: The file cannot be read, carries code, has no encoder, or another architecture.
        ConfigError: The architecture is not named, or unknown here.
    """
    content = read_content(path)
    state = foreign_state(content, path)
    epoch = content.get("epoch")
    if is_moco(content):
        backbone = backbone or content.get("arch")
    if backbone is None:
        raise ConfigError(f"backbone: found no architecture in {path}, expected --backbone NAME, such as resnet50")
    known = {"from": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "epoch": epoch}
    values = _values(state, str(backbone), method, path.name)
    inside, small_stem = _backbone(state, str(backbone))
    values["model"]["small_stem"] = small_stem
    if small_stem:
        values["augment"] = {"size": size or SMALL, "evaluation_resize": size or SMALL}
    elif size is not None:
        values["augment"] = {"size": size}
    config = build_config(values)
    weights = Weights(
        config=config,
        state=_fitting(state, inside, config, path),
        file=path,
        step=0,
        epochs=epoch,
        imported=known,
    )
    _write(out, weights)
    return weights


def foreign_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a published checkpoint by our names.

    Args:
        content: The authors' layout, or a backbone's ``state_dict`` with its classifier, where `plain_state` finds it.
        path: The file it was read from, for the message.

    Raises:
        CheckpointError: It has no encoder.
    """
    if is_moco(content):
        state = from_moco(content["state_dict"], str(path))
        if not any(name.startswith("encoder.") for name in state):
            raise CheckpointError(f"{path}: found no encoder in it, expected names that begin with module.encoder_q.")
        return state
    plain = plain_state(content)
    if not isinstance(plain, dict) or not plain or not all(isinstance(value, Tensor) for value in plain.values()):
        raise CheckpointError(f"{path}: found no encoder in it, expected a state_dict of tensors")
    return {f"{_BACKBONE}{name}": value for name, value in plain.items()}


def read_content(path: Path) -> Any:
    """Read a file of ``torch.save`` or of safetensors.

    Raises:
        CheckpointError: The file is missing or damaged, or carries code.
    """
    if path.suffix != ".safetensors":
        return read_tensors(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: found no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: found a file that is cut short or damaged ({error})") from error


def _backbone(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], bool]:
    """The backbone's tensors by its own names, without its classifier, and whether it has the small stem."""
    module, _ = build_backbone(name)
    own = module.state_dict()
    found = {key.removeprefix(_BACKBONE): value for key, value in state.items() if key.startswith(_BACKBONE)}
    inside = backbone_in(found, own.keys())
    stems = [tensors["conv1.weight"].shape[2:] if "conv1.weight" in tensors else () for tensors in (inside, own)]
    return inside, hasattr(module, "maxpool") and stems == [(3, 3), (7, 7)]


def _fitting(state: dict[str, Tensor], inside: dict[str, Tensor], config: Config, path: Path) -> dict[str, Tensor]:
    """The tensors with the backbone's from `_backbone`, checked to be those of the architecture.

    Raises:
        CheckpointError: They are not.
    """
    module, _ = build_backbone(config.model.backbone, small_stem=config.model.small_stem)
    load_weights(module, inside, path, name=config.model.backbone, cast=True)
    rest = {name: value for name, value in state.items() if not name.startswith(_BACKBONE)}
    return {f"{_BACKBONE}{name}": value for name, value in inside.items()} | rest


def _values(state: dict[str, Tensor], backbone: str, method: str, name: str) -> dict[str, Any]:
    """The configuration, as far as the tensors determine it; the rest has defaults."""
    queue = len(state["queue.rows"]) if "queue.rows" in state else 65536
    head = [value for key, value in state.items() if key.startswith("encoder.head.") and value.dim() == 2]
    model: dict[str, Any] = {"backbone": backbone, "batch_norm_groups": 1}
    if head:
        model |= {"dim": len(head[-1]), "hidden": len(head[0]) if len(head) > 1 else None}
    return {
        "preset": "imported",
        "about": f"imported from {name}",
        "data": {"source": "unknown"},
        "model": model,
        "method": {"name": method, "queue": queue, "hard": min(1024, queue)},
        "training": {"batch": min(256, queue)},
    }


def _write(out: Path, weights: Weights) -> None:
    content = {
        "format": FORMAT,
        "step": 0,
        "config": weights.config.model_dump(mode="json"),
        "method": weights.state,
        "imported": weights.imported,
    }
    with atomic_write(out) as temporary:
        torch.save(content, temporary)
