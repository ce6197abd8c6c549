"""From DALI's crops to views: the operations after the crop, those of every pipeline, on the device of the crops."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from synco_fast.data.augment.draw import ViewParameters
from synco_fast.data.augment.ops import finish_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise

__all__ = ["finish_crops"]


def finish_crops(
    crops: Sequence[Tensor],
    parameters: Sequence[ViewParameters],
    recipe: Recipe,
    dtype: torch.dtype,
    pool: ThreadPoolExecutor | None = None,
) -> tuple[Tensor, ...]:
    """Batches of views, (b, 3, size, size) each, from batches of crops; in channels-last layout on a GPU.

    Args:
        crops: (b, size, size, 3) uint8 each.
        parameters: The parameters of each batch.
        recipe: Gives mean and standard deviation.
        dtype: torch.uint8 for pixels; a floating type for normalised values.
        pool: Threads that share the work on a CPU.
    """
    together = torch.cat(list(crops)).permute(0, 3, 1, 2)
    drawn = ViewParameters.join(parameters)
    layout = torch.contiguous_format if together.device.type == "cpu" else torch.channels_last
    if together.device.type == "cpu":
        views = torch.empty(together.shape, dtype=torch.uint8)

        def finish(row: int) -> None:  # one view at a time: it fits into a core's cache
            crop = together[row : row + 1].to(torch.float32, memory_format=layout)
            views[row] = finish_views(crop, drawn[row : row + 1])[0]

        rows = range(len(drawn))
        list(map(finish, rows) if pool is None else pool.map(finish, rows))
    else:
        views = finish_views(together, drawn).contiguous(memory_format=layout)
    if dtype != torch.uint8:
        views = normalise(views, recipe, layout, dtype)
    return tuple(torch.split(views, [len(part) for part in parameters]))
