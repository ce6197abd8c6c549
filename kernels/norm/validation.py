"""The forms of the batch norm against the formula in float64, on any device and any shape.

Each is given the same stored values and must keep, for y, the gradients and the running statistics,

    |found - exact|  <=  2 |modules - exact|  +  (16 eps + u) max|exact|

with modules the calls of PyTorch's own modules in the same precision, eps that of float32, and u the rounding of the
result itself where it has 16 bits: at most 2^-8 in bfloat16, 2^-11 in float16. The incoming gradient is
0 where the exact sum before the ReLU is within 0.05 of 0: rounding decides the sign there, in every form differently.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synco_fast.kernels.norm.ops import NormBackend, batch_norm, unserved_by_triton

__all__ = ["NormCase", "NormVerdict", "norm_cases", "validate_norm"]

#: (B, C, H, W) and groups: the layers of a ResNet-50 that differ most, one place an image, odd numbers throughout.
_SHAPES = (((16, 64, 28, 28), 8), ((8, 2048, 2, 2), 2), ((6, 3, 7, 7), 3), ((8, 130, 1, 1), 2), ((5, 24, 9, 5), 1))
_LARGE = (
    ((256, 64, 56, 56), 8),
    ((256, 256, 56, 56), 1),
    ((256, 512, 28, 28), 8),
    ((256, 1024, 14, 14), 2),
    ((256, 2048, 7, 7), 8),
)
_UNITS = 16
_NEAR = 0.05


@dataclass(frozen=True)
class NormCase:
    """One layer.

    Attributes:
        shape: (B, C, H, W).
        groups: Of the batch.
        relu, residual: What follows the norm.
        dtype: Of x; parameters and statistics are float32.
        training: Statistics of the batch, or the running ones.
        mean: About which the values of x lie, with deviation 1.
    """

    shape: tuple[int, int, int, int]
    groups: int
    relu: bool
    residual: bool
    dtype: torch.dtype
    training: bool = True
    mean: float = 1.0


@dataclass(frozen=True)
class NormVerdict:
    """The result of a form on a case.

    Attributes:
        backend: Which.
        case: Of what.
        errors, bounds: By quantity: largest absolute error, and its bound.
        misses: Quantities beyond their bounds, and whether a repeat gives other bits; empty where all is well.
    """

    backend: str
    case: NormCase
    errors: dict[str, float]
    bounds: dict[str, float]
    misses: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        case = self.case
        return {
            "backend": self.backend,
            "shape": list(case.shape),
            "groups": case.groups,
            "relu": case.relu,
            "residual": case.residual,
            "dtype": str(case.dtype).removeprefix("torch."),
            "training": case.training,
            "mean": case.mean,
            "errors": self.errors,
            "bounds": self.bounds,
            "misses": list(self.misses),
        }


def norm_cases(dtypes: Sequence[torch.dtype], *, large: bool) -> list[NormCase]:
    """The sweep: every shape and dtype with and without ReLU and residual, in training and evaluation.

    Args:
        dtypes: Of x.
        large: Whether to add layers of a ResNet-50 at full size, about 3 GiB each in float64.
    """
    kinds = ((False, False), (True, False), (True, True))
    found = []
    for (shape, groups), dtype, (relu, residual) in itertools.product(_SHAPES, dtypes, kinds):
        found.append(NormCase(shape, groups, relu, residual, dtype))
        found.append(NormCase(shape, 1, relu, residual, dtype, training=False))
        if dtype == torch.float32:
            found.append(NormCase(shape, groups, relu, residual, dtype, mean=1000.0))
    for (shape, groups), dtype in itertools.product(_LARGE if large else (), dtypes):
        found.append(NormCase(shape, groups, True, True, dtype))
    return found


def validate_norm(
    wanted: Sequence[NormCase], device: torch.device, backends: Sequence[NormBackend] | None = None
) -> Iterator[NormVerdict]:
    """Compare forms of the batch norm with the formula in float64, case by case.

    Args:
        wanted: See `norm_cases`.
        device: Where all of them compute.
        backends: Which; by default all that serve a case on this device.

    Yields:
        A `NormVerdict` for each case and form.

    Raises:
        ValueError: The kernels were asked for and do not serve a case, so that the formula would have stood in.
    """
    for case in wanted:
        leaves, state = _inputs(case, device)
        reason = unserved_by_triton(leaves["x"])
        if reason and backends is not None and "triton" in backends:
            raise ValueError(f"backend: found triton, expected another one on this device: {reason}")
        chosen: Sequence[NormBackend] = backends or ("reference", "native", *(() if reason else ("triton",)))
        up = _incoming(case, leaves, state)
        exact = _run("reference", case, leaves, state, up, torch.float64)
        modules = _run("native", case, leaves, state, up)
        for backend in chosen:
            found, again = (_run(backend, case, leaves, state, up) for _ in range(2))
            yield _judge(backend, case, exact, modules, found, again)


def _inputs(case: NormCase, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    # Made where they are used: a layer of a ResNet has more numbers than a host makes in a second.
    generator = torch.Generator(device).manual_seed(0)
    channels = case.shape[1]

    def data(mean: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device) + mean
        return values.to(case.dtype, memory_format=torch.channels_last)

    def numbers() -> Tensor:
        return torch.randn(channels, generator=generator, device=device)

    leaves = {"x": data(case.mean), "weight": numbers(), "bias": numbers(), "residual": data(0.0)}
    # In evaluation the running statistics normalise: near those of x.
    mean = case.mean + 0.1 * numbers()
    variance = 1 + 0.1 * numbers().abs()
    return leaves, {"running_mean": mean, "running_var": variance}


def _incoming(case: NormCase, leaves: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    values: dict[str, Any] = {name: value.double() for name, value in (leaves | state).items()}
    residual = values.pop("residual")
    before = batch_norm(
        **values,
        groups=case.groups,
        residual=residual if case.residual else None,
        training=case.training,
        backend="reference",
    )
    up = torch.randn(case.shape, generator=torch.Generator(before.device).manual_seed(1), device=before.device)
    if case.relu:
        up = up.masked_fill(before.abs() < _NEAR, 0)
    return up.to(case.dtype, memory_format=torch.channels_last)


def _run(
    backend: NormBackend,
    case: NormCase,
    leaves: dict[str, Tensor],
    state: dict[str, Tensor],
    up: Tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    given: dict[str, Any] = {
        name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in leaves.items()
    }
    running: dict[str, Any] = {name: value.to(dtype or value.dtype, copy=True) for name, value in state.items()}
    tracked = torch.zeros((), dtype=torch.int64, device=up.device)
    settings: dict[str, Any] = {"relu": case.relu, "training": case.training, "num_batches_tracked": tracked}
    residual = given.pop("residual")
    if case.residual:
        settings["residual"] = residual
    y = batch_norm(**given, **running, **settings, groups=case.groups, backend=backend)
    wanted = [*given.values()] + ([residual] if case.residual else [])
    gradients = torch.autograd.grad(y, wanted, up.to(y.dtype))
    names = ("dx", "dw", "db", "dr")
    return {"y": y.detach(), **dict(zip(names, gradients, strict=False)), **running, "batches": tracked}


def _judge(
    backend: str,
    case: NormCase,
    exact: dict[str, Tensor],
    modules: dict[str, Tensor],
    found: dict[str, Tensor],
    again: dict[str, Tensor],
) -> NormVerdict:
    errors, bounds, misses = {}, {}, []
    eps = torch.finfo(torch.float32).eps
    for name, truth in exact.items():
        plain, own = ((values[name].double() - truth).abs().max().item() for values in (modules, found))
        errors[name] = own
        rounding = torch.finfo(found[name].dtype).eps / 2 if found[name].dtype.itemsize == 2 else 0.0
        bounds[name] = 2 * plain + (_UNITS * eps + rounding) * truth.abs().max().item()
        # Written so that NaN misses.
        if not own <= bounds[name]:
            misses.append(name)
    if not all(torch.equal(found[name], again[name]) for name in found):
        misses.append("a repeat gives other bits")
    return NormVerdict(backend, case, errors, bounds, tuple(misses))
