"""The one public operator, and the choice of the backend that computes it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from synco_fast.kernels import blockwise, reference
from synco_fast.kernels.backends import Backend
from synco_fast.kernels.checks import check_arguments, check_backend
from synco_fast.kernels.negatives import FAMILIES, Extrapolation, Negatives
from synco_fast.kernels.reference import Contrast, Statistics

__all__ = ["Backend", "synthetic_contrast", "unserved_by_triton"]

#: Takes the place of a query's -1, so that it meets no queue key's.
_NO_IMAGE = torch.iinfo(torch.int64).min
_NO_FORWARD = "backend: this one has no derivative in forward mode; expected for that: 'reference'"
_OPERANDS = (torch.bfloat16, torch.float16)
_FIRST_ONLY = "backend: this one has a first derivative only; expected for higher ones: 'reference'"


def synthetic_contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    *,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    backend: Backend = "auto",
    operand_dtype: torch.dtype | None = None,
) -> Contrast:
    """InfoNCE of each query against its key, the queue and synthetic hard negatives (MoCo v2, MoCHi and SynCo alike).

    q, k and the queue's rows are taken as they are: give unit rows. The gradient reaches q alone; k, the queue and the
    synthetic negatives are constants. A query or key row that holds NaN makes its own loss NaN and no other row's. A
    queue row that holds NaN makes every loss NaN but those of rows that mask it, and every gradient NaN. A synthetic
    vector of length 0 stays 0 and so has similarity 0.

    Autocast does not reach inside: the loss computes in the dtypes that it is given. Every backend but the reference
    computes the gradient together with the loss, so it can be differentiated once, backwards (by autograd, `torch.func`
    or a compiler), and float16 and bfloat16 are multiplied exactly and summed in float32.

    Args:
        q: Queries, (B, D), floating point.
        k: The positive key of each query, (B, D), dtype and device of q.
        queue: Keys of earlier steps, (K, D), any floating dtype; the loss computes in the wider of the two dtypes.
        negatives: What is contrasted beside the queue: `Negatives.moco()`, `.mochi(N, s, s')` or `.synco()`.
        temperature: T, above 0.
        seed: The run's seed, in [0, 2**32).
        step: The training step, in [0, 2**32), or an int64 tensor of no dimensions (which a CUDA graph can advance).
        first_row: Global index of the first query; draws depend on it, not on how a batch is spread over ranks.
        image_ids: The image each query was made from, (B,) int64, -1 where there is none. With ``queue_ids`` it masks
            a queue key of the very same image: it is no negative of that query and no candidate for Q^N.
        queue_ids: The image each queue key was made from, (K,) int64, -1 where there is none.
        backend: ``"auto"`` takes the blockwise form, which runs anywhere, in blocks. ``"triton"`` takes the kernels
            (experimental: tested in Triton's interpreter only; opt-in, or in a training run that validated them on its
            GPU); unsupported arguments go to the blockwise form, with one warning.
            ``"reference"`` is the plain form, differentiable as often as wanted.
        operand_dtype: ``torch.bfloat16`` or ``torch.float16``: round q and k, given in float32, to it; loss and
            gradient stay in float32. With a queue in the same dtype the kernels use it in all products. None: no
            rounding.

    Returns:
        The loss of each row, (B,), and `Statistics`, in the wider dtype of q and the queue, float32 at least.

    Raises:
        TypeError, ValueError: As `check_arguments` says, naming the argument, what was found and what is expected.
        RuntimeError: A second or a forward-mode derivative was asked of another backend than the reference.
    """
    check_arguments(
        q,
        k,
        queue,
        negatives,
        temperature=temperature,
        seed=seed,
        step=step,
        first_row=first_row,
        image_ids=image_ids,
        queue_ids=queue_ids,
    )
    check_backend(backend)
    if image_ids is not None:
        # Of a query and a key whose images are not known, nobody says that they are the same.
        image_ids = image_ids.masked_fill(image_ids == -1, _NO_IMAGE)
    if operand_dtype is not None:
        _check_operand_dtype(operand_dtype, q)
    if backend == "reference":
        with _without_autocast(q.device):
            result = reference.contrast(
                q if operand_dtype is None else _rounded(q, operand_dtype),
                k if operand_dtype is None else _rounded(k, operand_dtype),
                queue,
                negatives,
                temperature=temperature,
                seed=seed,
                step=step,
                first_row=first_row,
                image_ids=image_ids,
                queue_ids=queue_ids,
            )
        return Contrast(_wide(result.loss), Statistics(*(_wide(value) for value in result.statistics)))
    # An operator's own formula serves neither transforms nor forward mode, and says so in neither or without a line.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    on_device = isinstance(step, Tensor)
    # Compilers get derivatives of `_Transformed` wrong or not at all: it is hidden from them.
    loss, _, *statistics = (torch.compiler.disable(_Transformed.apply) if transformed else _contrast)(
        q,
        k.detach(),
        queue.detach(),
        _counts(negatives),
        _numbers(negatives),
        negatives.extrapolation,
        float(temperature),
        seed,
        0 if on_device else cast(int, step),
        cast(Tensor, step) if on_device else None,
        first_row,
        image_ids,
        queue_ids,
        backend,
        operand_dtype,
    )
    return Contrast(loss, Statistics(*(value.detach() for value in statistics)))


def _check_operand_dtype(dtype: torch.dtype, q: Tensor) -> None:
    if dtype not in _OPERANDS:
        raise ValueError(f"operand_dtype: found {dtype}, expected {' or '.join(map(str, _OPERANDS))}, or None")
    if q.dtype != torch.float32:
        raise TypeError(f"q: found {q.dtype}, expected torch.float32 beside operand_dtype")


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to ``dtype`` and back; the gradient passes unrounded."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _counts(negatives: Negatives) -> list[int]:
    """The whole numbers of the description, as an operator's schema can hold them; `_describe` is the inverse."""
    return [negatives.hard, *(negatives.count_of(family) for family in FAMILIES)]


def _numbers(negatives: Negatives) -> list[float]:
    """Its other numbers: both ends of each range, then each strength, in the order of the table."""
    ranges = [bound for family in FAMILIES if family.ranged for bound in negatives.range_of(family)]
    return [*ranges, *(negatives.strength_of(family) for family in FAMILIES if family.strength)]


def _describe(counts: Sequence[int], numbers: Sequence[float], extrapolation: str) -> Negatives:
    """The description that `_counts` and `_numbers` took apart."""
    given = iter(numbers)
    fields: dict[str, Any] = dict(zip(("hard", *(family.name for family in FAMILIES)), counts, strict=True))
    for family in FAMILIES:
        if family.ranged:
            fields[f"{family.name}_range"] = next(given), next(given)
    for family in FAMILIES:
        if family.strength:
            fields[family.strength[0]] = next(given)
    return Negatives(**fields, extrapolation=cast(Extrapolation, extrapolation))


def unserved_by_triton(q: Tensor, queue: Tensor, temperature: float) -> str | None:
    """Why the Triton kernels cannot compute the loss here; None where they can.

    Args:
        q: Queries, (B, D), or a tensor of their dtype, width and device.
        queue: (K, D).
        temperature: T.
    """
    try:
        from synco_fast.kernels import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton.unserved(q, queue, temperature)


def _choose(backend: str, q: Tensor, queue: Tensor, temperature: float) -> Callable[..., blockwise.Outputs]:
    """The form that computes, decided where the tensors are real, so that tracing never meets it."""
    if backend != "triton":
        return blockwise.contrast_and_gradient
    if reason := unserved_by_triton(q, queue, temperature):
        _note(reason)
        return blockwise.contrast_and_gradient
    from synco_fast.kernels import triton

    return triton.contrast_and_gradient


@functools.cache
def _note(reason: str) -> None:
    """Say once why the kernels are not used."""
    warnings.warn(f"the blockwise form computes the loss: {reason}", stacklevel=2)


@torch.library.custom_op("synco_fast::contrast", mutates_args=())
def _contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    counts: Sequence[int],
    numbers: Sequence[float],
    extrapolation: str,
    temperature: float,
    seed: int,
    step: int,
    step_on_device: Tensor | None,
    first_row: int,
    image_ids: Tensor | None,
    queue_ids: Tensor | None,
    backend: str,
    operand_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`blockwise.Outputs` as a flat tuple of tensors; arguments are those of `synthetic_contrast`."""
    if operand_dtype is not None:
        q, k = q.to(operand_dtype), k.to(operand_dtype)
    compute = _choose(backend, q, queue, temperature)
    with _without_autocast(q.device):
        outputs = compute(
            q,
            k,
            queue,
            _describe(counts, numbers, extrapolation),
            temperature=temperature,
            seed=seed,
            step=step if step_on_device is None else step_on_device,
            first_row=first_row,
            image_ids=image_ids,
            queue_ids=queue_ids,
        )
    return (*outputs,)


@_contrast.register_fake
def _(q: Tensor, k: Tensor, queue: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, queue.dtype), torch.float32)
    rows, dim = q.shape
    row, count = q.new_empty(rows, dtype=dtype), q.new_empty(rows, dtype=torch.int64)
    return (
        row,
        q.new_empty(rows, dim, dtype=dtype),
        torch.empty_like(row),
        torch.empty_like(row),
        q.new_empty(rows, len(FAMILIES), dtype=dtype),
        count,
        torch.empty_like(count),
        q.new_empty(rows, dtype=torch.int32),
    )


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = cast(Tensor, inputs[0]).dtype  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: torch.autograd.function.FunctionCtx, loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    """Each row of the kept gradient times what autograd hands down for the row's loss."""
    if torch.is_grad_enabled():
        raise RuntimeError(_FIRST_ONLY)
    (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
    of_q = None if loss is None else (gradient * loss[:, None]).to(ctx.dtype)  # type: ignore[attr-defined]
    return (of_q, *(None,) * 14)


_contrast.register_autograd(_backward, setup_context=_keep)


class _Transformed(torch.autograd.Function):
    """The operator where `torch.func` or forward mode is on."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """The operator."""
        outputs: tuple[Tensor, ...] = _contrast(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradient, and q for `_Once`."""
        ctx.save_for_backward(output[1], inputs[0])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        """As `_backward`; transforms always record, so that a second derivative is refused where it is taken."""
        gradient, q = ctx.saved_tensors
        of_q = None if loss is None else (_Once.apply(gradient, q) * loss[:, None]).to(q.dtype)
        return (of_q, *(None,) * 14)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refuse."""
        raise RuntimeError(_NO_FORWARD)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One call after another; all draw alike, since they have the same rows."""

        def nth(number: int) -> list[Any]:
            pairs = zip(inputs, in_dims, strict=True)
            return [value.select(dim, number) if isinstance(dim, int) else value for value, dim in pairs]

        calls = [_Transformed.apply(*nth(number)) for number in range(info.batch_size)]
        outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)


class _Once(torch.autograd.Function):
    """A gradient that depends on q in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, q: Tensor) -> Tensor:
        """The gradient."""
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise RuntimeError(_FIRST_ONLY)
