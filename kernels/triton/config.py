"""How the kernels are launched: what they serve, their tiles, formats and room, from shapes and dtypes alone."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.rng import largest_below
from synco_fast.kernels.topk import stride_and_rank

__all__ = [
    "CAPACITY",
    "FORMATS",
    "MIXES",
    "OVERLAP",
    "SAMPLES",
    "TILE",
    "TILES",
    "TILES_OF",
    "Form",
    "Formats",
    "Mix",
    "Tile",
    "capacity_of",
    "compact_ids",
    "form_of",
    "formats_of",
    "generation_of",
    "interpreted",
    "mix_of",
    "overlap_of",
    "sampling_of",
    "segments_of",
    "splits_of",
    "table",
    "tile_key",
    "unserved",
]

#: Candidates that a row may have on the fast path, at most: they are held in the registers of one program.
CAPACITY = 16384
#: Rows and keys of a tile. With 16 or 32 two products in a kernel have been miscompiled on Hopper.
TILE = 64
#: Columns of V that a program of the scan holds.
CHUNK = 128
#: How many queue keys the threshold is estimated from, at most. More give a closer threshold, fewer are sooner read.
SAMPLES = (2048, 4096)
#: Whether launches overlap where the device can (see `overlap.py`): to be turned on by a measurement.
OVERLAP = False
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
        numbers = (low, high, *affine, mixture.noise, mixture.sign, largest_below(low, high, torch.float32))
        column = FAMILIES.index(family)
        rows.append((family.number, negatives.count_of(family), *(float(number) for number in numbers), column))
    return tuple(rows)


def splits_of(rows: int, length: int, form: Form, device: torch.device) -> int:
    """Among how many programs a block of rows shares the queue: eight warps and more for each multiprocessor in all."""
    on_device = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_device else 132
    resident = 1 if form.rows * form.keys > TILE * TILE else 2
    wanted = max(1, resident * processors // -(-rows // form.rows))
    return min(wanted, 64, -(-length // form.keys))


def capacity_of(stride: int, wanted: int) -> int | None:
    """Room for a row's candidates, about wanted * stride give or take; None where that is too much."""
    spread = 6 * math.sqrt(wanted) if stride > 1 else 0
    # `rank` may take a threshold that a sixteenth more of the sample reach.
    room = max(TILE, triton.next_power_of_2(math.ceil((wanted + wanted // 16 + spread) * stride)))
    return room if room <= CAPACITY else None


def sampling_of(length: int, hard: int) -> tuple[int, int, int] | None:
    """How to estimate the threshold: stride and rank of `stride_and_rank`, and the capacity for what exceeds it.

    The smallest sample that needs no more room than the largest; None where no threshold can be estimated, or where
    the candidates would take more than `CAPACITY`.
    """
    found = []
    for size in SAMPLES:
        if (sampling := stride_and_rank(length, hard, size)) and (capacity := capacity_of(*sampling)):
            found.append((*sampling, capacity))
    return next((one for one in found if one[2] <= found[-1][2]), None)


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


@dataclass(frozen=True)
class Form:
    """How the scan multiplies.

    Attributes:
        dot, precision: Format and precision of q and the keys in the first product.
        weight, weight_precision: Those of the softmax weights and the keys in the second.
        three: Whether float32 is multiplied as three products of bfloat16 instead; see `sample.multiply`.
        rows, keys: Of a tile.
        chunk, piece: Columns of V that a program holds, and of a step of the first product.
        warps, stages: Resources.
        margin: Twice the error of a similarity of unit rows against float32; 0 where the rounding is float32's.
        every: Whether the selection multiplies all that it may choose again, not those within the margin alone.
    """

    dot: Any
    precision: str
    weight: Any
    weight_precision: str
    three: bool
    rows: int
    keys: int
    chunk: int
    piece: int
    warps: int
    stages: int
    margin: float = 0.0
    every: bool = False


@dataclass(frozen=True)
class Tile:
    """The sizes of a `Form`; see there."""

    rows: int
    keys: int
    chunk: int
    piece: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Formats:
    """The part of a `Form` that does not depend on sizes; see there."""

    dot: Any
    precision: str
    weight: Any
    weight_precision: str
    three: bool = False
    margin: float = 0.0
    every: bool = False


#: Halves are multiplied as they are, which is exact in the float32 accumulator. Their softmax weights are rounded to
#: bfloat16 where the keys are; float16 would lose small ones, and TF32 holds a float16 key exactly.
#:
#: Float32 is the sum of two bfloat16 numbers to one part in 2^18; the three products of them that matter are off by
#: 3 in 2^18 of |q| |n|, and by the rounding of the sum. TF32 cuts each factor to one part in 2^10.
FORMATS = {
    "bfloat16": Formats(tl.bfloat16, "tf32", tl.bfloat16, "tf32"),
    "float16": Formats(tl.float16, "tf32", tl.float32, "tf32"),
    "three": Formats(tl.float32, "ieee", tl.float32, "ieee", three=True, margin=2.0**-14),
    "tf32": Formats(tl.float32, "tf32", tl.float32, "tf32", margin=2.0**-8, every=True),
    "ieee": Formats(tl.float32, "ieee", tl.float32, "ieee"),
}

#: Tiles by the name of the formats and by whether one program holds all columns: the largest that spill nothing on any
#: device. To be changed by a measurement.
TILES = {
    ("bfloat16", True): Tile(128, 64, 128, 128, 8, 2),
    ("bfloat16", False): Tile(64, 64, 128, 64, 8, 1),
    ("float16", True): Tile(64, 64, 128, 128, 8, 1),
    ("float16", False): Tile(64, 64, 128, 64, 8, 1),
    ("three", True): Tile(128, 64, 128, 128, 8, 1),
    ("three", False): Tile(128, 64, 64, 32, 8, 1),
    ("tf32", True): Tile(64, 64, 128, 128, 8, 1),
    ("tf32", False): Tile(64, 64, 64, 64, 8, 1),
    ("ieee", True): Tile(64, 32, 64, 32, 8, 1),
    ("ieee", False): Tile(64, 32, 64, 32, 8, 1),
}
#: Larger ones by the compute capability's major number too.
TILES_OF = {
    (9, "bfloat16", True): Tile(128, 128, 128, 128, 8, 2),
    (9, "bfloat16", False): Tile(128, 64, 128, 64, 8, 1),
    (9, "float16", True): Tile(128, 64, 128, 128, 8, 2),
    (9, "float16", False): Tile(128, 64, 128, 64, 8, 1),
    (9, "tf32", False): Tile(64, 64, 128, 64, 8, 1),
    (10, "bfloat16", False): Tile(128, 64, 128, 64, 8, 1),
    (10, "float16", False): Tile(128, 64, 128, 64, 8, 1),
}


def generation_of(device: torch.device) -> int:
    """The major number of the compute capability; that of the compiler's target where there is no device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch) // 10


def overlap_of(generation: int) -> dict[str, bool]:
    """The options of a launch that overlaps the one before it, or does not."""
    if not (OVERLAP and generation >= 9) or interpreted():
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def formats_of(dtype: torch.dtype, generation: int) -> str:
    """The name of the formats for a dtype.

    Float32 follows `torch.backends.cuda.matmul.fp32_precision`: "tf32" takes TF32, "ieee" multiplies without tensor
    cores. Where nothing has been set, three products of bfloat16 serve, which are nearly float32; devices before 9.0
    have too few registers for them.
    """
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    wanted = torch.backends.cuda.matmul.fp32_precision
    if wanted in ("ieee", "tf32"):
        return str(wanted)
    return "three" if generation in (9, 10) else "ieee"


def tile_key(dtype: torch.dtype, dim: int, generation: int, masked: bool) -> tuple[str, bool]:
    """Where `TILES` has the tile: the name of the formats, and whether one program holds all columns of V."""
    name = "ieee" if interpreted() else formats_of(dtype, generation)
    # A mask takes the registers that the three products leave.
    return name, dim <= CHUNK and not (masked and name == "three")


def form_of(dtype: torch.dtype, dim: int, generation: int, masked: bool) -> Form:
    """The form for a dtype, a width and a `generation_of` device; all spill nothing for sm_80, sm_90 and sm_100.

    The interpreter rounds no number to fewer bits as a device does, so there float32 is multiplied as it is.
    """
    name, narrow = tile_key(dtype, dim, generation, masked)
    formats = FORMATS[name]
    tile = TILES_OF.get((generation, name, narrow), TILES[name, narrow])
    chunk = min(tile.chunk, triton.next_power_of_2(max(dim, TILE)))
    sizes = (tile.rows, tile.keys, chunk, min(tile.piece, chunk), tile.warps, tile.stages)
    multiplied = (formats.dot, formats.precision, formats.weight, formats.weight_precision, formats.three)
    return Form(*multiplied, *sizes, formats.margin, formats.every)


@dataclass(frozen=True)
class Mix:
    """How the synthetic negatives are shared out.

    Attributes:
        parts: Programs that share a row's.
        pieces: Into how many columns of tensors a vector is cut: each is spread over fewer threads, so that fewer of
            them repeat what is the same for all of a slot.
        slots: Negatives that a program makes at a time.
        warps: Of a program.
    """

    parts: int
    pieces: int
    slots: int
    warps: int


#: By bytes of a number of the queue: parts, pieces and warps; a program takes as many slots as its threads hold with 16
#: bytes of each piece in each. To be changed by a measurement.
MIXES = {2: (4, 4, 1), 4: (8, 4, 1)}


def mix_of(itemsize: int, wide: int) -> Mix:
    """How to mix vectors of ``wide`` numbers, a power of two, of ``itemsize`` bytes each."""
    if interpreted():
        return Mix(2, max(1, wide // 64), 16, 1)
    parts, pieces, warps = MIXES[itemsize]
    pieces = min(pieces, wide // 32)
    return Mix(parts, pieces, max(1, 512 * warps * pieces // (wide * itemsize)), warps)


def segments_of(capacity: int, lists: int, share: int) -> tuple[int, int]:
    """How the candidates of a row are shared out among its lists.

    Args:
        capacity: Candidates that a row may have, a power of two.
        lists: Into how many the queue is split.
        share: Keys of a list.

    Returns:
        Lists up to a power of two, and the places of a segment: twice what an even spread would fill to capacity, and
        32 at least, since few candidates spread less evenly.
    """
    many = triton.next_power_of_2(lists)
    return many, min(triton.next_power_of_2(share), max(2 * capacity // many, 32))
