"""The public function of the batch norm, its operators, and the choice of its backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from synco_fast.kernels.autocast import without_autocast
from synco_fast.kernels.norm import native, reference
from synco_fast.kernels.norm.arguments import Arguments, check_arguments
from synco_fast.kernels.tracing import traced

__all__ = ["NormBackend", "batch_norm", "unserved_by_triton"]

NormBackend = Literal["auto", "reference", "native", "triton"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    backend: NormBackend = "auto",
) -> Tensor:
    """Grouped batch norm, add and ReLU: relu(norm(x) w + b + residual), with statistics for each group of the batch.

    With one group, no residual and no ReLU this is `torch.nn.functional.batch_norm`. The running statistics are updated
    in place with the mean over the groups; the variance is the unbiased one. NaN in x makes only the outputs of its own
    group and channel NaN.

    Args:
        x: (B, C, H, W), floating point. The Triton kernels need channels-last and copy other layouts, with one warning.
        weight, bias: (C,), or None for 1 and 0.
        running_mean, running_var: (C,), or None to keep none; required in evaluation. Any strides; parameters and
            statistics that are not contiguous cost a copy.
        groups: G, a divisor of B. It has no effect in evaluation.
        residual: Added before the ReLU. Shape and device of x; converted to its dtype.
        relu: Whether to apply a ReLU.
        training: Whether to use the statistics of x. Otherwise the running ones are used, in one elementwise pass.
        momentum: Weight of the new statistics in the running ones; None for the mean over all batches so far, by
            ``num_batches_tracked``.
        eps: Added to the variance.
        num_batches_tracked: 0-dimensional int64, increased by one in training; or None.
        backend: ``"auto"`` is PyTorch's own kernels (``"native"``), or under torch.compile one formula that the
            compiler fuses. ``"triton"`` is the fused kernels, tested in Triton's interpreter and on an H100; a training
            run uses them where it has validated them. Unsupported arguments go to the formula, with one warning.
            ``"reference"`` is the formula, with derivatives of any order.

    Returns:
        y, (B, C, H, W), in the dtype of x.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it, what was found and what is expected.
        RuntimeError: A second derivative is taken and the backend is not the reference.
    """
    given = Arguments(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        groups=groups,
        residual=residual,
        relu=relu,
        training=training,
        momentum=momentum,
        eps=eps,
        num_batches_tracked=num_batches_tracked,
    )
    check_arguments(given)
    if backend not in get_args(NormBackend):
        raise ValueError(f"backend: found {backend!r}, expected {', '.join(get_args(NormBackend))}")
    # The kernels, and PyTorch's own on a CPU in the backward pass, take the numbers of channels to lie side by side.
    given = given._replace(
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        groups=groups if training else 1,
        residual=None if residual is None else residual.to(x.dtype),
        eps=float(eps),
    )
    if running_mean is None or running_var is None or (running_mean.is_contiguous() and running_var.is_contiguous()):
        return _compute(given, backend)
    copies = running_mean.contiguous(), running_var.contiguous()
    y = _compute(given._replace(running_mean=copies[0], running_var=copies[1]), backend)
    if training:
        with torch.no_grad():
            running_mean.copy_(copies[0])
            running_var.copy_(copies[1])
    return y


def _compute(given: Arguments, backend: str) -> Tensor:
    with without_autocast(given.x.device):
        if backend == "triton":
            return _by_operators(given)
        # A compiler fuses the formula into two kernels, but not the loop over groups.
        if backend == "reference" or (given.groups > 1 and torch.compiler.is_compiling()):
            return reference.batch_norm(given)
        return native.batch_norm(given)


def _by_operators(given: Arguments) -> Tensor:
    x, residual, running = given.x, given.residual, (given.running_mean, given.running_var)
    if not x.is_contiguous(memory_format=torch.channels_last):
        if not torch.compiler.is_compiling():
            _note("x is not channels-last, so every call copies it; a model in channels-last layout needs no copy")
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if given.training and not traced(x) and _served(x):
        direct: Tensor = _Direct.apply(
            x,
            given.weight,
            given.bias,
            residual,
            *running,
            given.num_batches_tracked,
            given.groups,
            given.relu,
            given.momentum,
            given.eps,
        )
        return direct
    if given.training:
        mean, variance = _statistics(x.detach(), *running, given.num_batches_tracked, given.groups, given.momentum)
    else:
        assert given.running_mean is not None
        assert given.running_var is not None
        mean, variance = given.running_mean[None], given.running_var[None]
    settings = given.relu, given.training, given.eps
    y: Tensor = _normalise(x, mean, variance, given.weight, given.bias, residual, *settings)
    return y


class _Direct(torch.autograd.Function):
    """The kernels in training, without PyTorch's custom operators.

    Those would take the host more time than everything else here, and in eager mode the host is the limit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        groups: int,
        relu: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        """Compute y, and update the running statistics."""
        from synco_fast.kernels.norm import triton

        mean, variance = triton.statistics(x, running_mean, running_var, tracked, groups=groups, momentum=momentum)
        y = triton.apply(x, mean, variance, weight, bias, residual, relu=relu, eps=eps)
        _keep(ctx, (x, mean, variance, weight, bias, residual, relu, True, eps), y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual."""
        from synco_fast.kernels.norm import triton

        def compute(*given: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
            return triton.backward(*given[:7], relu=given[7], training=given[8], eps=given[9])

        return (*_gradients(ctx, gradient, compute, ctx.needs_input_grad[3]), *(None,) * 7)


def unserved_by_triton(x: Tensor) -> str | None:
    """The reason why the Triton kernels cannot compute the batch norm of x, (B, C, H, W), or None if they can."""
    try:
        from synco_fast.kernels.norm import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton.unserved(x)


def _served(x: Tensor) -> bool:
    """Whether to use the kernels. Called inside an operator only, so that it is never traced."""
    if reason := unserved_by_triton(x):
        _note(f"the batch norm uses the PyTorch formula: {reason}")
    return not reason


@functools.cache
def _note(line: str) -> None:
    """Warn once."""
    warnings.warn(line, stacklevel=2)


@torch.library.custom_op(
    "synco_fast::norm_statistics", mutates_args=("running_mean", "running_var", "num_batches_tracked")
)
def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    groups: int,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (G, C). They carry no gradient; `_backward` includes their dependence on x."""
    if _served(x):
        from synco_fast.kernels.norm import triton

        return triton.statistics(x, running_mean, running_var, num_batches_tracked, groups=groups, momentum=momentum)
    mean, variance = reference.statistics(x, groups)
    count = x.numel() // (groups * x.shape[1])
    reference.update_running(running_mean, running_var, num_batches_tracked, mean, variance, count, momentum)
    return mean, variance


@_statistics.register_fake
def _(x: Tensor, running_mean: object, running_var: object, tracked: object, groups: int, momentum: object) -> Any:
    return tuple(x.new_empty(groups, x.shape[1], dtype=reference.wide(x.dtype)) for _ in range(2))


@torch.library.custom_op("synco_fast::norm_apply", mutates_args=())
def _normalise(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    eps: float,
) -> Tensor:
    """Compute y. Only the backward pass reads ``training``, which says that the statistics come from x."""
    if _served(x):
        from synco_fast.kernels.norm import triton

        return triton.apply(x, mean, variance, weight, bias, residual, relu=relu, eps=eps)
    y = reference.normalise(x, mean, variance, weight, bias, residual, relu=relu, eps=eps)
    return y.contiguous(memory_format=torch.channels_last)


@_normalise.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("synco_fast::norm_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dr (empty without y), and dw and db in float32 or wider. If y is given, the ReLU mask is read from it."""
    if _served(x):
        from synco_fast.kernels.norm import triton

        of_x, of_residual, of_weight, of_bias = triton.backward(
            gradient, x, y, mean, variance, weight, bias, relu=relu, training=training, eps=eps
        )
    else:
        positive = None
        if relu:
            found = y
            if found is None:
                found = reference.normalise(x, mean, variance, weight, bias, None, relu=False, eps=eps)
            positive = ~(found <= 0)
        of_x, of_residual, of_weight, of_bias = reference.gradients(
            gradient, x, mean, variance, weight, positive, training=training, eps=eps
        )
        of_x = of_x.contiguous(memory_format=torch.channels_last)
        if y is None:
            of_residual = None
        elif of_residual is not None:
            of_residual = of_residual.contiguous(memory_format=torch.channels_last)
    return of_x, x.new_empty(0) if of_residual is None else of_residual, of_weight, of_bias


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, y: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    small = [x.new_empty(x.shape[1], dtype=reference.wide(x.dtype)) for _ in range(2)]
    return of_x, x.new_empty(0) if y is None else torch.empty_like(of_x), *small


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, variance, weight, bias, residual, relu, training, eps = inputs
    # Without a residual the ReLU mask is recomputed from x. With one it is read from y, which the next layer saves.
    y = output if relu and residual is not None else None
    ctx.save_for_backward(x, y, mean, variance, weight, bias)
    ctx.relu, ctx.training, ctx.eps = relu, training, eps


def _gradients(
    ctx: Any, gradient: Tensor, compute: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]], added: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, by `_backward` or what it calls; ``added``: whether r wants one."""
    if torch.is_grad_enabled():
        raise RuntimeError("backend: this one has a first derivative only; expected 'reference' for higher ones")
    x, y, mean, variance, weight, bias = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    of_x, of_residual, of_weight, of_bias = compute(
        gradient, x, y, mean, variance, weight, bias, ctx.relu, ctx.training, ctx.eps
    )
    return (
        of_x,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        (of_residual if y is not None else gradient) if added else None,
    )


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias, of_residual = _gradients(ctx, gradient, _backward, ctx.needs_input_grad[5])
    return (of_x, None, None, of_weight, of_bias, of_residual, None, None, None)


_normalise.register_autograd(_differentiate, setup_context=_keep)
