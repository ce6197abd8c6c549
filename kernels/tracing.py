"""Whether a call has to be a custom operator. One costs the host more than many kernels, so eager calls do without."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["traced", "transformed"]


def transformed() -> bool:
    """Whether the call is under a transform of `torch.func` or in forward mode."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def traced(x: Tensor) -> bool:
    """Whether a compiler, an export, a trace, a mode, a transform or the subclass of x has to see an operator.

    Args:
        x: The main argument of the call. On the meta device only an operator has a shape function.
    """
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or type(x) not in (Tensor, Parameter)
        or x.is_meta
    )
