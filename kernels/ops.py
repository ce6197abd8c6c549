"""The public operator of the loss, and the choice of its backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from synco_fast.kernels import blockwise, reference
from synco_fast.kernels.autocast import without_autocast
from synco_fast.kernels.backends import Backend
from synco_fast.kernels.checks import check_arguments, check_backend
from synco_fast.kernels.negatives import FAMILIES, Extrapolation, Negatives
from synco_fast.kernels.reference import Contrast, Statistics
from synco_fast.kernels.tracing import traced, transformed

__all__ = ["Backend", "synthetic_contrast", "unserved_by_triton"]

#: Replaces -1 in the queries' image ids, so that it never equals the -1 of a queue key.
_NO_IMAGE = torch.iinfo(torch.int64).min
_NO_FORWARD = "backend: this one has no forward-mode derivative; expected 'reference' for that"
_OPERANDS = (torch.bfloat16, torch.float16)
_FIRST_ONLY = "backend: this one has a first derivative only; expected 'reference' for higher ones"


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
    """InfoNCE of each query against its key, the queue and synthetic hard negatives (MoCo v2, MoCHi and SynCo).

    Nothing is normalised here: pass unit rows for q, k and the queue. Only q gets a gradient; k, the queue and the
    synthetic negatives are constants. NaN in a row of q or k affects only the loss of that row. NaN in a queue row
    makes every gradient NaN, and every loss except those of rows that mask it. A synthetic vector of length 0 stays 0
    and so has similarity 0.

    Autocast has no effect inside: the loss computes in the dtypes of its inputs. All backends except the reference
    compute the gradient together with the loss. They can be differentiated once, in reverse mode (autograd,
    `torch.func` or a compiler). They multiply float16 and bfloat16 exactly and sum in float32.

    Args:
        q: Queries, (B, D), floating point.
        k: The positive key of each query, (B, D), with the dtype and device of q.
        queue: Keys of earlier steps, (K, D), any floating dtype. The loss computes in the wider of the two dtypes.
        negatives: The synthetic negatives: `Negatives.moco()` (none), `.mochi(N, s, s')` or `.synco()`.
        temperature: T, above 0.
        seed: The run's seed, in [0, 2**32).
        step: The training step, in [0, 2**32), or a 0-dimensional int64 tensor on the device of q, which a CUDA graph
            can advance.
        first_row: Global index of the first query. The random draws depend on it, so they do not depend on how a batch
            is split over ranks.
        image_ids: The image id of each query, (B,) int64, -1 if unknown. Together with ``queue_ids`` it masks queue
            keys of the same image: they are no negatives of that query and no candidates for Q^N.
        queue_ids: The image id of each queue key, (K,) int64, -1 if unknown.
        backend: ``"auto"`` is the blockwise form, which runs on any device. ``"triton"`` is the fused kernels, tested
            in Triton's interpreter and on an H100. They are opt-in, except in a training run that has validated them
            on its GPU. Unsupported arguments go to the blockwise form, with one warning. ``"reference"`` is plain
            PyTorch and has derivatives of any order.
        operand_dtype: ``torch.bfloat16`` or ``torch.float16``: rounds float32 q and k to this dtype; loss and gradient
            stay in float32. With a queue of the same dtype the kernels use it in all products. None: no rounding.

    Returns:
        The loss of each row, (B,), and `Statistics`, in the wider dtype of q and the queue, at least float32.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it, what was found and what is expected.
        RuntimeError: A second or a forward-mode derivative is taken and the backend is not the reference.
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
        # Unknown images are not the same image.
        image_ids = image_ids.masked_fill(image_ids == -1, _NO_IMAGE)
    if operand_dtype is not None:
        _check_operand_dtype(operand_dtype, q)
    if backend == "reference":
        with without_autocast(q.device):
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
    if not traced(q):
        direct = _Direct.apply(
            q,
            k.detach(),
            queue.detach(),
            negatives,
            float(temperature),
            seed,
            step,
            first_row,
            image_ids,
            queue_ids,
            backend,
            operand_dtype,
        )
        return Contrast(direct[0], Statistics(*direct[2:]))
    on_device = isinstance(step, Tensor)
    # A custom op's backward formula supports neither `torch.func` nor forward mode, and does not raise a clear error.
    # Hide `_Transformed` from compilers, which differentiate it wrongly or not at all.
    loss, _, *statistics = (torch.compiler.disable(_Transformed.apply) if transformed() else _contrast)(
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
        raise TypeError(f"q: found {q.dtype}, expected torch.float32 with operand_dtype")


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to ``dtype`` and back. The gradient passes through unrounded."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _counts(negatives: Negatives) -> list[int]:
    """The integer fields of the description, in a form that an operator schema can hold; see `_describe`."""
    return [negatives.hard, *(negatives.count_of(family) for family in FAMILIES)]


def _numbers(negatives: Negatives) -> list[float]:
    """The float fields: both ends of each range, then each strength, in the order of the table."""
    ranges = [bound for family in FAMILIES if family.ranged for bound in negatives.range_of(family)]
    return [*ranges, *(negatives.strength_of(family) for family in FAMILIES if family.strength)]


def _describe(counts: Sequence[int], numbers: Sequence[float], extrapolation: str) -> Negatives:
    """The inverse of `_counts` and `_numbers`."""
    return _described(tuple(counts), tuple(numbers), extrapolation)


@functools.lru_cache(maxsize=64)
def _described(counts: tuple[int, ...], numbers: tuple[float, ...], extrapolation: str) -> Negatives:
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
    """The reason why the Triton kernels cannot compute the loss for these arguments, or None if they can.

    Args:
        q: Queries, (B, D), or any tensor with their dtype, width and device.
        queue: (K, D).
        temperature: T.
    """
    try:
        from synco_fast.kernels import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton.unserved(q, queue, temperature)


def _choose(backend: str, q: Tensor, queue: Tensor, temperature: float) -> Callable[..., blockwise.Outputs]:
    """The function that computes the loss. Called inside the operator only, so that it is never traced."""
    if backend != "triton":
        return blockwise.contrast_and_gradient
    if reason := unserved_by_triton(q, queue, temperature):
        _note(reason)
        return blockwise.contrast_and_gradient
    from synco_fast.kernels import triton

    return triton.contrast_and_gradient


@functools.cache
def _note(reason: str) -> None:
    """Warn once why the kernels are not used."""
    warnings.warn(f"the loss uses the blockwise form: {reason}", stacklevel=2)


def _compute(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int,
    image_ids: Tensor | None,
    queue_ids: Tensor | None,
    backend: str,
    operand_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`blockwise.Outputs` as a tuple, by any backend but the reference."""
    if operand_dtype is not None:
        q, k = q.to(operand_dtype), k.to(operand_dtype)
    compute = _choose(backend, q, queue, temperature)
    with without_autocast(q.device):
        outputs = compute(
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
    return (*outputs,)


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
    """`blockwise.Outputs` as a flat tuple of tensors. The arguments are those of `synthetic_contrast`."""
    return _compute(
        q,
        k,
        queue,
        _describe(counts, numbers, extrapolation),
        temperature,
        seed,
        step if step_on_device is None else step_on_device,
        first_row,
        image_ids,
        queue_ids,
        backend,
        operand_dtype,
    )


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
    """Each row of the saved gradient times the incoming gradient of the row's loss."""
    if torch.is_grad_enabled():
        raise RuntimeError(_FIRST_ONLY)
    (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
    of_q = None if loss is None else (gradient * loss[:, None]).to(ctx.dtype)  # type: ignore[attr-defined]
    return (of_q, *(None,) * 14)


_contrast.register_autograd(_backward, setup_context=_keep)


class _Direct(torch.autograd.Function):
    """The loss in eager mode, without a custom operator (see `synco_fast.kernels.tracing`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """The arguments and results of `_compute`."""
        outputs: tuple[Tensor, ...] = _compute(*inputs)
        _keep(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        """The gradient of q."""
        return _backward(ctx, loss)[0], *(None,) * 11


class _Transformed(torch.autograd.Function):
    """The operator under `torch.func` transforms or forward mode."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """The operator."""
        outputs: tuple[Tensor, ...] = _contrast(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the gradient, and q for `_Once`."""
        ctx.save_for_backward(output[1], inputs[0])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        """Like `_backward`. Transforms always record, so a second derivative raises only where it is taken."""
        gradient, q = ctx.saved_tensors
        of_q = None if loss is None else (_Once.apply(gradient, q) * loss[:, None]).to(q.dtype)
        return (of_q, *(None,) * 14)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Raise: there is no forward-mode derivative."""
        raise RuntimeError(_NO_FORWARD)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One call after another. All have the same rows, so all draw the same random numbers."""

        def nth(number: int) -> list[Any]:
            pairs = zip(inputs, in_dims, strict=True)
            return [value.select(dim, number) if isinstance(dim, int) else value for value, dim in pairs]

        calls = [_Transformed.apply(*nth(number)) for number in range(info.batch_size)]
        outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)


class _Once(torch.autograd.Function):
    """The identity on a gradient, marked as depending on q, so that a second derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, q: Tensor) -> Tensor:
        """Return a copy of the gradient."""
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Raise: there is no second derivative."""
        raise RuntimeError(_FIRST_ONLY)
