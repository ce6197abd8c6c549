"""The learning rate over a run."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, steps: int, warmup: int = 0, schedule: str = "cosine") -> float:
    """The learning rate of a step.

    Rises linearly over ``warmup`` steps, then follows half a cosine from ``peak`` to 0 (or stays at ``peak``). MoCo v2
    changes its rate once an epoch; here it changes every step, on the same curve.

    Args:
        step: Counted from 0.
        peak: The highest rate.
        steps: Length of the run.
        warmup: Steps until ``peak`` is reached.
        schedule: ``"cosine"`` or ``"constant"``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    share = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
