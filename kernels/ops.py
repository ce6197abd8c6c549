"""The one public operator, and the choice of the back end that computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from synco_fast.kernels import reference
from synco_fast.kernels.checks import check_arguments
from synco_fast.kernels.contrast import Contrast
from synco_fast.kernels.negatives import Negatives

__all__ = ["Backend", "synthetic_contrast"]

Backend = Literal["auto", "reference"]

_BACKENDS: dict[str, Callable[..., Contrast]] = {"reference": reference.contrast}


def synthetic_contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    *,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    backend: Backend = "auto",
) -> Contrast:
    """InfoNCE of each query against its key, the queue and synthetic hard negatives (MoCo v2, MoCHi and SynCo alike).

    q, k and the queue's rows are taken as they are: give unit rows. The gradient reaches q alone; k, the queue and the
    synthetic negatives are constants. A query or key row that holds NaN makes its own loss NaN and no other row's; a
    queue row that holds NaN makes every loss NaN; a synthetic vector of length 0 stays 0 and so has similarity 0.

    Args:
        q: Queries, (B, D), floating point.
        k: The positive key of each query, (B, D), dtype and device of q.
        queue: Keys of earlier steps, (K, D), any floating dtype; the head computes in the wider of the two dtypes.
        negatives: What is contrasted beside the queue: `Negatives.moco()`, `.mochi(N, s, s')` or `.synco()`.
        temperature: T, above 0.
        seed: The run's seed, in [0, 2**32).
        step: The training step, in [0, 2**32), or an int64 tensor of no dimensions.
        first_row: Global index of the first query; draws depend on it, not on how a batch is spread over ranks.
        image_ids: The image each query was made from, (B,) int64. With ``queue_ids`` it masks a queue key of the very
            same image: it is no negative of that query and no candidate for Q^N.
        queue_ids: The image each queue key was made from, (K,) int64, -1 where there is none.
        backend: ``"auto"`` takes the fastest that serves the arguments; ``"reference"`` the plain form.

    Returns:
        The loss of each row, (B,), and `Statistics`.

    Raises:
        TypeError, ValueError: As `check_arguments` says, naming the argument, what was found and what is allowed.
    """
    check_arguments(
        q,
        k,
        queue,
        negatives,
        temperature=temperature,
        seed=seed,
        step=step,
        first_row=first_row,
        image_ids=image_ids,
        queue_ids=queue_ids,
    )
    if backend not in get_args(Backend):
        raise ValueError(f"backend: found {backend!r}, allowed {', '.join(get_args(Backend))}")
    head = _BACKENDS["reference" if backend == "auto" else backend]
    return head(
        q,
        k,
        queue,
        negatives,
        temperature=temperature,
        seed=seed,
        step=step,
        first_row=first_row,
        image_ids=image_ids,
        queue_ids=queue_ids,
    )
