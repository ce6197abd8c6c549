"""PyTorch's settings for the whole process: those that a run needs, and those of the caller afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["set_cudnn_precision", "torch_state_kept"]

#: PyTorch types a part of them.
_CUDNN: Any = torch.backends.cudnn
_C: Any = torch._C


def set_cudnn_precision(convolutions: str, recurrent: str) -> None:
    """Set how cuDNN multiplies float32 numbers: ``ieee``, ``tf32``, or ``none`` to follow a more general setting.

    Args:
        convolutions: ``torch.backends.cudnn.conv.fp32_precision``.
        recurrent: ``torch.backends.cudnn.rnn.fp32_precision``.
    """
    # The flag of the older interface is set, too: to read it, as TorchInductor does, is an error where the two differ.
    # Alone it would not do, since where it is off PyTorch follows `torch.backends.fp32_precision`.
    _CUDNN.allow_tf32 = convolutions == "tf32"
    _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision = convolutions, recurrent


def _cudnn_precision() -> tuple[str, str]:
    """The arguments of `set_cudnn_precision`. Unlike the flag of the older interface, they can always be read."""
    return _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision


@contextmanager
def torch_state_kept() -> Iterator[None]:
    """Train with gradients, float32 and the CPU as defaults, whatever the caller has set, and restore the caller's.

    Also restored is what training itself changes: the random state of every device, the settings of cuDNN, and whether
    PyTorch warns of the streams of DDP's hooks.
    """
    warns = _C._warn_on_accumulate_grad_stream_mismatch()
    benchmark, precision, dtype = _CUDNN.benchmark, _cudnn_precision(), torch.get_default_dtype()
    # Under any default device each call of PyTorch costs the host more, so none is set without need.
    elsewhere = torch.get_default_device().type != "cpu"
    default: AbstractContextManager[object] = torch.device("cpu") if elsewhere else nullcontext()
    try:
        torch.set_default_dtype(torch.float32)
        # `torch.manual_seed`, which seeds each training step, seeds all GPUs.
        every = range(torch.cuda.device_count())
        with torch.inference_mode(False), torch.enable_grad(), default, torch.random.fork_rng(devices=every):
            yield
    finally:
        torch.set_default_dtype(dtype)
        _CUDNN.benchmark = benchmark
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(warns)
        if _cudnn_precision() != precision:
            set_cudnn_precision(*precision)
