"""How the kernels are launched: what they serve, their tiles, formats and room, from shapes and dtypes alone."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.negatives import FAMILIES, Negatives

__all__ = [
    "CAPACITY",
    "TILE",
    "Form",
    "capacity_of",
    "compact_ids",
    "form_of",
    "interpreted",
    "splits_of",
    "table",
    "unserved",
    "warps",
]

#: Candidates that a row may have on the fast path, at most; sorts of more compile very slowly.
CAPACITY = 4096
#: Rows and keys of a tile. With 16 or 32 two products in a kernel have been miscompiled on Hopper.
TILE = 64
#: Columns of V that a program of the scan holds.
CHUNK = 128
_SMALLEST_TEMPERATURE = 0.03
_LARGEST_DIM = 512
#: Queue indices, and their next power of two, are 32-bit integers in the kernels.
_LONGEST_QUEUE = 1 << 29

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved(q: Tensor, queue: Tensor, temperature: float) -> str | None:
    """Why the kernels do not serve these arguments; None where they do."""
    for name, tensor in (("q", q), ("queue", queue)):
        if tensor.dtype not in _TL:
            return f"{name} has dtype {tensor.dtype}; the kernels take float32, bfloat16 and float16"
    if q.shape[1] > _LARGEST_DIM:
        return f"q has {q.shape[1]} columns; the kernels take up to {_LARGEST_DIM}"
    if temperature < _SMALLEST_TEMPERATURE:
        return f"temperature is {temperature}; the kernels take {_SMALLEST_TEMPERATURE} and more"
    if len(queue) > _LONGEST_QUEUE:
        return f"queue has {len(queue)} rows; the kernels take up to {_LONGEST_QUEUE}"
    if interpreted():
        return None
    if not q.is_cuda or torch.version.hip:
        return f"q is on {q.device.type}; the kernels run on CUDA devices"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def table(negatives: Negatives) -> tuple[tuple[float, ...], ...]:
    """The families in the general form, as `mix` has them compiled in."""
    rows = []
    for family in negatives.active():
        low, high = negatives.range_of(family) if family.ranged else (0.0, 0.0)
        mixture = negatives.mixture(family)
        affine = (*mixture.q, *mixture.first, *mixture.second)
        numbers = (low, high, *affine, mixture.noise, mixture.sign)
        column = FAMILIES.index(family)
        rows.append((family.number, negatives.count_of(family), *(float(number) for number in numbers), column))
    return tuple(rows)


def splits_of(rows: int, length: int, device: torch.device) -> int:
    """Among how many programs a block of rows shares the queue: about two for each multiprocessor in all."""
    on_device = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_device else 132
    wanted = max(1, 2 * processors // -(-rows // TILE))
    return min(wanted, 64, -(-length // TILE))


def capacity_of(stride: int, wanted: int) -> int | None:
    """Room for a row's candidates, about wanted * stride give or take; None where the sort would be too large."""
    spread = 6 * math.sqrt(wanted) if stride > 1 else 0
    room = max(TILE, triton.next_power_of_2(math.ceil((wanted + spread) * stride)))
    return room if room <= CAPACITY else None


def compact_ids(image_ids: Tensor, queue_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images renamed to int32, which halves the registers that a comparison takes, without a wait for the host.

    Returns:
        The name of each row's image, (B,); of each queue key's, -1 where no row has it, (K,); and how many keys each
        row may use, (B,).
    """
    known = image_ids.sort().values
    place = torch.searchsorted(known, queue_ids).clamp_(max=len(known) - 1)
    met = known[place] == queue_ids
    images = torch.searchsorted(known, image_ids)
    # Whole numbers: the order of the additions does not matter.
    keys = torch.zeros_like(known).scatter_add_(0, place, met.to(torch.int64))
    available = len(queue_ids) - keys[images]
    return images.int(), torch.where(met, place, -1).int(), available.int()


def warps(wide: int) -> int:
    """Warps for a block of whole rows of ``wide`` numbers."""
    return 4 if wide <= 128 else 8


class Form(NamedTuple):
    """How the scan multiplies: formats of the two products, keys of a tile, columns of V and of a piece, resources."""

    dot: Any
    precision: str
    weight: Any
    weight_precision: str
    keys: int
    chunk: int
    piece: int
    warps: int
    stages: int


def form_of(dtype: torch.dtype, dim: int) -> Form:
    """The form for a dtype and a width, each compiled without spills for sm_80, sm_90 and sm_100.

    Halves are multiplied as they are, which is exact in the float32 accumulator. Float32 is multiplied without tensor
    cores, for which blocks of 32 are safe: three TF32 products instead need more registers than there are. The softmax
    weights are rounded to bfloat16 where the keys are; float16 would lose small ones, and TF32 holds a float16 key
    exactly.
    """
    chunk = min(CHUNK, triton.next_power_of_2(max(dim, TILE)))
    if dtype == torch.float32 or interpreted():
        return Form(tl.float32, "ieee", tl.float32, "ieee", 32, 64, 32, 8, 1)
    narrow = dim <= chunk
    piece = chunk if narrow else TILE
    if dtype == torch.float16:
        return Form(tl.float16, "tf32", tl.float32, "tf32", TILE, chunk, piece, 8, 1)
    return Form(tl.bfloat16, "tf32", tl.bfloat16, "tf32", TILE, chunk, piece, 4 if narrow else 8, 3 if narrow else 1)
