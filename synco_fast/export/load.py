"""Loading weights and backbones from files, without running code."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from synco_fast.config import Config, build_config
from synco_fast.export.layouts import from_moco, is_moco
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    is_checkpoint,
    load_weights,
    read_tensors,
)
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import named_path

__all__ = ["Weights", "backbone_of", "describes_itself", "load_backbone", "read_weights", "weights_in"]

_BACKBONE = "encoder.backbone."


@dataclass(frozen=True)
class Weights:
    """The weights in a file: at least the query encoder's backbone.

    Attributes:
        config: The training configuration; for imported weights, what is known of it.
        state: Tensors by our names (``encoder.backbone.*``, ``encoder.head.*``, ``key_encoder.*``, ``queue.*``).
        file: The file they were read from.
        run: The run folder that wrote the file, if any.
        step: Training steps done, if known.
        epochs: Epochs done, if known.
        imported: Origin of imported weights; empty for our own.
    """

    config: Config
    state: dict[str, Tensor]
    file: Path
    run: Path | None = None
    step: int | None = None
    epochs: float | None = None
    imported: dict[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> dict[str, Tensor]:
        """The query encoder's backbone, by the backbone's own names."""
        return {name.removeprefix(_BACKBONE): value for name, value in self.state.items() if name.startswith(_BACKBONE)}

    def description(self) -> dict[str, Any]:
        """The description in an exported file, as JSON; `read_weights` reads it back."""
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "epochs": self.epochs,
            "imported": self.imported,
        }


def load_backbone(path: str | Path) -> nn.Module:
    """The pretrained backbone as a plain module in evaluation mode: images (B, 3, H, W) to features (B, F).

    Args:
        path: A run folder, one of its checkpoints, an imported or exported file (``.pt``, ``.safetensors``, or the
            layout of the authors' checkpoints), or the folder of an export to safetensors or timm.

    Raises:
        CheckpointError: The file is missing, carries code, has no encoder, or another architecture.
        ConfigError: Its backbone is unknown.
        UserError: The path is empty, or that of a user who is not here.
    """
    return backbone_of(read_weights(named_path(path, "checkpoint")))


def backbone_of(weights: Weights) -> nn.Module:
    """The backbone of read weights, in evaluation mode, with PyTorch's own batch norm."""
    model = weights.config.model
    module, _ = build_backbone(model.backbone, arguments=model.backbone_args, small_stem=model.small_stem)
    load_weights(module, weights.backbone, weights.file, name=model.backbone, cast=True)
    return module.eval()


def read_weights(path: Path) -> Weights:
    """Read whatever `load_backbone` takes; warns of each newer checkpoint of a run that cannot be read.

    Raises:
        CheckpointError: The file is missing, carries code, or has no encoder.
    """
    if path.is_dir():
        for name in ("backbone.safetensors", "model.safetensors"):
            if (path / name).is_file():
                return _from_safetensors(path / name)
        found: list[Weights] = []
        _, _, problems = find_checkpoint(path, lambda state, file: found.append(_own(state, file)))
        for problem in problems:
            warnings.warn(f"{problem}; taking {found[0].file.name}", stacklevel=2)
        return found[0]
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    content = read_tensors(path)
    weights = weights_in(content, path)
    if weights is not None:
        return weights
    if is_moco(content):
        raise CheckpointError(
            f"{path}: found a checkpoint in the authors' layout, expected one of synco-fast: "
            f"'synco-fast import {path} --method NAME' turns it into one"
        )
    raise CheckpointError(
        f"{path}: found no encoder in it, expected a checkpoint of synco-fast; 'synco-fast import' reads other weights"
    )


def weights_in(content: Any, path: Path) -> Weights | None:
    """The weights in what `read_tensors` returned; None if it is no checkpoint or export of synco-fast.

    Raises:
        CheckpointError: It is one without an encoder, or damaged.
    """
    if is_checkpoint(content) and "method" in content:
        return _own(check_checkpoint(content, path), path)
    if is_moco(content) and isinstance(content.get("synco_fast"), dict):
        return _described(content["synco_fast"], from_moco(content["state_dict"], str(path)), path)
    return None


def describes_itself(path: Path) -> bool:
    """Whether a file of safetensors is an export of synco-fast; reads its header alone.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return "synco_fast" in (file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: found a file that is cut short or damaged ({error})") from error


def _own(content: dict[str, Any], file: Path) -> Weights:
    state = content.get("method")
    state = {name: value for name, value in state.items() if isinstance(name, str)} if isinstance(state, dict) else {}
    if not isinstance(content.get("config"), dict) or not any(name.startswith(_BACKBONE) for name in state):
        raise CheckpointError(f"{file}: found no encoder in it, expected a checkpoint of synco-fast")
    run = file.resolve().parent.parent
    length, imported = content.get("steps_per_epoch"), content.get("imported")
    imported = imported if isinstance(imported, dict) else {}
    try:
        config = build_config(content["config"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: found settings in it that cannot be read ({error})") from error
    return Weights(
        config=config,
        state=content["method"],
        file=file,
        run=run if not imported and (run / "config.yaml").is_file() else None,
        step=content.get("step"),
        epochs=content["step"] / length if isinstance(length, int) and length > 0 else imported.get("epoch"),
        imported=imported,
    )


def _from_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise CheckpointError(f"checkpoint: found no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("synco_fast")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path}: found a file that is cut short or damaged ({error})") from error
    if described is None:
        raise CheckpointError(
            f"{path}: found no description of its architecture, expected a file that 'synco-fast export' wrote, "
            f"or 'synco-fast import {path} --backbone NAME --method NAME'"
        )
    return _described(_parsed(described, path), {f"{_BACKBONE}{name}": value for name, value in state.items()}, path)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: found a description that cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _described(described: dict[str, Any], state: dict[str, Tensor], path: Path) -> Weights:
    """Weights from a file that carries the description of our exports."""
    try:
        config = build_config(described["config"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: found a description that cannot be read ({error})") from error
    return Weights(
        config=config,
        state=state,
        file=path,
        step=described.get("step"),
        epochs=described.get("epochs"),
        imported=described.get("imported") or {"from": path.name},
    )
