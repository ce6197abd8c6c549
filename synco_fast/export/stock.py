"""The torchvision or timm model of a backbone's name, shared by the exports to both."""

from __future__ import annotations

import torchvision
from torch import Tensor

from synco_fast.export.load import Weights
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.errors import CheckpointError

__all__ = ["SMALL_STEM", "contiguous", "in_torchvision", "stock_name"]

SMALL_STEM = (
    "model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)\n"
    "model.maxpool = torch.nn.Identity()\n"
)
"""Code that gives a library's ResNet the small stem."""


def in_torchvision(name: str) -> bool:
    """Whether `build_backbone` takes the model of this name from torchvision."""
    prefix, _, bare = name.rpartition("/")
    return prefix != "timm" and bare in torchvision.models.list_models(module=torchvision.models)


def stock_name(weights: Weights, library: str) -> str:
    """The model of ``library`` whose tensors have the names and shapes of these weights.

    Raises:
        CheckpointError: There is no such model, or its names or shapes differ.
    """
    model = weights.config.model
    bare = model.backbone.rpartition("/")[2]
    if library == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
    else:
        import timm

        known = timm.list_models()
    own = in_torchvision(model.backbone) == (library == "torchvision")
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


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies; otherwise channels-last strides would be stored with the tensors."""
    return {name: value.contiguous() for name, value in state.items()}
