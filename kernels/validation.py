"""Validation of the loss backends against the float64 reference, on any device and any shape.

The numbers of all inputs are multiples of 1/128. They are exact in bfloat16, and their products and sums are exact in
float32. So every backend sees exactly the same similarities and must choose the same hard negatives, including ties.
The remaining difference is rounding, which has a bound:

    |found - exact|  <=  2 |reference in float32 - exact|  +  c eps max|exact|  +  rounding of the softmax weights

c is 16 for the loss. It is 64 for the gradient, a sum over the whole queue that some libraries add one term at a time.
The last term is for the Triton kernels with 16-bit inputs, and with float32 if TF32 is allowed. They round the softmax
weights of the queue keys to the tensor-core format before the second product: by a relative error of at most u = 2^-8
(bfloat16) or 2^-10 (TF32). This changes the gradient by at most u / T times the weighted sum of |n|.
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

#: c above, in units in the last place of float32.
_UNITS = {"loss": 16, "gradient": 64}
#: Relative rounding error of a softmax weight in the kernels, by the queue's dtype; for float32 see `_weight_rounding`.
_WEIGHT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
#: Absolute tolerance of mean similarities, which are sums of a few float32 numbers up to 1.
_STATISTICS = 1e-5
_SEED, _STEP = 3, 7
_EXACT_AND_PLAIN = (torch.float64, torch.float32)
#: Rows of NaN before and after an input. They keep the 16-byte alignment of the first row.
_GUARD = 128

#: Rows that the reference handles at a time, since it materialises every similarity and synthetic vector.
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
        """The same numbers inside larger tensors of NaN, so that a read out of bounds shows in the result."""

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
    """One case to compare: shape, dtype and negatives.

    Attributes:
        rows, length, dim, hard: B, K, D, N. MoCo, which uses no hard negatives, is compared at the same shape.
        negatives: The synthetic negatives.
        method: Name of the method in tables.
        dtype: Dtype of q, k and the queue.
        temperature: T.
        peaked: Whether the queue contains the queries, so that nearly all softmax weight is on one key.
        masked: Whether a same-image mask excludes about one key in ten for each row.
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
        backend: The backend.
        case: The case.
        loss_error, loss_bound, gradient_error, gradient_bound: Largest absolute errors and their bounds.
        misses: Descriptions of what is wrong; empty if the case passed.
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
    """Random rows of length about 1 whose similarities are exact in every dtype.

    Args:
        rows, length, dim: B, K, D.
        dtype: Dtype of all three. Every floating dtype holds the same numbers.
        peaked: See `Case`.
        seed: Random seed.
        device: Where to draw them, by default the CPU. Other devices draw other numbers.
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
    """The reference computed in ``dtype`` on the stored values.

    Args:
        inputs: Inputs in any dtype.
        negatives, temperature, seed, step, first_row, image_ids, queue_ids: As `synthetic_contrast` describes them.
        dtype: Dtype of the computation.
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
    """Random cases with odd B, K, D and N, so that no tile divides them, and random counts and settings.

    Args:
        count: Number of cases.
        dtypes: One of them is drawn for each case.
        rows, length, dim: The largest B, K and D.
        seed: The same seed gives the same cases.
    """
    draw = random.Random(seed)

    def odd(low: int, high: int) -> int:
        return draw.randrange(low | 1, high + 1, 2)

    found = []
    for _ in range(count):
        keys = odd(3, length)
        # Half of them have few hard negatives, so that a threshold is estimated.
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
    """The sweep: every shape and dtype with every method, flat and peaked, and once with a mask.

    Args:
        shapes: (B, K, D, N) of each. Every family gets at least about N / 8 negatives, so that all are covered.
        dtypes: Dtypes of the inputs.
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
        backends: Backends to validate; each must support the device. "reference" is skipped in 16-bit dtypes.
        wanted: The cases; see `cases`.
        device: Device of the backends and the reference.

    Yields:
        A `Verdict` for each case and backend.

    Raises:
        ValueError: A backend does not support a case on this device, so another one would have run in its place.
    """
    for case in wanted:
        # The reference computes in the dtype of its inputs, and there is no bound for it in 16-bit dtypes.
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
                raise ValueError(f"backend: found triton, expected another one on this device: {reason}")
            yield _judge(backend, case, inputs, (image_ids, queue_ids), exact, plain)


def _blocks(inputs: Inputs, ids: Ids) -> Iterator[tuple[int, Inputs, Ids]]:
    """Blocks of rows, each with the index of its first row."""
    for first in range(0, len(inputs.q), _BLOCK):
        part = slice(first, first + _BLOCK)
        images = None if ids[0] is None else ids[0][part]
        yield first, Inputs(inputs.q[part], inputs.k[part], inputs.queue), (images, ids[1])


def _in_blocks(case: Case, inputs: Inputs, ids: Ids, dtype: torch.dtype) -> Answer:
    """`reference_answer` in blocks of rows, to bound its memory. Rows are independent."""
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
    # The repeat passes the step as a device tensor, as in a CUDA graph; this must not change any bit.
    found = _run(backend, case, inputs, ids, _STEP)
    again = _run(backend, case, inputs, ids, torch.tensor(_STEP, device=inputs.q.device))
    misses = []
    loss_error, loss_bound = _error_and_bound(
        found.contrast.loss, plain.contrast.loss, exact.contrast.loss, _UNITS["loss"]
    )
    gradient_error, gradient_bound = _error_and_bound(
        found.gradient, plain.gradient, exact.gradient, _UNITS["gradient"]
    )
    # Autograd returns the gradient in the dtype of q.
    gradient_bound += torch.finfo(case.dtype).eps / 2 * exact.gradient.abs().max().item()
    if backend == "triton":
        gradient_bound += _weight_rounding(case.dtype, inputs.q.device) * _weighted_lengths(case, inputs, ids)
    # `not <=`, so that NaN counts as a miss.
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
    """Relative rounding error of a softmax weight in the kernels; for float32 only if PyTorch may use TF32."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _WEIGHT_ROUNDING[torch.float16]
    return _WEIGHT_ROUNDING.get(dtype, 0.0)


def _weighted_lengths(case: Case, inputs: Inputs, ids: Ids) -> float:
    """The largest value of sum_j p_j |n_j| / T, with p the softmax over the positive and the queue."""
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
    # A synthetic negative may tie with the positive up to rounding.
    if (found.rank - exact.rank).abs().max() > 1:
        misses.append("statistics.rank")
    return misses
