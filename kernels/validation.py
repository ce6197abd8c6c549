"""The backends against the reference in float64, on any device and any shape.

The inputs are rows whose numbers are multiples of 1/128: exact in bfloat16, their products and sums exact in float32.
Every backend then sees the very same similarities and must choose the same hard negatives, ties included, so that
what remains is rounding, and rounding has a bound:

    |found - exact|  <=  2 |reference in float32 - exact|  +  c eps max|exact|  +  rounding of the softmax weights

with c = 16 for the loss and 64 for the gradient, a sum over the whole queue that some libraries make one term after
another. The last term is there for the kernels on halves, and on float32 where TF32 is allowed. They round the weights
of the queue keys to the format of the tensor cores before the second product: by at most u = 2^-8 (bfloat16) or 2^-10
(TF32) of each, and so the gradient by u / T times the same weighted sum of |n|.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.kernels import reference
from synco_fast.kernels.negatives import FAMILIES, Extrapolation, Negatives
from synco_fast.kernels.ops import Backend, synthetic_contrast, unserved_by_triton
from synco_fast.kernels.reference import Contrast, Statistics

__all__ = [
    "Answer",
    "Case",
    "Inputs",
    "Verdict",
    "cases",
    "exact_inputs",
    "random_cases",
    "reference_answer",
    "validate",
]

#: Units in the last place of float32 that an error may have beside that of the reference: c above.
_UNITS = {"loss": 16, "gradient": 64}
#: By how much the kernels round a softmax weight, by the dtype of the queue; for float32 see `_weight_rounding`.
_WEIGHT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
#: Similarity means may differ by this much, in absolute terms: they are sums of a few float32 numbers up to 1.
_STATISTICS = 1e-5
_SEED, _STEP = 3, 7
_EXACT_AND_PLAIN = (torch.float64, torch.float32)
#: Rows of NaN before and behind an input; any row begins at a multiple of 16 bytes where the first does.
_GUARD = 128

#: Rows of the reference at a time, which makes every similarity and every synthetic vector.
_BLOCK = 128

Ids = tuple[Tensor | None, Tensor | None]


class Inputs(NamedTuple):
    """Queries and keys (B, D), and the queue (K, D)."""

    q: Tensor
    k: Tensor
    queue: Tensor

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Inputs:
        """The same numbers in another dtype or on another device."""
        return Inputs(*(tensor.to(device=device, dtype=dtype) for tensor in self))

    def guarded(self) -> Inputs:
        """The same numbers inside larger tensors of NaN: what reads past an input then shows in the result."""

        def within(tensor: Tensor) -> Tensor:
            room = tensor.new_full((len(tensor) + 2 * _GUARD, tensor.shape[1]), torch.nan)
            room[_GUARD:-_GUARD] = tensor
            return room[_GUARD:-_GUARD]

        return Inputs(*(within(tensor) for tensor in self))


class Answer(NamedTuple):
    """Loss and statistics, and the gradient of the summed loss, (B, D)."""

    contrast: Contrast
    gradient: Tensor


@dataclass(frozen=True)
class Case:
    """One shape, dtype and description to compare at.

    Attributes:
        rows, length, dim, hard: B, K, D, N; MoCo, which takes no hard negatives, is compared at the same shape.
        negatives: What is contrasted.
        method: What the description is called in a table.
        dtype: Of q, k and the queue.
        temperature: T.
        peaked: Whether the queue holds the queries themselves: a softmax with nearly all its weight in one place.
        masked: Whether a same-image mask forbids about one key in ten to each row.
    """

    rows: int
    length: int
    dim: int
    hard: int
    negatives: Negatives
    method: str
    dtype: torch.dtype
    temperature: float
    peaked: bool
    masked: bool = False


@dataclass(frozen=True)
class Verdict:
    """The result of a backend on a case.

    Attributes:
        backend: Which.
        case: Of what.
        loss_error, loss_bound, gradient_error, gradient_bound: Largest absolute errors and their bounds.
        misses: What is wrong, in words; empty where all is within its bound.
    """

    backend: str
    case: Case
    loss_error: float
    loss_bound: float
    gradient_error: float
    gradient_bound: float
    misses: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        case, errors = self.case, ("loss_error", "loss_bound", "gradient_error", "gradient_bound")
        return {
            "backend": self.backend,
            "rows": case.rows,
            "length": case.length,
            "dim": case.dim,
            "hard": case.hard,
            "method": case.method,
            "dtype": str(case.dtype).removeprefix("torch."),
            "temperature": case.temperature,
            "peaked": case.peaked,
            "masked": case.masked,
            **{name: getattr(self, name) for name in errors},
            "misses": list(self.misses),
        }


def exact_inputs(
    rows: int,
    length: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    peaked: bool = False,
    seed: int = 0,
    device: torch.device | None = None,
) -> Inputs:
    """Rows of length about 1 whose similarities are exact in every dtype.

    Args:
        rows, length, dim: B, K, D.
        dtype: Of all three; any floating dtype holds the same numbers.
        peaked: See `Case`.
        seed: Of the numbers.
        device: Where they are made, the CPU by default; another one makes other numbers.
    """
    generator = torch.Generator(device or "cpu").manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
        return normalize(numbers, dim=-1)

    q, queue = unit(rows, dim), unit(length, dim)
    k = normalize(q + 0.7 * unit(rows, dim), dim=1)
    if peaked:
        queue[: min(rows, length)] = q[: min(rows, length)]
    return Inputs(*((tensor * 128).round() / 128 for tensor in (q, k, queue))).to(dtype)


def reference_answer(
    inputs: Inputs,
    negatives: Negatives,
    dtype: torch.dtype = torch.float64,
    *,
    temperature: float = 0.2,
    seed: int = _SEED,
    step: int = _STEP,
    first_row: int = 0,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Answer:
    """The reference computed in ``dtype`` on the values as they are stored.

    Args:
        inputs: In any dtype.
        negatives, temperature, seed, step, first_row, image_ids, queue_ids: As `synthetic_contrast` describes them.
        dtype: Of the computation.
    """
    q, k, queue = inputs.to(dtype)
    q = q.detach().requires_grad_()
    result = reference.contrast(
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
    (gradient,) = torch.autograd.grad(result.loss.sum(), q)
    return Answer(Contrast(result.loss.detach(), result.statistics), gradient)


def random_cases(
    count: int, dtypes: Sequence[torch.dtype], *, rows: int = 5, length: int = 1000, dim: int = 160, seed: int = 0
) -> list[Case]:
    """Cases at shapes that are multiples of nothing: odd B, K, D and N, other counts and settings each time.

    Args:
        count: How many.
        dtypes: One of them is drawn for each case.
        rows, length, dim: The largest B, K and D.
        seed: Of the draw: the same seed gives the same cases.
    """
    draw = random.Random(seed)

    def odd(low: int, high: int) -> int:
        return draw.randrange(low | 1, high + 1, 2)

    found = []
    for _ in range(count):
        keys = odd(3, length)
        # Half of them with few hard negatives, so that a threshold is estimated.
        hard = odd(1, keys if draw.random() < 0.5 else max(1, keys // 10))
        families: dict[str, int] = {family.name: draw.choice([0, odd(1, 9), odd(1, 40)]) for family in FAMILIES}
        extrapolation: Extrapolation = draw.choice(["released", "paper"])
        negatives = Negatives(hard=hard, extrapolation=extrapolation, **families)  # type: ignore[arg-type]
        found.append(
            Case(
                rows=odd(1, rows),
                length=keys,
                dim=odd(1, dim),
                hard=hard,
                negatives=negatives,
                method="random",
                dtype=draw.choice(list(dtypes)),
                temperature=draw.choice([0.07, 0.2, 1.0]),
                peaked=draw.random() < 0.5,
                masked=draw.random() < 0.5,
            )
        )
    return found


def cases(shapes: Sequence[tuple[int, int, int, int]], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """The sweep: every shape and dtype with each method, flat and peaked, and once with a mask.

    Args:
        shapes: (B, K, D, N) each; every family gets N / 8 negatives or a few more, so that all are met.
        dtypes: Of the inputs.
    """
    found = []
    for (rows, length, dim, hard), dtype in itertools.product(shapes, dtypes):
        few = max(2, hard // 8)
        methods = {
            "moco": Negatives.moco(),
            "mochi": Negatives.mochi(hard, 2 * few, few),
            "synco": Negatives.synco(
                hard,
                interpolated=2 * few,
                extrapolated=2 * few,
                mixed=2 * few,
                noisy=min(few, 64),
                perturbed=few,
                adversarial=few,
            ),
        }
        for (method, negatives), (temperature, peaked) in itertools.product(
            methods.items(), ((0.2, False), (0.07, True))
        ):
            found.append(Case(rows, length, dim, hard, negatives, method, dtype, temperature, peaked))
        found.append(Case(rows, length, dim, hard, methods["synco"], "synco", dtype, 0.2, False, masked=True))
    return found


def validate(backends: Sequence[Backend], wanted: Sequence[Case], device: torch.device) -> Iterator[Verdict]:
    """Compare backends with the reference in float64, case by case.

    Args:
        backends: Which; each must serve the device. "reference" is skipped in half precision.
        wanted: See `cases`.
        device: Where the backends compute; the reference computes there too.

    Yields:
        A `Verdict` for each case and backend.

    Raises:
        ValueError: A backend does not serve a case on this device, so that another would have computed in its place.
    """
    for case in wanted:
        # The reference computes in the dtype that it is given; as a backend of half precision it has no bound.
        able = [backend for backend in backends if backend != "reference" or case.dtype.itemsize >= 4]
        if not able:
            continue
        inputs = exact_inputs(case.rows, case.length, case.dim, case.dtype, peaked=case.peaked, device=device)
        inputs = inputs.guarded()
        image_ids = torch.arange(case.rows, device=device) % 10 if case.masked else None
        queue_ids = torch.arange(case.length, device=device) * 7 % 10 if case.masked else None
        exact, plain = (_in_blocks(case, inputs, (image_ids, queue_ids), dtype) for dtype in _EXACT_AND_PLAIN)
        for backend in able:
            if backend == "triton" and (reason := unserved_by_triton(inputs.q, inputs.queue, case.temperature)):
                raise ValueError(f"backend: found triton, expected others here: {reason}")
            yield _judge(backend, case, inputs, (image_ids, queue_ids), exact, plain)


def _blocks(inputs: Inputs, ids: Ids) -> Iterator[tuple[int, Inputs, Ids]]:
    """The first row of each block, and its rows."""
    for first in range(0, len(inputs.q), _BLOCK):
        part = slice(first, first + _BLOCK)
        images = None if ids[0] is None else ids[0][part]
        yield first, Inputs(inputs.q[part], inputs.k[part], inputs.queue), (images, ids[1])


def _in_blocks(case: Case, inputs: Inputs, ids: Ids, dtype: torch.dtype) -> Answer:
    """`reference_answer`, whose rows do not depend on one another, in blocks that bound its memory."""
    parts = [
        reference_answer(
            block,
            case.negatives,
            dtype,
            temperature=case.temperature,
            first_row=first,
            image_ids=images,
            queue_ids=queue_ids,
        )
        for first, block, (images, queue_ids) in _blocks(inputs, ids)
    ]
    columns = zip(*(part.contrast.statistics for part in parts), strict=True)
    statistics = Statistics(*map(torch.cat, columns))
    loss = torch.cat([part.contrast.loss for part in parts])
    return Answer(Contrast(loss, statistics), torch.cat([part.gradient for part in parts]))


def _judge(backend: Backend, case: Case, inputs: Inputs, ids: Ids, exact: Answer, plain: Answer) -> Verdict:
    # The repeat has the step on the device, as a captured graph does: it decides no bit.
    found = _run(backend, case, inputs, ids, _STEP)
    again = _run(backend, case, inputs, ids, torch.tensor(_STEP, device=inputs.q.device))
    misses = []
    loss_error, loss_bound = _error_and_bound(
        found.contrast.loss, plain.contrast.loss, exact.contrast.loss, _UNITS["loss"]
    )
    gradient_error, gradient_bound = _error_and_bound(
        found.gradient, plain.gradient, exact.gradient, _UNITS["gradient"]
    )
    # Autograd hands the gradient down in the dtype of q.
    gradient_bound += torch.finfo(case.dtype).eps / 2 * exact.gradient.abs().max().item()
    if backend == "triton":
        gradient_bound += _weight_rounding(case.dtype, inputs.q.device) * _weighted_lengths(case, inputs, ids)
    # Written so that NaN misses.
    if not loss_error <= loss_bound:
        misses.append("loss")
    if not gradient_error <= gradient_bound:
        misses.append("gradient")
    misses += _compare_statistics(found.contrast.statistics, exact.contrast.statistics)
    if not (torch.equal(found.contrast.loss, again.contrast.loss) and torch.equal(found.gradient, again.gradient)):
        misses.append("a repeat gives other bits")
    return Verdict(backend, case, loss_error, loss_bound, gradient_error, gradient_bound, tuple(misses))


def _run(backend: Backend, case: Case, inputs: Inputs, ids: Ids, step: int | Tensor) -> Answer:
    q = inputs.q.detach().requires_grad_()
    result = synthetic_contrast(
        q,
        inputs.k,
        inputs.queue,
        case.negatives,
        temperature=case.temperature,
        seed=_SEED,
        step=step,
        image_ids=ids[0],
        queue_ids=ids[1],
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(result.loss.sum(), q)
    return Answer(Contrast(result.loss.detach(), result.statistics), gradient)


def _error_and_bound(found: Tensor, plain: Tensor, exact: Tensor, units: int) -> tuple[float, float]:
    error = (found.double() - exact).abs().max().item()
    bound = 2 * (plain.double() - exact).abs().max().item()
    return error, bound + units * torch.finfo(torch.float32).eps * exact.abs().max().item()


def _weight_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """By how much the kernels round a softmax weight: float32's too, where PyTorch may multiply in TF32."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _WEIGHT_ROUNDING[torch.float16]
    return _WEIGHT_ROUNDING.get(dtype, 0.0)


def _weighted_lengths(case: Case, inputs: Inputs, ids: Ids) -> float:
    """The largest number in sum_j p_j |n_j| / T, with p the softmax over positive and queue."""
    found = 0.0
    for _, block, (image_ids, queue_ids) in _blocks(inputs, ids):
        q, k, queue = block.to(torch.float64)
        similarity = q @ queue.T
        if image_ids is not None and queue_ids is not None:
            similarity.masked_fill_(image_ids[:, None] == queue_ids, -torch.inf)
        positive = (q * k).sum(dim=1, keepdim=True)
        p = torch.cat((positive, similarity), dim=1).div_(case.temperature).softmax(dim=1)[:, 1:]
        found = max(found, (p @ queue.abs()).max().item())
    return found / case.temperature


def _compare_statistics(found: Statistics, exact: Statistics) -> list[str]:
    misses = []
    for name in ("positive", "hard", "synthetic"):
        one, other = cast(Tensor, getattr(found, name)).double(), cast(Tensor, getattr(exact, name))
        if not torch.allclose(one, other, rtol=0, atol=_STATISTICS, equal_nan=True):
            misses.append(f"statistics.{name}")
    if not torch.equal(found.queue_rank, exact.queue_rank):
        misses.append("statistics.queue_rank")
    # A synthetic negative may tie with the positive but for rounding.
    if (found.rank - exact.rank).abs().max() > 1:
        misses.append("statistics.rank")
    return misses
