"""The learning rate over a run."""

from __future__ import annotations

import math

__all__ = ["key_momentum", "learning_rate"]


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


def key_momentum(step: int, *, base: float, steps: int, schedule: str = "constant") -> float:
    """The momentum of the key encoder at a step: ``base``, or from ``base`` up to 1 along half a cosine.

    The cosine is that of BYOL (arXiv 2006.07733 section 3.2), which MoCo v3 kept.

    Args:
        step: Counted from 0.
        base: The momentum at the first step.
        steps: Length of the run.
        schedule: ``"constant"`` or ``"cosine"``.
    """
    if schedule == "constant":
        return base
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
