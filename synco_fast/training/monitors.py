"""What a long run is watched by, beside loss and throughput."""

from __future__ import annotations

import resource

import torch

from synco_fast.training.engine import Engine

__all__ = ["monitors"]

_MIB = 1 << 20


def monitors(engine: Engine, step: int) -> dict[str, float]:
    """Figures of the moment; waits for the device, so it is called with the lines of the log.

    Args:
        engine: What is watched.
        step: Steps that are done.

    Returns:
        ``parameter_norm`` of the query encoder; ``key_momentum``; ``skipped`` steps since the run began; ``queue_age``,
        the age of the oldest key in steps; where losses are scaled ``loss_scale``; on a GPU ``memory_mib``, the most
        that was allocated since the last call, and ``memory_reserved_mib``; on a CPU ``memory_mib``, the most that the
        process has held.
    """
    queue, keys = engine.config.method.queue, engine.config.keys_per_step
    values = {
        "parameter_norm": engine.parameter_norm(),
        "key_momentum": engine.momentum(step - 1),
        "skipped": float(engine.skipped.read()[0]),
        "queue_age": min(float(step), queue / keys),
    }
    if engine.update.scale is not None:
        values["loss_scale"] = float(engine.update.scale)
    if engine.device.type == "cuda":
        values["memory_mib"] = torch.cuda.max_memory_allocated(engine.device) / _MIB
        values["memory_reserved_mib"] = torch.cuda.max_memory_reserved(engine.device) / _MIB
        torch.cuda.reset_peak_memory_stats(engine.device)
    else:
        values["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return values
