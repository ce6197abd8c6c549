"""Loss, gradient and statistics of a backend beside those of the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from synco_fast.kernels.blockwise import Outputs
from synco_fast.kernels.validation import Answer

__all__ = ["compare"]


def compare(
    within: Callable[..., None],
    found: Outputs,
    plain: Answer,
    exact: Answer,
    units: float,
    *,
    of_gradient: float | None = None,
    of_statistics: float = 1e-6,
) -> None:
    """Compare every output.

    Args:
        within: The fixture.
        found: What the backend gave.
        plain, exact: The reference in float32 and float64.
        units: Units in the last place allowed for the loss, and for the gradient too unless ``of_gradient`` is given.
        of_gradient: Those allowed for the gradient.
        of_statistics: Largest error of the mean similarities.
    """
    within(found.loss, plain.contrast.loss, exact.contrast.loss, "loss", units)
    within(found.gradient, plain.gradient, exact.gradient, "gradient", units if of_gradient is None else of_gradient)
    statistics = exact.contrast.statistics
    for name in ("positive", "hard", "synthetic"):
        expected = getattr(statistics, name)
        torch.testing.assert_close(getattr(found, name).double(), expected, rtol=0, atol=of_statistics, equal_nan=True)
    assert torch.equal(found.queue_rank, statistics.queue_rank)
    # A synthetic negative may tie with the positive but for rounding.
    assert (found.rank - statistics.rank).abs().max() <= 1
