"""Validation of the batch norm backends against the float64 formula, on any device and any shape.

All backends get the same stored values. For y, the gradients and the running statistics they must satisfy

    |found - exact|  <=  2 |modules - exact|  +  (max(16, |mean|) eps + u) max|exact|

"modules" is the result of PyTorch's own modules in the same precision, and eps that of float32. x has a standard
deviation of 1, so x minus its mean is rounded to |mean| eps. u is the rounding of a 16-bit result: at most 2^-8 in
bfloat16, 2^-11 in float16. The incoming gradient is 0 where the exact sum before the ReLU is within 0.05 of 0, since
there the sign depends on rounding, which differs between backends.
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

#: (B, C, H, W) and groups: the most different layers of a ResNet-50, 1 x 1 images, and odd sizes.
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
    """One layer to compare.

    Attributes:
        shape: (B, C, H, W).
        groups: Number of groups of the batch.
        relu, residual: Whether a ReLU and a residual add follow the norm.
        dtype: Dtype of x. Parameters and statistics are float32.
        training: Whether to use the statistics of the batch, not the running ones.
        mean: Mean of the values of x; their standard deviation is 1.
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
    """The result of a backend on a case.

    Attributes:
        backend: The backend.
        case: The case.
        errors, bounds: By quantity: the largest absolute error, and its bound.
        misses: Quantities beyond their bounds, and a repeat with other bits; empty if the case passed.
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
        dtypes: Dtypes of x.
        large: Add layers of a ResNet-50 at full size, about 3 GiB each in float64.
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
    """Compare backends of the batch norm with the float64 formula, case by case.

    Args:
        wanted: The cases; see `norm_cases`.
        device: Device of all computations.
        backends: Backends to compare; by default all that support the case on this device.

    Yields:
        A `NormVerdict` for each case and backend.

    Raises:
        ValueError: "triton" does not support a case, so the formula would have run in its place.
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
    # Draw on the device: for a large layer the host would take more than a second.
    generator = torch.Generator(device).manual_seed(0)
    channels = case.shape[1]

    def data(mean: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device) + mean
        return values.to(case.dtype, memory_format=torch.channels_last)

    def numbers() -> Tensor:
        return torch.randn(channels, generator=generator, device=device)

    leaves = {"x": data(case.mean), "weight": numbers(), "bias": numbers(), "residual": data(0.0)}
    # Evaluation normalises with the running statistics, which are close to those of x.
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
        bounds[name] = 2 * plain + (max(_UNITS, abs(case.mean)) * eps + rounding) * truth.abs().max().item()
        # `not <=`, so that NaN counts as a miss.
        if not own <= bounds[name]:
            misses.append(name)
    if not all(torch.equal(found[name], again[name]) for name in found):
        misses.append("a repeat gives other bits")
    return NormVerdict(backend, case, errors, bounds, tuple(misses))
