"""Compare each launch of the loss with PyTorch in float64, right after it runs, to locate a wrong kernel.

``python -m synco_fast.bench.stages --dtype bfloat16`` prints a line of JSON for each launch. The exit code is 1 if one
differs. A CUDA fault ends the process; the last line then names the launch. With TRITON_INTERPRET=1 it runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from synco_fast.bench.launches import add_shape, intercepted, shape_of
from synco_fast.bench.loss import TEMPERATURE, Shape
from synco_fast.bench.subjects import DTYPES
from synco_fast.kernels.reference import hard_negatives, synthesise
from synco_fast.kernels.rng import draw
from synco_fast.kernels.triton import contrast_and_gradient
from synco_fast.kernels.validation import Inputs, exact_inputs, reference_answer

__all__ = ["CHECKS", "check_stages", "index_and_similarity"]

_SEED, _STEP = 3, 7
#: Rounding of the softmax weights of queue keys before the second product, relative to the largest.
_WEIGHTS = {"float32": 2e-5, "bfloat16": 2.0**-7, "float16": 2.0**-9}

#: A quantity's name, error and bound.
Finding = tuple[str, float, float]
Arguments = dict[str, Any]


class _Expected:
    """The expected results of the launches, in float64."""

    def __init__(self, inputs: Inputs, shape: Shape) -> None:
        self.inputs, self.shape, self.negatives = inputs, shape, shape.negatives
        self.q, self.k, self.queue = inputs.to(torch.float64)
        self.similarity = self.q @ self.queue.T
        self.positive = (self.q * self.k).sum(dim=1)
        self.shift = self.positive
        self.threshold = torch.full_like(self.positive, torch.inf)
        self.flagged = torch.zeros(len(self.q), dtype=torch.bool, device=self.q.device)
        self.values, self.index = hard_negatives(self.similarity, self.negatives.hard)

    def weights(self, similarity: Tensor) -> Tensor:
        """exp((s - m) / T)."""
        return ((similarity - self.shift[:, None]) / TEMPERATURE).exp()


def _largest(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite if only one side is NaN."""
    found = found.double()
    difference = torch.where(found == expected, 0, (found - expected).abs())
    difference = torch.where(found.isnan() & expected.isnan(), 0, difference)
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference in a row, divided by the row's largest absolute value."""
    scale = expected.abs().amax(dim=-1).clamp_min(1e-30)
    difference = (found.double() - expected).abs().amax(dim=-1) / scale
    return float(difference.nan_to_num(nan=torch.inf).max())


def _sample(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    size, rows = a["SAMPLE"], a["B"]
    found = a["p_sample"].reshape(-1)[: rows * size].view(rows, size)
    yield "similarity", _largest(found, expected.similarity[:, :: a["stride"]][:, :size]), 1e-6


def _rank(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    rows = len(expected.q)
    sample = a["p_sample"].reshape(-1)[: rows * a["SAMPLE"]].view(rows, -1).double()
    threshold = a["p_threshold"].double()
    yield "positive", _largest(a["p_positive"], expected.positive), 1e-6
    yield "shift", _largest(a["p_shift"], torch.maximum(expected.positive, sample.amax(dim=1))), 1e-6
    if a["wanted"]:
        reached = (sample >= threshold[:, None]).sum(dim=1) - a["wanted"]
        # Ties with the threshold count as reaching it, and the threshold need not be a sampled similarity.
        at_threshold = (sample - threshold[:, None]).abs() <= 1e-3
        excess = reached - at_threshold.sum(dim=1)
        yield "sampled keys missing to the wanted rank", float((-reached).clamp_min(0).max()), 0
        yield "sampled keys beyond the wanted rank", float(excess.clamp_min(0).max()), 0.1 * a["wanted"] + 4
    expected.shift, expected.threshold = a["p_shift"].double(), threshold


def _scan(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    weights = expected.weights(expected.similarity)
    rounding = _WEIGHTS[expected.shape.dtype]
    total = a["p_total"].double().sum(dim=0)
    largest = (weights @ expected.queue.abs()).amax(dim=1)
    yield "R", _relative(a["p_sum"].double().sum(dim=0)[:, None], weights.sum(dim=1, keepdim=True)), 1e-4
    yield "V", float(((total - weights @ expected.queue).abs().amax(dim=1) / largest).max()), rounding
    above = (expected.similarity > expected.positive[:, None]).sum(dim=1)
    yield "rank", _largest(a["p_rank"].sum(dim=0), above.double()), 0
    if "p_found" in a and a["p_found"] is not None:
        yield "candidates", float(_wrong_candidates(a, expected)), 0


def index_and_similarity(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of candidates: the queue index is in the low word, the similarity in the high word."""
    return packed & 0xFFFFFFFF, (packed >> 32).to(torch.int32).view(torch.float32)


def _wrong_candidates(a: Arguments, expected: _Expected) -> int:
    """Number of rows whose segments do not hold exactly the keys above the threshold, in order, unless one is full."""
    wrong = 0
    segment, found, count = a["SEGMENT"], a["p_found"], a["p_count"]
    above = expected.similarity > expected.threshold[:, None]
    for row in range(len(above)):
        if int(count[row].max()) > segment:
            continue
        parts = [found[row, split * segment :][: int(held)] for split, held in enumerate(count[row].tolist())]
        packed = torch.cat(parts)
        index, value = index_and_similarity(packed)
        wanted = above[row].nonzero()[:, 0]
        right = torch.equal(index, wanted) and _largest(value, expected.similarity[row, wanted]) <= 1e-6
        wrong += not right
    return wrong


def _select(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    expected.flagged = a["p_flag"] != 0
    yield "rows left", float(expected.flagged.sum()), float(len(expected.q))
    yield from _hard(a["p_hard"], expected, ~expected.flagged)


def _fill(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    """The similarities of the first flagged rows, as order-preserving integers."""
    some = _rows_of(a["p_flag"])
    flagged = (a["p_flag"] != 0).nonzero()[: a["places"], 0]
    bits = a["p_room"][: len(flagged)]
    found = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    yield "similarity", _largest(found, expected.similarity[some][flagged]), 1e-6


def _choose(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    some = _rows_of(a["p_flag"])
    done = torch.zeros_like(expected.flagged)
    done[some] = True
    packed = a["p_hard"].new_zeros(len(done), a["p_hard"].shape[1])
    packed[some] = a["p_hard"]
    yield from _hard(packed, expected, done)


def _rows_of(flag: Tensor) -> slice:
    """The rows of a slice of the flags."""
    begin = flag.storage_offset()
    return slice(begin, begin + len(flag))


def _hard(packed: Tensor, expected: _Expected, done: Tensor) -> Iterator[Finding]:
    """Compare Q^N with that of the reference, in its order, for the rows that are done."""
    index, value = index_and_similarity(packed)
    yield "index", float((index != expected.index)[done].sum()), 0
    yield "hard", _largest(value[done], expected.values[done]), 1e-6


def _mix(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    negatives, (rows, dim) = expected.negatives, expected.q.shape
    draws = draw(negatives, rows, dim, seed=_SEED, step=_STEP, device=expected.q.device, dtype=torch.float64)
    total = torch.zeros_like(expected.q)
    similarities = []
    vectors = synthesise(expected.q, expected.queue[expected.index], negatives, draws)
    names = {family.number: family.name for family in negatives.active()}
    for number, *_ in a["TABLE"]:
        made = vectors[names[number]]
        similarity = torch.einsum("bd,bnd->bn", expected.q, made)
        total += torch.einsum("bn,bnd->bd", expected.weights(similarity), made)
        similarities.append(similarity)
    yield "V", _relative(a["p_total"].double().sum(dim=1), total), 1e-4
    found = a.get("p_similarity")
    if found is not None and found.shape == torch.cat(similarities, dim=1).shape:
        yield "similarity", _largest(found, torch.cat(similarities, dim=1)), 1e-5


def _reduce(a: Arguments, expected: _Expected) -> Iterator[Finding]:
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "seed": _SEED, "step": _STEP}
    exact = reference_answer(expected.inputs, expected.negatives, **settings)
    yield "loss", _largest(a["p_loss"], exact.contrast.loss), 2e-5 + _WEIGHTS[expected.shape.dtype] * 1e-3
    # The gradient is a difference of two vectors of length about 1, divided by T.
    yield "gradient", _largest(a["p_gradient"], exact.gradient), _WEIGHTS[expected.shape.dtype] / TEMPERATURE
    statistics = exact.contrast.statistics
    yield "hard", _largest(a["p_hard_mean"], statistics.hard), 1e-5
    yield "synthetic", _largest(a["p_synthetic"], statistics.synthetic), 1e-5
    yield "queue rank", _largest(a["p_queue_rank"], statistics.queue_rank.double()), 0


#: The comparison for each launch, by its name.
CHECKS: dict[str, Callable[[Arguments, _Expected], Iterator[Finding]]] = {
    "sample": _sample,
    "rank": _rank,
    "scan": _scan,
    "select": _select,
    "fill": _fill,
    "choose": _choose,
    "mix": _mix,
    "reduce": _reduce,
}


def check_stages(
    shape: Shape, device: torch.device, say: Callable[[dict[str, Any]], None], *, tied: bool, repeats: int
) -> bool:
    """Compare the output of each launch with float64, and repeated runs with each other.

    Args:
        shape: At most 1,024 rows.
        device: A CUDA device, or the CPU with Triton's interpreter.
        tied: Make all keys of the queue equal, so that every row takes the slow path.
        repeats: Number of repeated runs, which must give the same bits.
        say: Called with a line before each launch, and with a line after its comparison.

    Returns:
        Whether every launch passed.
    """
    inputs = exact_inputs(shape.rows, shape.length, shape.dim, shape.torch_dtype).to(device=device)
    if tied:
        inputs.queue[:] = inputs.queue[0].clone()
    expected = _Expected(inputs, shape)
    about: dict[str, Any] = {"dtype": shape.dtype, "tied": tied}
    right = True

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def compare(kernel: Any, made: Any, grid: Any, arguments: Arguments) -> None:
        nonlocal right
        settle()
        name = kernel.fn.__name__
        check = CHECKS.get(name)
        line: dict[str, Any] = {"stage": name, **about, "compared": check is not None, "wrong": []}
        for what, error, bound in check(arguments, expected) if check else ():
            line[what] = error
            if not error <= bound:
                line["wrong"].append(f"{what}: found {error:.3g}, expected {bound:.3g} or less")
        right &= not line["wrong"]
        say(line)

    settings: dict[str, Any] = {"temperature": TEMPERATURE, "seed": _SEED, "step": _STEP}
    with intercepted(compare, run=True, before=lambda launch: say({"launch": launch.name, **about})):
        first = contrast_and_gradient(*inputs, shape.negatives, **settings)
    differ = 0
    for _ in range(repeats):
        again = contrast_and_gradient(*inputs, shape.negatives, **settings)
        differ += not all(
            torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(first, again, strict=True)
        )
    say({"stage": "repeats", **about, "differ": differ, "wrong": ["other bits"] if differ else []})
    return right and not differ


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    """Check the launches at one shape and print lines of JSON."""
    parser = argparse.ArgumentParser(description="Compare each launch of the loss with float64.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    add_shape(parser)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(options, options.dtype)
    right = []
    for tied in (False, True):
        repeats = 20 if device.type == "cuda" else 1
        right.append(check_stages(shape, device, _say, tied=tied, repeats=repeats))
    return not all(right)


if __name__ == "__main__":
    sys.exit(main())
