"""ResNets with fused batch norm, residual add and ReLU: torchvision's and timm's, recognised by class.

A block keeps its modules and their names, so its state dict is unchanged; only its forward pass differs. Blocks that
are not recognised keep their modules.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, cast

from timm.models import resnet as timm_resnet
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from synco_fast.kernels.norm import NormBackend
from synco_fast.models.batch_norm import FusedBatchNorm2d, split_batch_norm

__all__ = ["Fusion", "fuse_batch_norm"]


class _TorchvisionBasicBlock(torchvision_resnet.BasicBlock):
    """`torchvision.models.resnet.BasicBlock` with add and ReLU inside its norms."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        return cast(Tensor, self.bn2(self.conv2(out), identity))


class _TorchvisionBottleneck(torchvision_resnet.Bottleneck):
    """`torchvision.models.resnet.Bottleneck` with add and ReLU inside its norms."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return cast(Tensor, self.bn3(self.conv3(out), identity))


def _timm_end(block: Any, x: Tensor, shortcut: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
    """The end of a timm block; any module between the last norm and the add prevents their fusion."""
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    if getattr(norm, "relu", False):
        return cast(Tensor, norm(x, shortcut))
    x = norm(x)
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    return cast(Tensor, act(x + shortcut))


class _TimmBasicBlock(timm_resnet.BasicBlock):
    """`timm.models.resnet.BasicBlock` with ReLUs, and the add where possible, inside its norms."""

    def forward(self, x: Tensor) -> Tensor:
        out = cast(nn.Module, self.aa)(self.bn1(self.conv1(x)))
        return _timm_end(self, self.conv2(out), x, self.bn2, self.act2)


class _TimmBottleneck(timm_resnet.Bottleneck):
    """`timm.models.resnet.Bottleneck` with ReLUs, and the add where possible, inside its norms."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = cast(nn.Module, self.aa)(self.bn2(self.conv2(out)))
        return _timm_end(self, self.conv3(out), x, self.bn3, self.act3)


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    torchvision_resnet.BasicBlock: _TorchvisionBasicBlock,
    torchvision_resnet.Bottleneck: _TorchvisionBottleneck,
    timm_resnet.BasicBlock: _TimmBasicBlock,
    timm_resnet.Bottleneck: _TimmBottleneck,
}
_KINDS = ("norm + add + ReLU", "norm + ReLU", "norm alone")


class Fusion:
    """What was fused in a backbone.

    Attributes:
        counts: Norms of each kind, by "norm + add + ReLU", "norm + ReLU" and "norm alone".
        plain: `torch.nn.BatchNorm2d` (or `SplitBatchNorm2d`) modules left as they were.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.plain = 0

    @property
    def whole(self) -> bool:
        """Whether every norm is fused."""
        return not self.plain

    def __str__(self) -> str:
        """One line about what was fused and what was not."""
        if not self.counts:
            return "nothing fused: none of its blocks is a ResNet block of torchvision or timm"
        fused = ", ".join(f"{self.counts[kind]} {kind}" for kind in _KINDS if self.counts[kind])
        return f"fused {fused}" + (f"; not fused: {self.plain} norms" if self.plain else "")


def fuse_batch_norm(module: nn.Module, groups: int = 1, backend: NormBackend = "auto") -> Fusion:
    """Fuse the norms of the ResNet blocks in ``module`` with the add and ReLU that follow them, in place.

    Blocks and stems of torchvision's and timm's ResNets are recognised by their exact class; names and weights stay.
    Other norms become `SplitBatchNorm2d` if there is more than one group, and are left alone otherwise.

    Args:
        module: The backbone.
        groups, backend: Of `synco_fast.kernels.norm.batch_norm`.

    Raises:
        ConfigError: As `split_batch_norm` says.
    """
    found = Fusion()
    for part in list(module.modules()):
        if type(part) in _BLOCKS:
            _fuse_block(part, groups, backend, found)
        elif type(part) in (torchvision_resnet.ResNet, timm_resnet.ResNet):
            _fuse_stem(part, groups, backend, found)
    split_batch_norm(module, groups, backend)
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    found.plain = sum(not isinstance(norm, FusedBatchNorm2d) for norm in norms)
    return found


def _replace(owner: nn.Module, name: str, kind: str, groups: int, backend: NormBackend, found: Fusion) -> bool:
    """Replace a plain norm by a fused one; False if there is none."""
    norm = owner._modules.get(name)
    if type(norm) is not nn.BatchNorm2d:
        return False
    owner._modules[name] = FusedBatchNorm2d.of(norm, groups, backend=backend, relu=kind != "norm alone")
    found.counts[kind] += 1
    return True


def _is_relu(module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU


def _fuse_block(block: nn.Module, groups: int, backend: NormBackend, found: Fusion) -> None:
    """Fuse the norms of a residual block and of its downsampling."""
    norms: list[str] = [name for name in ("bn1", "bn2", "bn3") if name in block._modules]
    in_timm = isinstance(block, (timm_resnet.BasicBlock, timm_resnet.Bottleneck))
    acts = [name.replace("bn", "act") if in_timm else "relu" for name in norms]
    plain = all(type(block._modules[name]) is nn.BatchNorm2d for name in norms)
    if not plain or not all(_is_relu(block._modules.get(act)) for act in acts):
        return
    if in_timm and not isinstance(block.drop_block, nn.Identity):
        return
    apart = in_timm and (getattr(block, "se", None) is not None or getattr(block, "drop_path", None) is not None)
    for name in norms[:-1]:
        _replace(block, name, "norm + ReLU", groups, backend, found)
    _replace(block, norms[-1], "norm alone" if apart else "norm + add + ReLU", groups, backend, found)
    block.__class__ = _BLOCKS[type(block)]
    downsample = block._modules.get("downsample")
    if type(downsample) is nn.Sequential:
        for name in list(downsample._modules):
            _replace(downsample, name, "norm alone", groups, backend, found)


def _fuse_stem(model: nn.Module, groups: int, backend: NormBackend, found: Fusion) -> None:
    """Fuse a ResNet's first norm, and those of a deep stem or a pooling of several layers."""
    act = "act1" if isinstance(model, timm_resnet.ResNet) else "relu"
    if _is_relu(model._modules.get(act)) and _replace(model, "bn1", "norm + ReLU", groups, backend, found):
        model._modules[act] = nn.Identity()
    for part in (model._modules.get("conv1"), model._modules.get("maxpool")):
        if type(part) is nn.Sequential:
            names = list(part._modules)
            for name, following in itertools.pairwise(names):
                if _is_relu(part._modules[following]) and _replace(part, name, "norm + ReLU", groups, backend, found):
                    part._modules[following] = nn.Identity()
