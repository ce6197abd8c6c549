"""Tensor names of other layouts: the authors' checkpoints, those of other projects, and detectron2's ResNets."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from synco_fast.runtime.errors import CheckpointError

__all__ = ["backbone_in", "from_moco", "is_moco", "plain_state", "to_detectron2", "to_moco"]

_MOCO_ENCODERS = {"encoder": "module.encoder_q", "key_encoder": "module.encoder_k"}
_PREFIX = re.compile(r"(?:module\.)?(encoder_q|encoder_k)\.(.+)")
#: What DistributedDataParallel and torch.compile put before the names of all tensors.
_WRAPPERS = ("module.", "_orig_mod.")
#: First words of the names of a classifier, in torchvision and timm, and of the heads beside SwAV's encoder.
_CLASSIFIERS = ("fc", "classifier", "head", "heads", "projection_head", "prototypes")
#: Where a checkpoint has its encoder: at the top; in solo-learn, lightly and DINO; in older solo-learn; in MoCo v3; in
#: VISSL.
_ENCODERS = ("", "backbone.", "encoder.", "base_encoder.", "_feature_blocks.")
#: The children of torchvision's and timm's ResNets that have tensors, by number: lightly's examples number them.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def to_moco(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors as in facebookresearch/moco's checkpoints, which MoCHi and SynCo share.

    The backbone lies right below ``module.encoder_q.``, the projection head at ``module.encoder_q.fc.``; the queue is
    (D, K) float32 with a pointer of one element. The image ids of the keys have no place there and are omitted.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        encoder, _, rest = name.partition(".")
        if encoder in _MOCO_ENCODERS:
            part, _, last = rest.partition(".")
            inside = last if part == "backbone" else f"fc.{last}"
            renamed[f"{_MOCO_ENCODERS[encoder]}.{inside}"] = value.contiguous()
        elif name == "queue.rows":
            renamed["module.queue"] = value.T.float().contiguous()
        elif name == "queue.pointer":
            renamed["module.queue_ptr"] = value.reshape(1)
    return renamed


def is_moco(state: Any) -> bool:
    """Whether a checkpoint has the authors' layout."""
    inside = state.get("state_dict") if isinstance(state, dict) else None
    return isinstance(inside, dict) and any(_PREFIX.fullmatch(str(name)) for name in inside)


def from_moco(state: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """The inverse of `to_moco`; also takes names without ``module.``, MoCo v1's linear head, and SynCo's queue (K, D).

    Raises:
        CheckpointError: A name is not in the layout.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        if found := _PREFIX.fullmatch(name):
            ours = "encoder" if found[1] == "encoder_q" else "key_encoder"
            head = found[2].removeprefix("fc.")
            renamed[f"{ours}.head.{head}" if head != found[2] else f"{ours}.backbone.{head}"] = value
        elif name.removeprefix("module.") == "queue":
            renamed["queue.rows"] = rows = _keys_as_rows(value, state)
            renamed["queue.image_ids"] = torch.full((len(rows),), -1)
        elif name.removeprefix("module.") == "queue_ptr":
            renamed["queue.pointer"] = value.reshape(())
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{file}: found {', '.join(unknown[:8])} ({len(unknown)} in all), expected module.encoder_q.*, "
            "module.encoder_k.*, module.queue and module.queue_ptr"
        )
    return renamed


def _keys_as_rows(queue: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A queue as (K, D): MoCo stores (D, K), SynCo (K, D). D is the output of the query encoder's head."""
    layers = [value for name, value in state.items() if ".fc." in name and "encoder_q." in name and value.dim() == 2]
    return (queue if layers and len(queue) != len(layers[-1]) else queue.T).contiguous()


def to_detectron2(backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a torchvision ResNet's tensors as in detectron2: ``layer1.0.bn2.bias`` is ``res2.0.conv2.norm.bias``.

    ``num_batches_tracked`` has no place there and is omitted. The tensors are float32: NumPy, in whose arrays the file
    holds them, has no bfloat16.
    """
    named = {_detectron2_name(name): value for name, value in backbone.items()}
    return {name: value.float() for name, value in named.items() if "num_batches_tracked" not in name}


def _detectron2_name(name: str) -> str:
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def plain_state(content: Any) -> Any:
    """Where a checkpoint that is not of the authors' layout has its tensors by name, or what stands in their place.

    That is at the top, below ``state_dict`` or ``model``, below ``teacher`` in DINO, or below the trunk of VISSL.
    """
    for way in (("state_dict",), ("model",), ("teacher",), ("classy_state_dict", "base_model", "model", "trunk")):
        found = content
        for key in way:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return found
    return content


def backbone_in(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a backbone by its own names, without those of a classifier.

    Of a checkpoint of another project, what lies beside the encoder is dropped. A head can also hold a norm that the
    backbone keeps, so the names alone do not decide.

    Args:
        state: By the backbone's own names, or below a prefix of `_ENCODERS`; each also below ``module.`` or
            ``_orig_mod.``, as DistributedDataParallel and torch.compile name them.
        own: The names of the backbone's tensors once its classifier is removed.
    """
    while wrapper := next((word for word in _WRAPPERS if state and all(name.startswith(word) for name in state)), ""):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    for prefix in _ENCODERS if state.keys().isdisjoint(own) else ():
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for named in (inside, _children_named(inside)):
            if not named.keys().isdisjoint(own):
                state = named
                break
    return {name: value for name, value in state.items() if name in own or name.split(".")[0] not in _CLASSIFIERS}


def _children_named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors by name where they are by number, as in a `torch.nn.Sequential` of its children."""
    return {
        re.sub(r"^\d+(?=\.)", lambda found: _CHILDREN.get(found[0], found[0]), name): value
        for name, value in state.items()
    }
