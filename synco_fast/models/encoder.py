"""Encoders: any torchvision or timm backbone by name, and the projection head."""

from __future__ import annotations

import difflib
import weakref
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from synco_fast.models.batch_norm import split_batch_norm
from synco_fast.runtime.errors import ConfigError, first_line

__all__ = ["Encoder", "build_backbone"]


class Encoder(nn.Module):
    """A backbone and MoCo v2's projection head (arXiv 2003.04297): two layers with a ReLU between.

    Args:
        backbone: Images (B, 3, H, W) to features (B, ``features``).
        features: Width of the backbone's output.
        dim: D, width of the embedding.
        hidden: Width of the hidden layer, by default that of the features (2048-2048-128 for ResNet-50).

    Attributes:
        remark: A note about how it was built, or None.
    """

    def __init__(self, backbone: nn.Module, features: int, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or features
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))
        self.features = features
        self.remark: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings, (B, D), not normalised."""
        embedding: Tensor = self.head(self.backbone(images))
        return embedding


def build_backbone(
    name: str, *, arguments: dict[str, Any] | None = None, small_stem: bool = False, batch_norm_groups: int = 1
) -> tuple[nn.Module, int]:
    """A backbone without its classifier.

    Args:
        name: A torchvision model (``resnet50``), or a timm model (``timm/convnext_tiny``; the prefix is optional
            where torchvision has no model of that name).
        arguments: Keyword arguments of the model's constructor.
        small_stem: For ResNets on images of about 32 x 32: a 3 x 3 convolution of stride 1 and no max-pooling, as in
            the ResNet paper for CIFAR (arXiv 1512.03385 section 4.2).
        batch_norm_groups: Groups of batch norm; see `SplitBatchNorm2d`.

    Returns:
        The module and the width of its features.

    Raises:
        ConfigError: Unknown model, unknown arguments, or no ResNet stem to make small.
    """
    prefix, _, bare = name.rpartition("/")
    if prefix not in ("", "timm", "torchvision"):
        raise ConfigError(f"model.backbone: found {name!r}, expected NAME, torchvision/NAME or timm/NAME")
    in_torchvision = prefix != "timm" and bare in torchvision.models.list_models(module=torchvision.models)
    try:
        if in_torchvision:
            module, features = _strip(torchvision.models.get_model(bare, weights=None, **(arguments or {})), name)
        elif prefix != "torchvision" and _timm().is_model(bare):
            module = _timm().create_model(bare, pretrained=False, num_classes=0, **(arguments or {}))
            # Where a layer lies between the pooling and the classifier, num_features is the width before that layer.
            features = int(getattr(module, "head_hidden_size", None) or module.num_features)
        else:
            raise ConfigError(f"model.backbone: found {name!r}, expected a torchvision or timm model{_nearest(bare)}")
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # constructors raise what their arguments lead to, such as ZeroDivisionError
        if not (arguments or isinstance(error, TypeError)):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"model.backbone_args: {name} does not take them ({reason})") from error
    if small_stem:
        _shrink_stem(module, name)
    return split_batch_norm(module, batch_norm_groups), features


def _timm() -> Any:
    """The library, imported where a model of it is needed: that takes a second, which most runs need not wait."""
    import timm

    return timm


def _nearest(name: str) -> str:
    known = {*torchvision.models.list_models(module=torchvision.models), *_timm().list_models()}
    near = difflib.get_close_matches(name, known, n=3)
    return f" (nearest: {', '.join(near)})" if near else ""


def _strip(module: nn.Module, name: str) -> tuple[nn.Module, int]:
    """A torchvision model whose last linear layer is replaced by the identity, and that layer's input width."""
    for path, layer in reversed(list(module.named_modules())):
        if isinstance(layer, nn.Linear) and path.split(".")[0] in ("fc", "classifier", "head", "heads"):
            parent, _, last = path.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Identity())
            return module, layer.in_features
    raise ConfigError(f"model.backbone: found no classifier to remove from {name}; try timm/NAME")


def _shrink_stem(module: nn.Module, name: str) -> None:
    stem = getattr(module, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(module, "maxpool"):
        raise ConfigError(
            f"model.small_stem: found true, expected for ResNets whose stem is one convolution, not {name}"
        )
    module.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()


def parameters_of(name: str, arguments: dict[str, Any]) -> int:
    """How many numbers a backbone's weights are, without making them; 0 where nobody knows."""
    try:
        with torch.device("meta"):
            module, _ = build_backbone(name, arguments=arguments)
    except Exception:  # some constructors compute with their weights; what is wrong is said where they are made
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def check_input(
    module: nn.Module, size: int, name: str, width: int, key: str = "augment.size", together: int = 2
) -> int:
    """Run one blank image through the backbone, so that an unsupported size is reported before training.

    Args:
        module: The backbone.
        size: Side of the image.
        name: What the message calls the backbone.
        width: How many features it should give.
        key: The key of the configuration that the size comes from.
        together: Images whose statistics a batch norm takes together.

    Returns:
        How many numbers a training step must keep of one image at least: the inputs of convolutions and linear layers.

    Raises:
        ConfigError: The backbone does not support images of this size, or a batch norm would get one value a channel.
    """
    kept = 0
    fewest = 2  # or more values of a channel, or 1
    seen: weakref.WeakSet[Tensor] = weakref.WeakSet()  # layers side by side keep one input

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal kept
        if inputs and isinstance(inputs[0], Tensor) and not any(inputs[0] is one for one in seen):
            kept += inputs[0].numel()
            seen.add(inputs[0])

    def count(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal fewest
        if inputs and isinstance(inputs[0], Tensor):
            fewest = min(fewest, together * inputs[0][0, 0].numel())

    was_training = module.training
    hooks = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_pre_hook(keep))
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            hooks.append(layer.register_forward_pre_hook(count))
    try:
        features = module.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a model's own checks raise
        raise ConfigError(f"{key}: found {size}, which {name} cannot take ({first_line(error)})") from error
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    if features.dim() != 2 or features.shape[1] != width:
        raise ConfigError(
            f"model.backbone: found {name}, whose output has shape {tuple(features.shape)}, expected (B, {width})"
        )
    if fewest == 1:
        raise ConfigError(
            f"{key}: found {size}, at which a batch norm of {name} gets one value a channel, expected larger images, "
            "more of them (training.batch), or fewer groups (model.batch_norm_groups)"
        )
    return kept
