"""Views by fused kernels: what a pipeline that can use them offers, and its parameters in one copy to the device.

Kernels and pipelines do not know each other: training gives a pipeline the function that makes views, once it is
validated on the device.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synco_fast.data.augment.draw import ViewParameters
from synco_fast.data.augment.recipe import Recipe

__all__ = ["WORDS", "FusedViews", "MakeViews", "make_pair", "packed"]

#: Words of a view's parameters in `packed`.
WORDS = 16


class MakeViews(Protocol):
    """Makes views on a device from decoded images; see `synco_fast.kernels.views.make_views`."""

    def __call__(
        self,
        pixels: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        images: Tensor,
        parameters: Tensor,
        *,
        size: int,
        channels: int = 3,
        planar: bool = False,
        dtype: torch.dtype = torch.uint8,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> Tensor:
        """Views (V, 3, size, size) of ``dtype``, channels-last."""
        ...


@runtime_checkable
class FusedViews(Protocol):
    """A pipeline whose views fused kernels can make."""

    @property
    def kernel_input(self) -> dict[str, Any] | None:
        """Arguments of `synco_fast.kernels.proof.augment_shapes`; None if its settings leave no room for kernels."""
        ...

    def use_kernels(self, make: MakeViews) -> None:
        """Make the views of every later epoch by ``make``, normalised in the encoder's dtype."""
        ...


def packed(drawn: ViewParameters) -> NDArray[np.int32]:
    """The parameters of V views as (V, 16) int32, the words of `synco_fast.kernels.views`: one copy to a device."""
    flags = np.stack([drawn.grayscale, drawn.solarize, drawn.flip], axis=1).astype(np.int32)
    floats = np.concatenate([drawn.factors, drawn.sigma[:, None]], axis=1).astype(np.float32).view(np.int32)
    return np.concatenate([drawn.crop.astype(np.int32), drawn.order.astype(np.int32), flags, floats], axis=1)


def make_pair(
    make: MakeViews,
    recipe: Recipe,
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    images: Tensor,
    words: Tensor,
    *,
    size: int,
    dtype: torch.dtype,
    channels: int = 3,
    planar: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both views of B images, (B, 3, size, size) each, in one call.

    Args:
        make: Makes the views.
        recipe: Gives mean and deviation, where ``dtype`` is a floating one.
        pixels, offsets, sizes, channels, planar: The images, as in `synco_fast.kernels.views.make_views`.
        images: The number of each of the B images in ``offsets``, (B,).
        words: `packed` parameters, those of the first views before those of the second ones, (2 B, 16).
        size, dtype: Of the views.
    """
    normal = {} if dtype == torch.uint8 else {"mean": recipe.mean, "std": recipe.std}
    views = make(
        pixels,
        offsets,
        sizes,
        images,
        words,
        size=size,
        channels=channels,
        planar=planar,
        dtype=dtype,
        **normal,
    )
    first, second = views.chunk(2)
    return first, second
