"""The parameters of views as rows of 16 words, which cross to a device in one copy and which the kernels read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["PARAMETERS", "WORDS", "as_parameters", "as_words"]

#: The parameters of V views, as `data.augment.draw` draws them: name, trailing shape and kind of dtype.
PARAMETERS: dict[str, tuple[tuple[int, ...], str]] = {
    "crop": ((4,), "integer"),
    "order": ((4,), "integer"),
    "factors": ((4,), "floating"),
    "grayscale": ((), "bool"),
    "sigma": ((), "floating"),
    "solarize": ((), "bool"),
    "flip": ((), "bool"),
}
#: Words of a view: crop, order, grayscale, solarize and flip, then factors and sigma by their bits.
WORDS = 16


def as_words(parameters: Mapping[str, Tensor]) -> Tensor:
    """The words of V views, (V, 16) int32, from the tensors of `PARAMETERS`."""
    flags = torch.stack([parameters[name] for name in ("grayscale", "solarize", "flip")], dim=1)
    whole = torch.cat([parameters["crop"].int(), parameters["order"].int(), flags.int()], dim=1)
    floats = torch.cat([parameters["factors"], parameters["sigma"][:, None]], dim=1)
    return torch.cat([whole, floats.float().view(torch.int32)], dim=1)


def as_parameters(words: Tensor) -> dict[str, Tensor]:
    """The tensors of `PARAMETERS` from the words of V views, (V, 16) int32."""
    flags, floats = words[:, 8:11] != 0, words[:, 11:].view(torch.float32)
    return {
        "crop": words[:, :4],
        "order": words[:, 4:8],
        "factors": floats[:, :4],
        "grayscale": flags[:, 0],
        "sigma": floats[:, 4],
        "solarize": flags[:, 1],
        "flip": flags[:, 2],
    }
