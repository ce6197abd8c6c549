"""Time of norm, add and ReLU, forward and backward, by subject (`bench/subjects.py`) and ResNet layer.

Rounds alternate between the subjects, so that a slow phase of the machine affects all of them; the median counts.
"""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from synco_fast.bench.norm_model import Layer, passes
from synco_fast.bench.timing import graph_seconds, seconds_of
from synco_fast.kernels.norm import NormBackend, batch_norm, unserved_by_triton
from synco_fast.models.batch_norm import SplitBatchNorm2d

__all__ = ["measure_norm", "prepare_norm", "totals", "unavailable"]

#: Copies of a run in the CUDA graph that times it.
_COPIES = 4


def unavailable(subject: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a subject cannot be measured here, or None if it can."""
    if subject == "triton":
        return unserved_by_triton(torch.empty(1, 1, 1, 1, dtype=dtype, device=device))
    if subject == "compiled" and device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, found no {compiler}"
    if subject == "apex":
        if device.type != "cuda" or dtype != torch.float16:
            return f"apex's kernels take float16 on a GPU, found {dtype} on {device.type}"
        try:
            importlib.import_module("apex.contrib.groupbn.batch_norm")
        except ImportError as error:
            return f"apex's contrib.groupbn cannot be imported ({error})"
    return None


def prepare_norm(
    subject: str, layer: Layer, batch: int, groups: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs a layer forward and backward once, and returns the gradients of x and of the residual.

    Args:
        subject: One of `NORMS`, for which `unavailable` returns None.
        layer: Shape of the layer, and the operations after the norm.
        batch: B.
        groups: Groups of the batch; "plain" and "apex" use one.
        device, dtype: Device and dtype of x. Parameters and statistics are float32.
    """
    shape = (batch, layer.channels, layer.height, layer.width)
    generator = torch.Generator(device).manual_seed(0)

    def make() -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(dtype, memory_format=torch.channels_last)

    x, r, up = make().requires_grad_(), make().requires_grad_(), make()
    residual = r if layer.residual else None
    wanted = [x] if residual is None else [x, residual]
    norm = nn.BatchNorm2d(layer.channels).to(device)
    leaves = [*wanted, norm.weight, norm.bias]
    if subject == "apex":
        return _apex(layer, x, residual, up)

    def call(backend: NormBackend, groups: int) -> Tensor:
        running = norm.running_mean, norm.running_var
        settings = {"residual": residual, "relu": layer.relu, "num_batches_tracked": norm.num_batches_tracked}
        return batch_norm(x, norm.weight, norm.bias, *running, groups=groups, backend=backend, **settings)  # type: ignore[arg-type]

    def modules(parts: Sequence[Tensor]) -> Tensor:
        y = norm(parts[0]) if len(parts) == 1 else torch.cat([norm(part) for part in parts])
        return follow(y)

    def follow(y: Tensor) -> Tensor:
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if layer.relu else y

    forward: Callable[[], Tensor]
    if subject == "grouped":
        forward = lambda: modules(x.chunk(groups))  # noqa: E731
    elif subject == "split":
        split = SplitBatchNorm2d.of(norm, groups)
        forward = lambda: follow(split(x))  # noqa: E731
    elif subject == "plain":
        forward = lambda: modules([x])  # noqa: E731
    elif subject == "folded":
        forward = lambda: follow(_folded(norm, x, groups))  # noqa: E731
    elif subject == "compiled":
        # Compile each layer for its own shape, without counting towards the recompilation limit.
        torch.compiler.reset()
        forward = torch.compile(lambda: call("reference", groups), dynamic=False)
    else:
        backend: NormBackend = "triton" if subject == "triton" else "native"
        forward = lambda: call(backend, groups)  # noqa: E731

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, up)[: len(wanted)]

    return run


def _folded(norm: nn.BatchNorm2d, x: Tensor, groups: int) -> Tensor:
    """One call for all groups: channel c of group g becomes channel g C + c, with a copy there and a copy back."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    mean, variance = norm.running_mean.repeat(groups), norm.running_var.repeat(groups)
    # (G, b, H, W, C) to (b, H, W, G, C), then merge the last two dimensions.
    places = x.permute(0, 2, 3, 1).unflatten(0, (groups, -1)).permute(1, 2, 3, 0, 4)
    y = functional.batch_norm(
        places.flatten(3).permute(0, 3, 1, 2),
        mean,
        variance,
        norm.weight.repeat(groups),
        norm.bias.repeat(groups),
        training=True,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    with torch.no_grad():
        for value, moved in ((norm.running_mean, mean), (norm.running_var, variance)):
            value.copy_(moved.unflatten(0, (groups, -1)).mean(dim=0))
    apart = y.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 4)
    found: Tensor = apart.flatten(0, 1).permute(0, 3, 1, 2)
    return found


def _apex(layer: Layer, x: Tensor, residual: Tensor | None, up: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Apex's module, which takes (B, H, W, C) and adds a residual only with a ReLU."""
    module: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")
    norm = module.BatchNorm2d_NHWC(layer.channels, fuse_relu=layer.relu).to(x.device)
    images, added, incoming = (
        None if value is None else value.detach().permute(0, 2, 3, 1).contiguous() for value in (x, residual, up)
    )
    assert images is not None
    wanted = [value.requires_grad_() for value in (images, added) if value is not None]

    def run() -> tuple[Tensor, ...]:
        found = torch.autograd.grad(norm(images, added), [*wanted, norm.weight, norm.bias], incoming)
        return tuple(value.permute(0, 3, 1, 2) for value in found[: len(wanted)])

    return run


class _Clocked:
    """A function that records the processor time of each call."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        self.seconds: list[float] = []

    def __call__(self) -> None:
        begun = time.process_time()
        self.run()
        self.seconds.append(time.process_time() - begun)


def measure_norm(
    subjects: Sequence[str],
    layers: Sequence[Layer],
    *,
    batch: int,
    groups: int,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    repeats: int = 3,
    rounds: int = 5,
) -> Iterator[dict[str, Any]]:
    """Measure every subject at every layer shape.

    Args:
        subjects: Some of `NORMS`, for which `unavailable` returns None.
        layers: See `synco_fast.bench.norm_model.layers_of`.
        batch: B.
        groups: Groups of the batch.
        device, dtype: Device and dtype of x.
        bandwidth: Bytes per second of a large copy on this device.
        repeats: Timed runs of a subject in a round.
        rounds: Rounds through all subjects.

    Yields:
        Subject and layer; ``seconds`` of every run and their median; ``cpu_seconds``, processor time of all threads,
        which other programs disturb less, and their median; ``gb_s``, bytes per second as `synco_fast.bench.norm_model`
        counts them; ``floor``, the time of the fused kernels' bytes at the bandwidth, as a fraction of the median. On a
        GPU also ``graph_s``, the median without the host's time: of copies in a CUDA graph.
    """
    for layer in layers:
        size = batch * layer.channels * layer.height * layer.width * dtype.itemsize
        runs = {subject: prepare_norm(subject, layer, batch, groups, device, dtype) for subject in subjects}
        seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
        busy: dict[str, list[float]] = {subject: [] for subject in subjects}
        for number in range(rounds):
            for subject, run in runs.items():
                clocked = _Clocked(run)
                seconds[subject] += seconds_of(clocked, device, repeats=repeats, warmup=1 + (number == 0))
                busy[subject] += clocked.seconds[-repeats:]
        captured: dict[str, float] = {}
        if device.type == "cuda":
            for subject, run in runs.items():
                captured[subject] = graph_seconds(run, device, copies=_COPIES, repeats=repeats * rounds)
        for subject in runs:
            form = {"grouped": "grouped", "split": "plain", "plain": "plain"}.get(subject, "triton")
            median = statistics.median(seconds[subject])
            yield {
                "subject": subject,
                **layer._asdict(),
                "seconds": seconds[subject],
                "median_s": median,
                "cpu_seconds": busy[subject],
                "cpu_median_s": statistics.median(busy[subject]),
                "gb_s": sum(passes(layer, form)) * size / median / 1e9,
                "floor": sum(passes(layer, "triton")) * size / bandwidth / median,
                **({"graph_s": captured[subject]} if subject in captured else {}),
            }


def totals(results: Sequence[dict[str, Any]], figure: str = "median_s") -> dict[str, float]:
    """Seconds of all layers of the backbone, by subject: the sum of median times number of such layers.

    Args:
        results: Results of `measure_norm`.
        figure: ``median_s``, ``cpu_median_s`` or ``graph_s``.
    """
    found: dict[str, float] = {}
    for result in results:
        found[result["subject"]] = found.get(result["subject"], 0.0) + result["times"] * result[figure]
    return found
