"""Trials: seconds per step of each engine and images per second of each pipeline, without changing the run."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from synco_fast.data.pipelines.base import Batch, Pipeline
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.runtime.distributed import HostGroup, lost_process
from synco_fast.runtime.errors import ConfigError, UserError, first_line
from synco_fast.runtime.names import EngineName
from synco_fast.runtime.optim_step import SkippedSteps
from synco_fast.runtime.phases import wait_for
from synco_fast.training.run.metrics import RunningMeans
from synco_fast.training.step.engine import Engine

__all__ = ["EngineTrial", "PipelineTrial", "feed", "reason_of", "trial", "try_engines", "try_largest", "try_pipeline"]

#: For each engine or pipeline: seconds of timed steps, number of blocks, fewest and most steps.
SECONDS, _BLOCKS, _FEWEST, _MOST = 4.0, 5, 5, 500
#: Loss scales tried before the comparison; each skipped step of a try halves the next one, so the last is far below 1.
_SCALES = 8
#: By number format: the largest relative difference from eager in the losses, and in the change of the weights over the
#: compared steps. Rounding errors grow from step to step.
ROUNDING = {"fp32": (1e-3, 0.05), "tf32": (1e-2, 0.2), "fp16": (1e-2, 0.2), "bf16": (2e-2, 0.5)}


@dataclass(frozen=True)
class EngineTrial:
    """The result for one engine.

    Attributes:
        engine: Its name.
        seconds: Seconds per step: median over blocks, on the slowest process; None if it was not timed.
        ready: Seconds before the first timed step: compiling, capturing, and the compared steps.
        loss_error, weight_error: Relative differences from eager, limited by `ROUNDING`; None if not computed.
        reason: Why it was dropped; None if it was not.
    """

    engine: EngineName
    seconds: float | None = None
    ready: float | None = None
    loss_error: float | None = None
    weight_error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class PipelineTrial:
    """The result for one pipeline: images per second of training from it, or why it was dropped."""

    pipeline: PipelineName
    images_per_second: float | None = None
    reason: str | None = None


@contextmanager
def trial(engine: Engine, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Run steps inside; on exit all state is restored bit for bit, and the engine is eager.

    Args:
        engine: The engine; all state of its method must be tensors (`Method.extra_state` is empty).
        note: Called with each line about a setting that does not work.
    """
    tensors = [*engine.method.parameters(), *engine.method.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    optimizer, update = copy.deepcopy(engine.optimizer.state_dict()), engine.update.state_dict()
    means, skipped, said = engine.means, engine.skipped, engine.note
    engine.means, engine.skipped, engine.note = RunningMeans(), SkippedSteps(engine.device), note
    try:
        with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
            yield
    finally:
        engine.use("eager")
        engine.means, engine.skipped, engine.note = means, skipped, said
        engine.optimizer.zero_grad(set_to_none=True)
        engine.optimizer.load_state_dict(optimizer)
        engine.update.load_state_dict(update)
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)


def try_largest(engine: Engine, step: int) -> None:
    """With progressive resizing on a GPU: try the steps at full size, so that too little memory shows at the start.

    Args:
        engine: The engine of a run before its next step.
        step: The number of that step.

    Raises:
        ConfigError: The device has too little memory.
    """
    config, using = engine.config, engine.form
    size, rows = config.augment.size, config.training.batch // engine.env.world
    if not config.augment.grows or not _is_gpu(engine) or engine.method.extra_state():
        return
    views = torch.zeros(2, rows, 3, size, size, dtype=torch.uint8, device=engine.device)
    batch = Batch(views[0], views[1], torch.arange(rows, device=engine.device))
    try:
        with trial(engine):
            engine.use(using)
            for number in range(engine.settling_of(using)):
                engine.step(batch, step + number, config.training.epochs - 1)
            wait_for(engine.device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"augment.size: found {size}, expected less: a step at that size, to which views grow, takes more memory "
            "than the GPU has; or set a smaller training.batch"
        ) from error
    finally:
        engine.use(using)
        torch.cuda.empty_cache()


def try_engines(
    engine: Engine,
    names: Sequence[EngineName],
    batches: Sequence[Batch],
    control: HostGroup,
    *,
    step: int,
    epoch: int,
    seconds: float | None = None,
    unless: Callable[[EngineName, float], str | None] = lambda name, seconds: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[EngineTrial]:
    """Try engines one after the other from the same state; called by all processes of a job.

    Args:
        engine: The engine.
        names: Engines to try; the first is eager, with which the others are compared.
        batches: This process's share of two batches or more, on the device.
        control: Communication between the processes.
        step, epoch: Position in the run that the steps assume; it decides learning rate and negatives.
        seconds: Seconds of timed steps of each engine; `SECONDS` by default.
        unless: Maps an engine and eager's seconds per step to a reason not to try that engine, or None.
        say: Called with each line of progress.
    """
    found: list[EngineTrial] = []
    reference, steps = None, 0
    compared = max(engine.settling_of(name) for name in names)
    start = [parameter.detach().clone() for parameter in engine.trainable.parameters()]
    scaling = _settled_scaling(engine, batches, start, compared, step, epoch)
    for name in names:
        needless = unless(name, found[0].seconds or 0.0) if found else None
        if needless:
            found.append(EngineTrial(name, reason=needless))
            continue
        say(f"engine auto: measuring {name}")
        notes: list[str] = []
        with trial(engine, notes.append):
            engine.update.load_state_dict(scaling)
            begun = time.perf_counter()
            losses, moved, reason = _compared_steps(engine, name, batches, start, compared, step, epoch)
            reason = reason or (notes[-1] if notes and engine.form != name else None)
            ready = time.perf_counter() - begun
            errors: tuple[float | None, float | None] = None, None
            if reason is None and reference is None:
                reference = losses, moved
                reason = None if all(map(math.isfinite, losses)) else "its losses are not finite"
            elif reason is None:
                errors, reason = _compared(reference, losses, moved, engine.precision.name)
            if control.max(int(reason is not None))[0]:
                found.append(EngineTrial(name, None, ready, *errors, reason or "another process refused it"))
                if name == names[0]:
                    return found
                continue
            steps = steps or _how_many(engine, batches, control, step, epoch, seconds or SECONDS)
            median = statistics.median(_timed(engine, batches, steps, step, epoch))
            found.append(EngineTrial(name, control.max(round(1e9 * median))[0] / 1e9, ready, *errors))
    return found


def _settled_scaling(
    engine: Engine, batches: Sequence[Batch], start: list[Tensor], steps: int, step: int, epoch: int
) -> dict[str, float]:
    """The state of loss scaling in which no compared step of eager overflows; empty where losses are not scaled.

    The first scale of fp16 is meant to overflow and to be halved, but a skipped step has no loss to compare.
    """
    scaling: dict[str, float] = engine.update.state_dict()
    for _ in range(_SCALES if scaling else 0):
        with trial(engine):
            engine.update.load_state_dict(scaling)
            _, _, reason = _compared_steps(engine, "eager", batches, start, steps, step, epoch)
            # Half of what serves eager, so that rounding decides about no step of another engine.
            found = {"scale": float(engine.update.state_dict()["scale"]) / 2, "growth": 0}
            skipped, _, _ = engine.skipped.read()
        if reason is not None:
            break  # the trial of eager says so
        if not skipped:
            return found
        scaling = found
    return scaling


def reason_of(error: Exception, world: int) -> str:
    """Why an engine or a pipeline is dropped: any failure, from the compiler to memory, drops only that one.

    Raises:
        Exception: The error, if it means that another process of the job is gone.
    """
    if world > 1 and lost_process(error):
        raise error
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _compared_steps(
    engine: Engine, name: EngineName, batches: Sequence[Batch], start: list[Tensor], steps: int, step: int, epoch: int
) -> tuple[list[float], list[Tensor], str | None]:
    """The first steps: their losses, the change of the weights, and the reason if they failed."""
    losses: list[float] = []
    try:
        engine.use(name)
        for number in range(steps):
            engine.step(batches[number % len(batches)], step + number, epoch)
            values = engine.means.pop()
            losses.append(values.get("loss", math.nan))
    except Exception as error:
        return [], [], reason_of(error, engine.env.world)
    with torch.no_grad():
        return losses, list(torch._foreach_sub(list(engine.trainable.parameters()), start)), None


def _compared(
    reference: tuple[list[float], list[Tensor]] | None, losses: list[float], moved: list[Tensor], precision: str
) -> tuple[tuple[float, float], str | None]:
    """The differences from eager, and the reason if they exceed rounding."""
    assert reference is not None
    of_losses = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, reference[0], strict=True))
    norm, apart = (
        float(torch.nn.utils.get_total_norm(part))
        for part in (reference[1], list(torch._foreach_sub(moved, reference[1])))
    )
    of_weights = apart / norm if norm else apart
    for error, limit, what in zip((of_losses, of_weights), ROUNDING[precision], ("losses", "weights"), strict=True):
        if not error <= limit:
            return (of_losses, of_weights), f"its {what} are {error:.2g} from eager's, expected up to {limit:g}"
    return (of_losses, of_weights), None


def _how_many(
    engine: Engine, batches: Sequence[Batch], control: HostGroup, step: int, epoch: int, seconds: float
) -> int:
    """The number of steps that takes about so many seconds, the same on every process."""
    once = statistics.median(_timed(engine, batches, _BLOCKS, step, epoch))
    slowest = control.max(round(1e9 * once))[0] / 1e9
    return int(min(_MOST, max(_FEWEST, seconds / max(slowest, 1e-9))))


def _timed(engine: Engine, batches: Sequence[Batch], steps: int, step: int, epoch: int) -> list[float]:
    """Seconds per step, by block."""
    seconds, each = [], max(1, steps // _BLOCKS)
    for block in range(_BLOCKS):
        wait_for(engine.device)
        begun = time.perf_counter()
        for number in range(block * each, (block + 1) * each):
            engine.step(batches[number % len(batches)], step + number, epoch)
        wait_for(engine.device)
        seconds.append((time.perf_counter() - begun) / each)
    return seconds


def _is_gpu(engine: Engine) -> bool:
    return engine.device.type == "cuda"


def feed(pipeline: Pipeline, first: int = 0) -> Iterator[Batch]:
    """Batches of one epoch after another, from epoch ``first`` on."""
    for epoch in count(first):
        pipeline.set_epoch(epoch)
        yield from pipeline


def try_pipeline(
    engine: Engine,
    using: EngineName,
    pipeline: Pipeline,
    control: HostGroup,
    *,
    step_seconds: float,
    step: int,
    epoch: int,
    first: int = 0,
) -> tuple[float | None, str | None]:
    """Images per second, over all processes, of training from a pipeline; or None, and why this process has no figure.

    Only the second half of the steps is timed: the first uses up the batches that workers prepared ahead. A pipeline
    that fails at its first batch is dropped on all processes. One that fails later is dropped too, but only without
    other processes, which would wait in the step.

    Args:
        engine, using: The engine, and its name.
        pipeline: The pipeline of this process.
        control: Communication between the processes.
        step_seconds: Seconds per step without waiting for data, the same on every process.
        step, epoch: As in `try_engines`.
        first: The epoch whose batches come first.
    """
    half = int(min(_MOST, max(_FEWEST, SECONDS / step_seconds)))
    world, batches, reason = control.env.world, feed(pipeline, first), None
    try:
        batches = chain([next(batches)], batches)
    except Exception as error:
        reason = reason_of(error, world)
    if control.max(int(reason is not None))[0]:
        return None, reason
    try:
        with trial(engine):
            engine.use(using)
            begun = 0.0
            for number in range(2 * half):
                if number == half:
                    wait_for(engine.device)
                    begun = time.perf_counter()
                engine.step(next(batches), step + number, epoch)
            wait_for(engine.device)
            seconds = time.perf_counter() - begun
    except Exception as error:
        if world > 1:
            raise
        return None, reason_of(error, world)
    slowest = control.max(round(1e9 * seconds))[0] / 1e9
    return half * engine.config.training.batch / slowest, None
