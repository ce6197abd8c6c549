"""Seconds of whole training steps by `model.norm`. The settings take turns in one process, step by step.

A slow phase of the machine affects all settings, so the ratios within a round count, not single times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from synco_fast.config import build_config
from synco_fast.data.pipelines.base import Batch
from synco_fast.runtime.phases import wait_for
from synco_fast.runtime.precision import resolve_device
from synco_fast.training.step.engine import Engine

__all__ = ["measure_norm_steps"]


def measure_norm_steps(
    values: dict[str, Any],
    norms: Sequence[str],
    *,
    rounds: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Time one step of each setting in a round. The order is reversed in every second round.

    Args:
        values: The configuration, by section and key.
        norms: Values of ``model.norm``. The others are compared with the first.
        rounds: Timed rounds.
        advance: Called after each round.

    Returns:
        For each setting ``seconds`` and ``cpu_seconds`` (of all threads) of every step and their medians, the loss of
        the last step, and ``of_first``, ``cpu_of_first``: quartiles of the ratio to the first setting of the round.
    """
    engines = {}
    for norm in norms:
        config = build_config({**values, "model": {**values["model"], "norm": norm}})
        engines[norm] = Engine(config, steps_per_epoch=1 << 20)
    device = resolve_device(config.training.device)
    generator = torch.Generator().manual_seed(0)
    size, batch = config.augment.size, config.training.batch
    views = torch.randint(0, 256, (2, batch, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    data = Batch(views[0], views[1], torch.arange(batch, device=device))

    def step(engine: Engine, number: int) -> tuple[float, float]:
        wall, busy = time.perf_counter(), time.process_time()
        engine.step(data, number, 0)
        wait_for(device)
        return time.perf_counter() - wall, time.process_time() - busy

    settling = max(engine.settling for engine in engines.values())
    for number in range(settling):
        for engine in engines.values():
            step(engine, number)
    found: dict[str, list[tuple[float, float]]] = {norm: [] for norm in norms}
    for number in range(rounds):
        order = norms if number % 2 == 0 else list(reversed(norms))
        for norm in order:
            found[norm].append(step(engines[norm], settling + number))
        advance()
    results = []
    for norm in norms:
        row: dict[str, Any] = {"norm": norm, "loss": engines[norm].means.pop()["loss"]}
        for place, name in enumerate(("", "cpu_")):
            own, first = ([times[place] for times in found[which]] for which in (norm, norms[0]))
            ratios = [one / other for one, other in zip(own, first, strict=True)]
            row[f"{name}seconds"], row[f"{name}median_s"] = own, statistics.median(own)
            row[f"{name}of_first"] = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        results.append(row)
    return results
