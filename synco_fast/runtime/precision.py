"""Number formats of the encoders; normalised embeddings, loss and its gradient stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.torch_state import set_cudnn_precision

__all__ = ["QUEUE_DTYPES", "Precision", "memory_format", "resolve_device", "resolve_queue_dtype"]

#: Dtypes of a queue.
QUEUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ConfigError: ``cuda`` without a GPU.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("training.device: found cuda, expected cpu on this machine, where PyTorch sees no GPU")
    if name == "cuda" or (name == "auto" and found):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def resolve_queue_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a CUDA device that computes in it at speed, else float32; other names are dtypes."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and _has_fast_bf16(device) else "float32"
    found: torch.dtype = getattr(torch, name)
    return found


class Precision:
    """The number format of the encoders. For a GPU it sets whether cuDNN uses TF32, for the whole process.

    Args:
        name: ``auto`` (bf16 where the device is fast in it, else fp32), ``fp32``, ``tf32``, ``bf16`` or
            ``fp16``. tf32 is float32 with a GPU's convolutions multiplied in ten bits of mantissa; matrix products, the
            head's among them, stay in float32.
        device: Device of the encoders.
        key: The setting's name in messages.

    Raises:
        ConfigError: fp16 or tf32 on a CPU.
    """

    def __init__(self, name: str, device: torch.device, *, key: str = "training.precision") -> None:
        if name in ("fp16", "tf32") and device.type != "cuda":
            raise ConfigError(f"{key}: found {name}, expected auto, fp32 or bf16 without a GPU")
        self.name = ("bf16" if _has_fast_bf16(device) else "fp32") if name == "auto" else name
        self.device = device
        if device.type == "cuda":
            multiplied = "tf32" if self.name == "tf32" else "ieee"
            set_cudnn_precision(multiplied, multiplied)

    @property
    def scaled(self) -> bool:
        """Whether losses must be scaled."""
        return self.name == "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoders' matrix products."""
        return _DTYPES.get(self.name, torch.float32)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass. Casts of weights are not cached, since the EMA encoder changes in between."""
        dtype = _DTYPES.get(self.name, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.name in _DTYPES, cache_enabled=False)

    def autocast_unscaled(self) -> AbstractContextManager[None]:
        """The context of a forward pass whose loss is not scaled: float32 if the format needs scaling."""
        return nullcontext() if self.scaled else self.autocast()


def memory_format(module: nn.Module, channels_last: bool) -> torch.memory_format:
    """Set the memory layout of the module's convolutions, and return the layout for its input."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=form)
    return form
