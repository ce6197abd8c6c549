"""Validation of fused kernels before their first use on a device: the registry, and the subprocess.

Each kernel is compared with PyTorch at the shapes and dtypes of a run, within the bounds of its own validation, and
must repeat bit for bit. ``python -m synco_fast.kernels.proof`` reads a request from standard input, as a line of JSON,
and writes one line for each kernel; a kernel that hangs or crashes affects only that process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from synco_fast.kernels import norm, ops
from synco_fast.kernels.momentum import momentum_update
from synco_fast.kernels.negatives import Negatives
from synco_fast.kernels.norm.validation import NormCase, validate_norm
from synco_fast.kernels.validation import Case, validate
from synco_fast.kernels.views import unserved_by_triton as unserved_views
from synco_fast.kernels.views.validation import ViewsCase, validate_views

__all__ = [
    "KERNELS",
    "Comparison",
    "FusedKernel",
    "answer",
    "augment_shapes",
    "loss_shapes",
    "momentum_shapes",
    "norm_shapes",
]

Shapes = Mapping[str, Any]
"""The shapes at which a run uses a kernel, as JSON values; see `loss_shapes` and the other functions of that name."""

#: Most values of a layer. A larger one is compared on fewer images, so that a float64 tensor takes at most half a GiB.
_LARGEST_LAYER = 1 << 26
#: Most views that are compared at a time; each takes some fifty operations of PyTorch.
_MOST_VIEWS = 128
#: Guard numbers between two tensors of the momentum update, which it must not change.
_GAP = 64
#: Allowed error of the momentum update, in units in the last place, in addition to twice the error of foreach.
_UNITS = 2
#: PR_SET_PDEATHSIG of prctl(2) in Linux: the signal that a process receives when its parent dies.
_SET_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Comparison:
    """One case of a proof.

    Attributes:
        about: Description of the case.
        errors, bounds: By quantity: the largest absolute error, and its bound.
        misses: Quantities beyond their bounds, and a repeat with other bits; empty if the case passed.
    """

    about: str
    errors: dict[str, float]
    bounds: dict[str, float]
    misses: tuple[str, ...]


class FusedKernel(NamedTuple):
    """A kernel that ``auto`` uses once it is validated.

    Attributes:
        fused, portable: Backends: the kernel, and the fallback.
        unserved: Function of `Shapes` and a device: the reason why the kernel does not support them, or None.
        prove: Function of `Shapes` and a device: yields comparisons.
    """

    fused: str
    portable: str
    unserved: Callable[[Shapes, torch.device], str | None]
    prove: Callable[[Shapes, torch.device], Iterator[Comparison]]


# -- the loss ---------------------------------------------------------------------------------------------------


def loss_shapes(
    *,
    calls: Sequence[tuple[int, bool]],
    length: int,
    dim: int,
    negatives: Sequence[Negatives],
    temperature: float,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The shapes at which a run uses the loss.

    Args:
        calls: For each call in a step: B, and whether queue keys of the query's own image are masked.
        length, dim: K and D.
        negatives: The negatives, in the order of the epochs.
        temperature: T.
        dtype: Dtype of q, k and the queue in the loss.
    """
    return {
        "calls": [list(call) for call in sorted(set(calls))],
        "length": length,
        "dim": dim,
        "negatives": [asdict(one) for one in dict.fromkeys(negatives)],
        "temperature": temperature,
        "dtype": _name(dtype),
        "float32": torch.backends.cuda.matmul.fp32_precision,
    }


def _unserved_loss(shapes: Shapes, device: torch.device) -> str | None:
    sample = torch.empty(1, dtype=_dtype(shapes["dtype"]), device=device)
    q, queue = (sample.expand(rows, shapes["dim"]) for rows in (1, shapes["length"]))
    return ops.unserved_by_triton(q, queue, shapes["temperature"])


def _prove_loss(shapes: Shapes, device: torch.device) -> Iterator[Comparison]:
    torch.backends.cuda.matmul.fp32_precision = shapes["float32"]
    for rows, masked in shapes["calls"]:
        for values in shapes["negatives"]:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
            negatives = Negatives(**fields)
            for peaked in (False, True):
                case = Case(
                    rows=rows,
                    length=shapes["length"],
                    dim=shapes["dim"],
                    hard=negatives.hard,
                    negatives=negatives,
                    method="the run's",
                    dtype=_dtype(shapes["dtype"]),
                    temperature=shapes["temperature"],
                    peaked=peaked,
                    masked=masked,
                )
                (verdict,) = validate(["triton"], [case], device)
                yield Comparison(
                    f"B = {rows}, K = {case.length}, D = {case.dim}, N = {case.hard}, {negatives.synthetic} synthetic, "
                    f"{shapes['dtype']}, {'peaked' if peaked else 'flat'}{', masked' if masked else ''}",
                    {"loss": verdict.loss_error, "gradient": verdict.gradient_error},
                    {"loss": verdict.loss_bound, "gradient": verdict.gradient_bound},
                    verdict.misses,
                )


# -- batch norm -------------------------------------------------------------------------------------------------


def norm_shapes(
    *, images: int, dtype: torch.dtype, layers: Sequence[tuple[int, int, int, int, bool, bool]]
) -> dict[str, Any]:
    """The shapes at which a run uses batch norm.

    Args:
        images: Images in one forward pass.
        dtype: Dtype of the activations.
        layers: (C, H, W, groups, relu, residual) of each layer.
    """
    return {"images": images, "dtype": _name(dtype), "layers": [list(one) for one in sorted(set(layers))]}


def _unserved_norm(shapes: Shapes, device: torch.device) -> str | None:
    sample = torch.empty(1, dtype=_dtype(shapes["dtype"]), device=device)
    layers = (sample.expand(shapes["images"], *layer[:3]) for layer in shapes["layers"])
    return next((reason for reason in map(norm.unserved_by_triton, layers) if reason), None)


def _prove_norm(shapes: Shapes, device: torch.device) -> Iterator[Comparison]:
    evaluated: set[tuple[bool, bool]] = set()
    for channels, height, width, groups, relu, residual in shapes["layers"]:
        fitting = max(1, _LARGEST_LAYER // (channels * height * width * groups))
        images = min(shapes["images"], fitting * groups)
        shape, dtype = (images, channels, height, width), _dtype(shapes["dtype"])
        cases = [NormCase(shape, groups, relu, residual, dtype)]
        if (relu, residual) not in evaluated:
            evaluated.add((relu, residual))
            cases.append(NormCase(shape, 1, relu, residual, dtype, training=False))
        for case in cases:
            (verdict,) = validate_norm([case], device, ["triton"])
            yield Comparison(
                f"{' x '.join(map(str, shape))}, {case.groups} groups, {shapes['dtype']}{', ReLU' if relu else ''}"
                f"{', residual' if residual else ''}{'' if case.training else ', evaluation'}",
                verdict.errors,
                verdict.bounds,
                verdict.misses,
            )


# -- the momentum update ----------------------------------------------------------------------------------------


def momentum_shapes(targets: Sequence[Tensor], momentum: float) -> dict[str, Any]:
    """The shapes at which a run uses the momentum update.

    Args:
        targets: The updated tensors.
        momentum: m.
    """
    sizes: dict[tuple[str, int], int] = {}
    for tensor in targets:
        if tensor.is_floating_point():
            key = _name(tensor.dtype), tensor.numel()
            sizes[key] = sizes.get(key, 0) + 1
    return {"sizes": [[*key, count] for key, count in sorted(sizes.items())], "momentum": momentum}


def _unserved_momentum(shapes: Shapes, device: torch.device) -> str | None:
    try:
        from synco_fast.kernels.triton import momentum
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    samples = (torch.empty(1, dtype=_dtype(name), device=device) for name, _, _ in shapes["sizes"])
    return next((reason for sample in samples if (reason := momentum.unserved(sample, sample))), None)


def _prove_momentum(shapes: Shapes, device: torch.device) -> Iterator[Comparison]:
    # The run's own momentum changes a 16-bit tensor by less than rounding.
    momenta = dict.fromkeys((shapes["momentum"], 0.5))
    dtypes = sorted({dtype for dtype, _, _ in shapes["sizes"]})
    for name, momentum in itertools.product(dtypes, momenta):
        sizes = [size for dtype, size, count in shapes["sizes"] if dtype == name for _ in range(count)]
        start = _Parameters(sizes, _dtype(name), device)
        query = start.like(1)
        exact = torch.lerp(start.buffer.double(), query.buffer.double(), 1 - momentum)
        runs = {
            "foreach": ("foreach", momentum),
            "found": ("triton", momentum),
            "again": ("triton", momentum),
            "on the device": ("triton", torch.tensor(momentum, dtype=torch.float64, device=device)),
        }
        results: dict[str, Tensor] = {}
        for title, (backend, m) in runs.items():
            target = start.copy()
            momentum_update(target.tensors, query.tensors, m, backend=backend)  # type: ignore[arg-type]
            results[title] = target.buffer
        still = start.copy()
        momentum_update(still.tensors, start.tensors, momentum, backend="triton")
        inside = start.inside
        error, plain = ((results[title].double() - exact)[inside].abs().max().item() for title in ("found", "foreach"))
        bound = 2 * plain + _UNITS * torch.finfo(_dtype(name)).eps * exact[inside].abs().max().item()
        misses = [] if error <= bound else ["k"]
        if not torch.equal(results["found"], results["again"]):
            misses.append("a repeat gives other bits")
        off = (results["on the device"].double() - exact)[inside].abs().max().item()
        if not off <= bound:
            misses.append("k, with the momentum on the device")
        if not torch.equal(still.buffer, start.buffer):
            misses.append("k, where it equals q")
        if any(not torch.equal(result[~inside], start.buffer[~inside]) for result in results.values()):
            misses.append("memory beside a tensor")
        about = f"m = {momentum:g}, {len(sizes)} tensors of {sum(sizes):,} numbers in all, {name}"
        yield Comparison(about, {"k": max(error, off)}, {"k": bound}, tuple(misses))


class _Parameters:
    """Tensors in one buffer, at addresses that are multiples of 16 bytes, with gaps between them."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._sizes, self._dtype, self._device = sizes, dtype, device
        rooms = [_GAP + math.ceil(size / _GAP) * _GAP for size in sizes]
        generator = torch.Generator(device).manual_seed(seed)
        self.buffer = torch.randn(sum(rooms) + _GAP, generator=generator, device=device).to(dtype)
        starts = [begin + _GAP for begin in itertools.accumulate([0, *rooms[:-1]])]
        self._spans = list(zip(starts, sizes, strict=True))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.buffer[start : start + size] for start, size in self._spans]

    @property
    def inside(self) -> Tensor:
        """Mask of the tensors in the buffer."""
        found = torch.zeros(len(self.buffer), dtype=torch.bool, device=self._device)
        for start, size in self._spans:
            found[start : start + size] = True
        return found

    def like(self, seed: int) -> _Parameters:
        return _Parameters(self._sizes, self._dtype, self._device, seed)

    def copy(self) -> _Parameters:
        made = object.__new__(_Parameters)
        made.__dict__.update(self.__dict__, buffer=self.buffer.clone())
        return made


# -- the augmentation -------------------------------------------------------------------------------------------


def augment_shapes(
    *,
    sides: Sequence[int],
    views: int,
    dtype: torch.dtype,
    image: tuple[int, int] | None,
    channels: int,
    planar: bool,
    sigma: float,
) -> dict[str, Any]:
    """Where a run makes views.

    Args:
        sides: Sides of the views, one for each size of progressive resizing.
        views: Views of a batch on this process.
        dtype: torch.uint8, or that of normalised views.
        image, channels, planar: Of the decoded images, as in `ViewsCase`.
        sigma: Largest sigma of the blur.
    """
    return {
        "sides": sorted(set(sides)),
        "views": views,
        "dtype": _name(dtype),
        "image": None if image is None else list(image),
        "channels": channels,
        "planar": planar,
        "sigma": sigma,
    }


def _unserved_augment(shapes: Shapes, device: torch.device) -> str | None:
    return unserved_views(torch.empty(1, dtype=torch.uint8, device=device))


def _prove_augment(shapes: Shapes, device: torch.device) -> Iterator[Comparison]:
    for side in shapes["sides"]:
        case = ViewsCase(
            size=side,
            views=min(shapes["views"], _MOST_VIEWS),
            dtype=_dtype(shapes["dtype"]),
            image=None if shapes["image"] is None else tuple(shapes["image"]),
            channels=shapes["channels"],
            planar=shapes["planar"],
            sigma=shapes["sigma"],
        )
        verdict = validate_views(case, device)
        yield Comparison(case.about, verdict.errors, verdict.bounds, verdict.misses)


# -- the registry, and the process ------------------------------------------------------------------------------

#: Fused kernels that ``auto`` may use, by the part of a step that they compute.
KERNELS = {
    "loss": FusedKernel("triton", "blockwise", _unserved_loss, _prove_loss),
    "norm": FusedKernel("triton", "native", _unserved_norm, _prove_norm),
    "momentum": FusedKernel("triton", "foreach", _unserved_momentum, _prove_momentum),
    "augment": FusedKernel("triton", "operators", _unserved_augment, _prove_augment),
}


def answer(request: Mapping[str, Any], out: TextIO) -> None:
    """Validate kernels in order, one line of JSON each, up to the first that raises.

    An error can leave the device in a state in which every later kernel fails; those need another process.

    Args:
        request: ``device``, and ``wanted``: pairs of a name in `KERNELS` and `Shapes`.
        out: Gets a line after each kernel: its name, comparisons and seconds, or its error.
    """
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name, shapes in request["wanted"]:
        begun = time.perf_counter()
        line: dict[str, Any] = {"kernel": name}
        try:
            line["compared"] = [asdict(one) for one in KERNELS[name].prove(shapes, device)]
        except Exception as error:  # compilers and drivers raise many kinds
            line["raised"] = f"{type(error).__name__}: {error}"
        line["seconds"] = time.perf_counter() - begun
        print(json.dumps(line), file=out, flush=True)
        if "raised" in line:
            return


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def main() -> None:
    """Answer the request on standard input."""
    # Compilers print to standard output: move theirs to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A parent that is killed ends nothing: the kernel does, so that no compiler and no GPU is kept.
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    request = json.loads(sys.stdin.readline())
    # Where that is not known, at least in the end.
    signal.alarm(math.ceil(request["seconds"]))
    answer(request, answers)


if __name__ == "__main__":
    main()
