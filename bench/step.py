"""Images per second and peak memory of the whole training step, without data loading, by method and engine.

Each subject runs in its own process. Rounds alternate between the subjects, so that a slow phase of the machine affects
all of them. The command is `synco-fast bench step`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from synco_fast.bench.baselines.step import plain_step
from synco_fast.bench.timing import capture, peak_memory, reset_peak_memory
from synco_fast.config import Config, build_config
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.methods import METHODS
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.phases import wait_for
from synco_fast.runtime.precision import resolve_device
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.forms import choose_forms

__all__ = ["bench_step", "measure"]

#: Subjects that compute no loss, or their own.
_WITHOUT_LOSS = ("encoder", "encoder-plain", "plain")
_BLOCKS = 5
_MIB = 1 << 20
#: The vendor's dense bf16 FLOP/s, by a substring of the device name; the first match counts.
_STATED = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def measure(subject: str, values: dict[str, Any], *, engine: str, steps: int) -> dict[str, Any]:
    """Measure one subject in this process.

    Args:
        subject: One of `synco_fast.bench.subjects.STEPS`.
        values: The configuration, by section and key.
        engine: One of `synco_fast.bench.subjects.ENGINES`; the plain loop ignores it.
        steps: Timed steps, in five blocks, after a warm-up that compiles and fills caches.

    Returns:
        Images per second of every block and their median, peak memory in MiB above the level before the model was
        built, notes on settings that were not available, and the loss of the last step if there is one.
    """
    values = {**values, "training": {**values["training"], "engine": engine}}
    if subject in METHODS:
        values["method"] = {**values["method"], "name": subject}
    if subject == "encoder-plain":
        # The true limit: no grouped batch norm, and cuDNN benchmarks its algorithms.
        values["model"] = {**values["model"], "batch_norm_groups": 1, "norm": "plain"}
        values["training"] |= {"channels_last": True, "cudnn_benchmark": True}
    config = build_config(values)
    device = resolve_device(config.training.device)
    held = reset_peak_memory(device)
    notes: list[str] = []
    rates = []
    with _cudnn_setting(benchmark=subject == "plain"):
        run, settling, last = _runner(subject, config, device, notes)
        for number in range(settling):
            run(number)
        wait_for(device)
        for block in range(_BLOCKS):
            begun = time.perf_counter()
            each = max(1, steps // _BLOCKS)
            for number in range(each):
                run(settling + block * each + number)
            wait_for(device)
            rates.append(each * config.training.batch / (time.perf_counter() - begun))
    return {
        "subject": subject,
        "engine": "plain" if subject == "plain" else engine,
        "backend": None if subject in _WITHOUT_LOSS else config.method.backend,
        "images_per_second": rates,
        "median": statistics.median(rates),
        "peak_mib": (peak_memory(device) - held) / _MIB,
        "notes": notes,
        "loss": last(),
    }


@contextmanager
def _cudnn_setting(*, benchmark: bool) -> Iterator[None]:
    """Let cuDNN benchmark its algorithms, or leave that to the engine; the setting before comes back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _runner(
    subject: str, config: Config, device: torch.device, notes: list[str]
) -> tuple[Callable[[int], object], int, Callable[[], float | None]]:
    """A function that runs one step, the number of warm-up steps, and a function that returns the last loss."""
    size, rows = config.augment.size, config.training.batch
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(0, 256, (2, rows, 3, size, size), dtype=torch.uint8, generator=generator) for _ in range(2)]
    views = [(pair[0].to(device), pair[1].to(device)) for pair in pairs]
    images = torch.arange(rows, device=device)
    if subject == "plain":
        step = plain_step(config, device)
        plain = [tuple(normalise(view, config.augment) for view in pair) for pair in views]
        losses: list[float] = []
        return lambda number: losses.append(step(*plain[number % 2])), 3, lambda: losses[-1]
    engine = Engine(config, steps_per_epoch=1 << 20, note=notes.append)
    choose_forms(engine, HostGroup(DistEnv()))
    if subject == "encoder-plain":
        use_plain_batch_norm(engine.method)
    if subject.startswith("encoder"):
        ready = [
            tuple(normalise(view, config.augment, engine.layout, engine.precision.dtype) for view in pair)
            for pair in views
        ]
        return _captured(lambda: engine.encoders_alone(*ready[0]), engine), engine.settling, lambda: None

    def train(number: int) -> None:
        engine.step(Batch(*views[number % 2], images), number, 0)

    return train, engine.settling, lambda: engine.means.pop().get("loss")


def use_plain_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm by PyTorch's own, with the same parameters and buffers."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and type(child) is not nn.BatchNorm2d:
                plain = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
                plain._parameters, plain._buffers = child._parameters, child._buffers
                setattr(parent, name, plain.train(child.training))


def _captured(run: Callable[[], None], engine: Engine) -> Callable[[int], object]:
    """The encoders alone, as one CUDA graph if the steps they are compared with are captured."""
    once = capture(run, engine.device) if engine.graphed else run
    return lambda number: once()


def bench_step(
    config: Config,
    *,
    subjects: tuple[str, ...],
    engines: tuple[str, ...],
    backends: tuple[str, ...],
    steps: int,
    rounds: int,
    threads: int | None,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every subject with every engine setting.

    Args:
        config: Encoder, batch, image size, precision. Synthetic negatives are on from the first step.
        subjects, engines: What to measure. The plain loop is measured once, without engines.
        backends: Loss backends for the methods; by default that of the configuration.
        steps: Timed steps of a subject in a round.
        rounds: Rounds through all subjects.
        threads: Threads of each process; by default PyTorch's choice.
        say: Called with lines of progress.
        keep: Called with the report so far after every measurement, so that nothing is lost if one hangs.

    Returns:
        The environment, the configuration, the encoder's floating-point operations for an image, the results, and the
        failures with their reasons. Results have ratios to the plain loop, and to the encoders alone with the best
        engine.
    """
    device = resolve_device(config.training.device)
    values = config.model_dump(mode="json")
    values["method"]["warmup_epochs"] = 0
    jobs = []
    for subject in subjects:
        for engine in ("eager",) if subject == "plain" else engines:
            for backend in (None,) if subject in _WITHOUT_LOSS or not backends else backends:
                jobs.append((subject, engine, backend))
    found: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {job: [] for job in jobs}
    report: dict[str, Any] = {
        "environment": {**describe_environment(device), **({"threads": threads} if threads else {})},
        "config": values,
        "steps": steps,
        "rounds": rounds,
        "forward_operations": forward_operations(config),
        "results": [],
        "failed": [],
    }
    for number in range(rounds):
        for subject, engine, backend in jobs:
            say(f"round {number + 1}/{rounds}: {subject}, {engine}" + (f", {backend}" if backend else ""))
            own = values if backend is None else {**values, "method": {**values["method"], "backend": backend}}
            spec = {"subject": subject, "values": own, "engine": engine, "steps": steps, "threads": threads}
            try:
                found[subject, engine, backend].append(_in_a_process(spec))
            except RuntimeError as error:
                say(f"failed: {error}")
                report["failed"].append(str(error))
            report["results"] = _results(found, report["forward_operations"], str(report["environment"]["device"]))
            keep(report)
    return report


def _results(
    found: dict[tuple[str, str, str | None], list[dict[str, Any]]], operations: int, device: str
) -> list[dict[str, Any]]:
    """The results of each subject over all rounds, with ratios."""
    results = []
    for runs in filter(None, found.values()):
        rates = [rate for run in runs for rate in run["images_per_second"]]
        peak = max(run["peak_mib"] for run in runs)
        results.append({**runs[-1], "images_per_second": rates, "median": statistics.median(rates), "peak_mib": peak})
    _relate(results, operations, device)
    return results


def _in_a_process(spec: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "synco_fast.bench.step", json.dumps(spec)], capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise RuntimeError(f"{spec['subject']}, {spec['engine']}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def forward_operations(config: Config) -> int:
    """Floating-point operations of the query encoder's forward pass for one image, a multiply-add counted as two."""
    from synco_fast.methods.build import build_encoder

    size = config.augment.size
    encoder = build_encoder(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops())


def _relate(results: list[dict[str, Any]], operations: int, device: str) -> None:
    """Add ratios to the baselines, and the model FLOP utilisation against the vendor's rate of the measured device."""
    best = {
        name: max((row["median"] for row in results if row["subject"] == name), default=None)
        for name in ("encoder", "encoder-plain", "plain", "moco")
    }
    stated = next((rate for part, rate in _STATED.items() if part in device), None)
    for row in results:
        for name, rate in best.items():
            row[f"of_{name.replace('-', '_')}"] = row["median"] / rate if rate else None
        # Queries: forward, and a backward pass of twice the work. Keys: forward only. The loss does not count.
        row["operations_per_second"] = 4 * operations * row["median"]
        row["utilisation"] = row["operations_per_second"] / stated if stated else None


def main() -> None:
    """Measure one subject, given as JSON, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="subject, values, engine, steps and threads, as JSON")
    spec = json.loads(parser.parse_args().spec)
    threads = spec.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    print(json.dumps(measure(spec.pop("subject"), spec.pop("values"), **spec)))


if __name__ == "__main__":
    main()
