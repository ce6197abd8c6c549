"""Argument checks of the loss. Errors name the argument, what was found and what is expected, in one line."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from synco_fast.kernels.backends import Backend
from synco_fast.kernels.negatives import Negatives
from synco_fast.kernels.rng import WORD

__all__ = ["check_arguments", "check_backend"]


def check_arguments(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    *,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int,
    image_ids: Tensor | None,
    queue_ids: Tensor | None,
) -> None:
    """Check the arguments of the loss. Reads shapes and types only, never values on a device.

    Raises:
        TypeError: An argument has the wrong type or dtype, or tensors are on different devices.
        ValueError: A shape, a count or a number is out of range.
    """
    # Lengths come from shapes, which may be symbolic under a compiler; `len` would specialise them to numbers.
    for name, tensor in (("q", q), ("k", k), ("queue", queue)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: found {found}, expected a floating-point tensor")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected two dimensions, none of them 0")
        if tensor.device != q.device:
            raise TypeError(f"{name}: found on {tensor.device}, expected {q.device}, the device of q")
    if k.shape != q.shape:
        raise ValueError(f"k: found shape {tuple(k.shape)}, expected {tuple(q.shape)}, the shape of q")
    if k.dtype != q.dtype:
        raise TypeError(f"k: found {k.dtype}, expected {q.dtype}, the dtype of q")
    if queue.shape[1] != q.shape[1]:
        raise ValueError(f"queue: found shape {tuple(queue.shape)}, expected (K, {q.shape[1]}), as wide as q")
    if not isinstance(negatives, Negatives):
        raise TypeError(f"negatives: found {type(negatives).__name__}, expected a synco_fast.kernels.Negatives")
    rows, length = q.shape[0], queue.shape[0]
    if negatives.hard > length:
        raise ValueError(f"negatives.hard: found {negatives.hard}, expected 0 to {length}, the queue's length")
    real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not (real and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: found {temperature!r}, expected a finite number above 0")
    _check_word("seed", seed, WORD)
    if isinstance(step, Tensor):
        if step.dim() or step.dtype != torch.int64:
            shape = tuple(step.shape)
            raise ValueError(f"step: found {step.dtype} of shape {shape}, expected a 0-dimensional int64 tensor")
        if step.device != q.device:
            raise TypeError(f"step: found on {step.device}, expected {q.device}, the device of q")
    else:
        _check_word("step", step, WORD)
    # Where the number of rows is symbolic, a compiler would turn a check of the sum into a bound on it.
    _check_word("first_row", first_row, WORD if torch.compiler.is_compiling() else WORD - rows + 1)
    if (image_ids is None) != (queue_ids is None):
        missing = "image_ids" if image_ids is None else "queue_ids"
        raise ValueError(f"{missing}: found None, expected a tensor where its counterpart is given")
    for name, ids, count in (("image_ids", image_ids, rows), ("queue_ids", queue_ids, length)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name}: found {type(ids).__name__}, expected an int64 tensor")
        if ids.dtype != torch.int64 or ids.device != q.device:
            raise TypeError(f"{name}: found {ids.dtype} on {ids.device}, expected int64 on {q.device}")
        if ids.dim() != 1 or ids.shape[0] != count:
            raise ValueError(f"{name}: found shape {tuple(ids.shape)}, expected ({count},)")


def check_backend(backend: object) -> None:
    """Raise ValueError if this is not the name of a backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend: found {backend!r}, expected {', '.join(get_args(Backend))}")


def _check_word(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name}: found {value!r}, expected a whole number from 0 to {limit - 1}")
