"""Weights to start a run from: a run, a checkpoint, a file of weights, or the published weights of a library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from synco_fast.config import ModelConfig
from synco_fast.export.import_checkpoint import foreign_state, read_content
from synco_fast.export.layouts import backbone_in, is_moco
from synco_fast.export.load import Weights, describes_itself, read_weights, weights_in
from synco_fast.models.encoder import Encoder
from synco_fast.runtime.checkpoint import load_weights
from synco_fast.runtime.errors import CheckpointError, first_line

__all__ = ["InitialWeights", "load_initial", "read_initial"]

_BACKBONE, _HEAD = "encoder.backbone.", "encoder.head."


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from.

    Attributes:
        backbone: Tensors by the names in the file, as `synco_fast.export.layouts.backbone_in` takes them.
        head: Tensors of the projection head; empty without one.
        title: Where they come from, for messages.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    title: str


def read_initial(spec: str, model: ModelConfig) -> InitialWeights:
    """Read the weights that ``model.init`` names.

    Args:
        spec: A run folder; a checkpoint, imported or not; an export; a ``state_dict`` under torchvision's or timm's
            names; ``torchvision/NAME`` or ``timm/NAME`` for the weights that the library publishes, from its cache or
            the network.
        model: The architecture that they are for.

    Raises:
        CheckpointError: There is no such file or name, it cannot be read or fetched, or it has no backbone.
    """
    path = Path(spec).expanduser()
    library, slash, name = spec.partition("/")
    if not path.exists() and slash and library in ("timm", "torchvision"):
        return InitialWeights(_published(library, name, model), {}, spec)
    if not path.exists():
        raise CheckpointError(
            f"model.init: found {spec!r}, expected a run, a checkpoint, a file, torchvision/NAME or timm/NAME"
        )
    state, title = _read(path)
    return InitialWeights(_below(_BACKBONE, state), _below(_HEAD, state), title)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by our names, and the file with what is known of its age."""
    weights: Weights | None
    if path.is_dir() or (path.suffix == ".safetensors" and describes_itself(path)):
        weights = read_weights(path)
    else:
        content = read_content(path)
        weights = weights_in(content, path)
    if weights is not None:
        return weights.state, f"{weights.file}" + (f", epoch {weights.epochs:.3g}" if weights.epochs else "")
    age = f", epoch {content['epoch']}" if is_moco(content) and type(content.get("epoch")) is int else ""
    return foreign_state(content, path), f"{path}{age}"


def _published(library: str, name: str, model: ModelConfig) -> dict[str, Tensor]:
    """The weights that a library publishes, without a classifier where the library can leave it away."""
    try:
        if library == "torchvision":
            weights = torchvision.models.get_weight(name) if "." in name else _default(name)
            return dict(weights.get_state_dict(progress=False, check_hash=True))
        import timm  # takes a second, and most runs do not need it

        # timm adapts its weights to arguments such as img_size, where they are for the same architecture.
        same = name.partition(".")[0] == model.backbone.rpartition("/")[2]
        arguments = model.backbone_args if same else {}
        made = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
        return dict(made.state_dict())
    except Exception as error:  # of the network, of a cache, of unknown names: many kinds
        raise CheckpointError(
            f"model.init: found {library}/{name}, whose weights cannot be had ({first_line(error)}), expected a name "
            f"that {library} has weights for, in its cache or within reach"
        ) from error


def _default(name: str) -> Any:
    return torchvision.models.get_model_weights(name).DEFAULT


def load_initial(encoder: Encoder, initial: InitialWeights, model: ModelConfig) -> str:
    """Load initial weights into an encoder, strictly: the same names and shapes.

    Args:
        encoder: Changed in place.
        initial: The weights; a classifier among them is ignored.
        model: Names the architecture, and whether the projection head is loaded (``model.init_head``).

    Returns:
        A line about what was loaded.

    Raises:
        CheckpointError: The weights belong to another architecture.
    """
    backbone = backbone_in(initial.backbone, encoder.backbone.state_dict().keys())
    if not backbone:
        raise CheckpointError(f"model.init: found no backbone in {initial.title}")
    _load(encoder.backbone, backbone, initial, model.backbone)
    loaded = f"backbone ({len(backbone)} tensors)"
    if initial.head and model.init_head:
        try:
            _load(encoder.head, initial.head, initial, f"the projection head (model.dim {model.dim})")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --model.init_head false takes the backbone alone") from error
        loaded += f" and projection head ({len(initial.head)} tensors)"
    return f"initial weights: {loaded} from {initial.title}"


def _load(module: nn.Module, state: dict[str, Tensor], initial: InitialWeights, name: str) -> None:
    load_weights(module, state, f"model.init: {initial.title}", name=name, cast=True)
