"""Bytes and launches of norm, add and ReLU in a training step: counted from the calls, not measured.

A backbone runs on the meta device, where tensors have shapes but no data, and every dispatcher call is counted.
Convolutions are replaced by channels-last allocations of their outputs; pooling is not counted. What remains is norm,
add and ReLU, and the sums of gradients where the input of a block branches, which all forms have.

A call reads its inputs and writes its outputs once. Batch norm reads its input twice, for the statistics and for the
result. The kernels of `synco_fast.kernels.norm` move the bytes that their launcher states. A call counts as one launch,
PyTorch's batch norm as at least two in each direction, and a view as none. So the launches of PyTorch's forms are a
lower bound, and the bytes ignore caches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synco_fast.kernels.norm import NormBackend
from synco_fast.models.batch_norm import FusedBatchNorm2d, split_batch_norm
from synco_fast.models.encoder import build_backbone
from synco_fast.models.fusion import fuse_batch_norm

__all__ = ["FORMS", "Layer", "Work", "layers_of", "passes", "step_work"]

#: The compared forms: how a step computes norm, add and ReLU.
FORMS = {
    "grouped": "today's eager form on a GPU: one call per group and a concatenation, then add and ReLU",
    "plain": "torch.nn.BatchNorm2d of the whole batch, then add and ReLU: the common form",
    "triton": "the kernels of synco_fast.kernels.norm",
}
#: Calls with more than one launch: the number of launches, and of reads and writes of x's size.
_LAUNCHES = {"norm_statistics": 2, "norm_backward": 3, "native_batch_norm": 2, "native_batch_norm_backward": 2}
_LEFT_OUT = ("pool", "empty", "detach")


class Work(NamedTuple):
    """Bytes moved and kernels launched."""

    bytes: int
    launches: int

    def __add__(self, other: object) -> Work:
        """The sum of both."""
        assert isinstance(other, Work)
        return Work(self.bytes + other.bytes, self.launches + other.launches)


class Layer(NamedTuple):
    """A norm of a backbone: channels, height and width, the operations after it, and the number of such layers."""

    channels: int
    height: int
    width: int
    relu: bool
    residual: bool
    times: int = 1

    @property
    def kind(self) -> str:
        """The fused operations."""
        return "norm" + " + add" * self.residual + " + ReLU" * self.relu


def passes(layer: Layer, form: str) -> tuple[int, int]:
    """Passes over memory of x's size, forward and backward, by the rules of this module.

    Args:
        layer: The layer.
        form: One of `FORMS`.
    """
    if form == "triton":
        return 3 + layer.residual, 7 if layer.residual and layer.relu else 5
    forward = 3 + 3 * layer.residual + 2 * layer.relu
    backward = 5 + 3 * layer.relu
    together = 2 * (form == "grouped")
    return forward + together, backward + together


class _Counter(TorchDispatchMode):
    """Sums the work of all dispatcher calls."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        name = {"_native_batch_norm_legit": "native_batch_norm", "_batch_norm_with_update": "native_batch_norm"}.get(
            name, name
        )
        viewed = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not viewed and not any(part in name for part in _LEFT_OUT):
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            self.work += Work(_bytes(name, inputs, outputs), _LAUNCHES.get(name, 1))
        return result


def _bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    size = max((value.nbytes for value in inputs), default=0)
    moved = sum(value.nbytes for value in (*inputs, *outputs))
    if name == "native_batch_norm":
        return moved + size
    if name == "native_batch_norm_backward":
        return moved + 2 * size
    if name == "norm_backward":
        # Both passes read the gradient and x. With y, the second one reads the masked gradient.
        return moved + 2 * size
    return moved


def _backbone(name: str, form: str, groups: int) -> nn.Module:
    with torch.device("meta"):
        backbone, _ = build_backbone(name)
        if form == "grouped":
            split_batch_norm(backbone, groups)
        elif form == "triton":
            fuse_batch_norm(backbone, groups, "triton")
    return backbone


class _Allocate(torch.autograd.Function):
    """The outputs of a convolution without its computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:
        """Allocate the output, channels-last."""
        ctx.save_for_backward(x)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Allocate the gradient of the input."""
        (x,) = ctx.saved_tensors
        return torch.empty_like(x), None


class _StandIn(nn.Module):
    """Stand-in for a convolution."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.channels = convolution.out_channels
        padding = convolution.padding
        assert not isinstance(padding, str)
        self.numbers = convolution.kernel_size, convolution.stride, padding, convolution.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Allocate the output of the convolution."""
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(x.shape[2:], *self.numbers, strict=True)
        ]
        made: Tensor = _Allocate.apply(x, torch.Size((len(x), self.channels, *sides)))
        return made


def _without_convolutions(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _StandIn(child))
        else:
            _without_convolutions(child)
    return module


def step_work(form: str, *, backbone: str = "resnet50", batch: int = 256, size: int = 224, groups: int = 8) -> Work:
    """Work of norm, add and ReLU in a step: queries forward and backward, keys forward.

    Args:
        form: One of `FORMS`.
        backbone: A torchvision or timm ResNet.
        batch: B.
        size: Side of an image, in pixels.
        groups: Groups of the batch norm; the plain form has one.
    """
    model = _without_convolutions(_backbone(backbone, form, groups))
    # Skip the pooling and everything after it.
    for name in ("avgpool", "global_pool", "fc"):
        if hasattr(model, name):
            setattr(model, name, nn.Identity())
    images = torch.empty(batch, 3, size, size, device="meta", dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    with _Counter() as counter:
        with torch.no_grad():
            model(images)
        y = model(images)
        y.backward(torch.empty_like(y))
    work: Work = counter.work
    return work


def layers_of(backbone: str = "resnet50", size: int = 224) -> list[Layer]:
    """The norms of a backbone, in order of first occurrence; equal ones are counted together."""
    model = _backbone(backbone, "triton", 1)
    found: dict[Layer, int] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, FusedBatchNorm2d)
        x = inputs[0]
        layer = Layer(x.shape[1], x.shape[2], x.shape[3], module.relu, len(inputs) > 1)
        found[layer] = found.get(layer, 0) + 1

    for part in model.modules():
        if isinstance(part, FusedBatchNorm2d):
            backend: NormBackend = "native"
            part.backend = backend
            part.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.empty(2, 3, size, size, device="meta"))
    return [layer._replace(times=times) for layer, times in found.items()]
