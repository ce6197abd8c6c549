"""Launch configuration of the loss kernels: supported inputs, tile sizes, number formats, buffer sizes.

All of it follows from shapes, dtypes and the device.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.driver import driver_version
from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.rng import largest_below
from synco_fast.kernels.sizes import next_power_of_2
from synco_fast.kernels.topk import stride_and_rank
from synco_fast.kernels.triton.overlap import LATE

__all__ = [
    "CAPACITY",
    "FORMATS",
    "MIXES",
    "OVERLAP",
    "RANK_PER_WARP",
    "REDUCE_WARPS",
    "SAMPLES",
    "SELECT_PER_WARP",
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
    "select_warps",
    "splits_of",
    "step_of",
    "table",
    "tile_key",
    "unserved",
]

#: Most candidates a row can have on the fast path, since one program holds them in registers.
CAPACITY = 16384
#: Rows and keys of a tile. With 16 or 32, Triton has miscompiled kernels with two products on Hopper.
TILE = 64
#: Columns of V held by one program of the scan.
CHUNK = 128
#: Sample sizes for the threshold, in queue keys. A large sample gives a closer threshold, a small one is read faster.
SAMPLES = (2048, 4096)
#: Programmatic dependent launch (see `overlap.py`): 0 for none, or `overlap.EARLY` or `overlap.LATE`, which is the
#: fastest on an H100.
OVERLAP = LATE.value
#: Places of the candidate lists for each warp of `select`: 64 a thread. On an H100 fewer warps are faster, up to these.
SELECT_PER_WARP = 2048
#: Keys of the sample for each warp of `rank`.
RANK_PER_WARP = 512
#: Warps of `reduce` at D from 65 to 256.
REDUCE_WARPS = 4
_SMALLEST_TEMPERATURE = 0.03
_LARGEST_DIM = 512
#: The kernels use 32-bit integers for queue indices and for their next power of two.
_LONGEST_QUEUE = 1 << 29

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted() -> bool:
    """True if the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved(q: Tensor, queue: Tensor, temperature: float) -> str | None:
    """The reason why the kernels cannot take these arguments, or None if they can."""
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


@functools.lru_cache(maxsize=64)
def table(negatives: Negatives) -> tuple[tuple[float, ...], ...]:
    """The active families in the general form, as a constant that is compiled into `mix`."""
    rows = []
    for family in negatives.active():
        low, high = negatives.range_of(family) if family.ranged else (0.0, 0.0)
        mixture = negatives.mixture(family)
        affine = (*mixture.q, *mixture.first, *mixture.second)
        numbers = (low, high, *affine, mixture.noise, mixture.sign, largest_below(low, high, torch.float32))
        column = FAMILIES.index(family)
        rows.append((family.number, negatives.count_of(family), *(float(number) for number in numbers), column))
    # Those without noise and sign first, and of these the ones of one key.
    rows.sort(key=lambda row: (row[10] != 0 or row[11] != 0, row[8] != 0 or row[9] != 0))
    return tuple(rows)


def splits_of(rows: int, length: int, form: Form, device: torch.device) -> int:
    """Number of programs that split the queue for one block of rows: at least eight warps for each multiprocessor."""
    on_device = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_device else 132
    resident = 1 if form.rows * form.keys > TILE * TILE else 2
    wanted = max(1, resident * processors // -(-rows // form.rows))
    return min(wanted, 64, -(-length // form.keys))


def step_of(parts: int, wide: int) -> int:
    """How many sums of ``wide`` numbers, of the given number of programs, are read at a time."""
    return min(next_power_of_2(parts), max(8, 8192 // wide))


def capacity_of(stride: int, wanted: int) -> int | None:
    """Buffer size for a row's candidates (about wanted * stride are expected); None if it exceeds `CAPACITY`."""
    spread = 6 * math.sqrt(wanted) if stride > 1 else 0
    # The threshold of `rank` may admit up to 1/16 more of the sample.
    room = max(TILE, next_power_of_2(math.ceil((wanted + wanted // 16 + spread) * stride)))
    return room if room <= CAPACITY else None


def sampling_of(length: int, hard: int) -> tuple[int, int, int] | None:
    """Sampling for the threshold: stride and rank from `stride_and_rank`, and the capacity for the candidates.

    Takes the smallest sample that needs no larger buffer than the largest sample does. None if no threshold can be
    estimated, or if the candidates would exceed `CAPACITY`.
    """
    found = []
    for size in SAMPLES:
        if (sampling := stride_and_rank(length, hard, size)) and (capacity := capacity_of(*sampling)):
            found.append((*sampling, capacity))
    return next((one for one in found if one[2] <= found[-1][2]), None)


def compact_ids(image_ids: Tensor, queue_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renumber image ids as int32, which halves the registers of a comparison. Does not wait for the device.

    Returns:
        The new id of each row, (B,); of each queue key, -1 where no row has its image, (K,); and the number of keys
        that each row may use, (B,). All int32.
    """
    known = image_ids.sort().values
    place = torch.searchsorted(known, queue_ids).clamp_(max=len(known) - 1)
    met = known[place] == queue_ids
    images = torch.searchsorted(known, image_ids)
    # Integers, so the order of the atomic additions does not matter.
    keys = torch.zeros_like(known).scatter_add_(0, place, met.to(torch.int64))
    available = len(queue_ids) - keys[images]
    return images.int(), torch.where(met, place, -1).int(), available.int()


@dataclass(frozen=True)
class Form:
    """Number formats and tile sizes of the scan.

    Attributes:
        dot, precision: Dtype and `tl.dot` precision of the first product, queries times keys.
        weight, weight_precision: The same for the second product, softmax weights times keys.
        three, weight_three: Dtype of the `sample.halves` by which float32 is multiplied in three products, in the first
            and in the second product; None to multiply directly.
        rows, keys: Tile size.
        chunk: Columns of V held by one program.
        piece: Columns per step of the first product.
        warps, stages: Triton's `num_warps` and `num_stages`.
        margin: Twice the largest error of a similarity of unit rows against float32; 0 where float32 rounding applies.
        every: Recompute all keys that the selection may choose in float32, not only those within the margin.
    """

    dot: Any
    precision: str
    weight: Any
    weight_precision: str
    three: Any
    weight_three: Any
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
    """The tile sizes of a `Form`, with the same attributes."""

    rows: int
    keys: int
    chunk: int
    piece: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Formats:
    """The number formats of a `Form`, with the same attributes."""

    dot: Any
    precision: str
    weight: Any
    weight_precision: str
    three: Any = None
    weight_three: Any = None
    margin: float = 0.0
    every: bool = False


#: bfloat16 and float16 keys are multiplied directly: products are exact in the float32 accumulator. With bfloat16 keys
#: the softmax weights are rounded to bfloat16. With float16 keys they use TF32, which holds a float16 key exactly and
#: keeps small weights that float16 would lose.
#:
#: A number of a unit row is the sum of two float16 numbers to 2^-25 or to one part in 2^22, so that the three products
#: that matter are off by a few units in the last place of float32. Softmax weights may be above 65,504. So the second
#: product takes sums of two bfloat16 numbers, to one part in 2^18, and V is off by at most 3 in 2^18 of the sum of its
#: terms. TF32 rounds each factor to one part in 2^10.
FORMATS = {
    "bfloat16": Formats(tl.bfloat16, "tf32", tl.bfloat16, "tf32"),
    "float16": Formats(tl.float16, "tf32", tl.float32, "tf32"),
    "three": Formats(tl.float32, "ieee", tl.float32, "ieee", tl.float16, tl.bfloat16, margin=2.0**-16),
    "tf32": Formats(tl.float32, "tf32", tl.float32, "tf32", margin=2.0**-8, every=True),
    "ieee": Formats(tl.float32, "ieee", tl.float32, "ieee"),
}

#: Tile sizes by format and by whether one program holds all columns of V: the largest that spill no registers on any
#: device.
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
#: Other tiles for some devices, by the major compute capability as well. Those of bfloat16 that hold all columns on 9.0
#: are the fastest on an H100 (bench/records/h100); the others are larger ones, not tuned.
TILES_OF = {
    (9, "bfloat16", True): Tile(128, 64, 128, 128, 8, 4),
    (9, "bfloat16", False): Tile(128, 64, 128, 64, 8, 1),
    (9, "float16", True): Tile(128, 64, 128, 128, 8, 2),
    (9, "float16", False): Tile(128, 64, 128, 64, 8, 1),
    (9, "three", True): Tile(128, 64, 128, 128, 8, 2),
    (9, "tf32", False): Tile(64, 64, 128, 64, 8, 1),
    (10, "bfloat16", False): Tile(128, 64, 128, 64, 8, 1),
    (10, "float16", False): Tile(128, 64, 128, 64, 8, 1),
}


def generation_of(device: torch.device) -> int:
    """Major compute capability of the device, or of the compile target where there is no device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch) // 10


def overlap_of(generation: int) -> dict[str, Any]:
    """Launch options for programmatic dependent launch, which CUDA graphs have since CUDA 12.3."""
    if not (OVERLAP and generation >= 9) or interpreted() or 0 < driver_version() < 12030:
        return {"OVERLAP": 0}
    return {"OVERLAP": OVERLAP, "launch_pdl": True}


def formats_of(dtype: torch.dtype, generation: int) -> str:
    """The entry of `FORMATS` for a dtype.

    Float32 follows `torch.backends.cuda.matmul.fp32_precision`: "tf32" uses TF32, "ieee" uses no tensor cores. If
    neither is set, compute capability 9 and 10 use three products of halves, which are nearly as exact as float32.
    Other devices use "ieee", since the three products need more registers than older ones have.
    """
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    wanted = torch.backends.cuda.matmul.fp32_precision
    if wanted in ("ieee", "tf32"):
        return str(wanted)
    return "three" if generation in (9, 10) else "ieee"


def tile_key(dtype: torch.dtype, dim: int, generation: int, masked: bool) -> tuple[str, bool]:
    """The key into `TILES`: the format, and whether one program holds all columns of V."""
    name = "ieee" if interpreted() else formats_of(dtype, generation)
    # Three products and a mask together would spill registers.
    return name, dim <= CHUNK and not (masked and name == "three")


def form_of(dtype: torch.dtype, dim: int, generation: int, masked: bool) -> Form:
    """The form for a dtype, an embedding dimension and a `generation_of` device.

    The scan spills with no form on sm_80, sm_90 or sm_100. The interpreter cannot round to TF32, so it multiplies
    float32 as "ieee".
    """
    name, narrow = tile_key(dtype, dim, generation, masked)
    formats = FORMATS[name]
    tile = TILES_OF.get((generation, name, narrow), TILES[name, narrow])
    chunk = min(tile.chunk, next_power_of_2(max(dim, TILE)))
    sizes = (tile.rows, tile.keys, chunk, min(tile.piece, chunk), tile.warps, tile.stages)
    multiplied = (formats.dot, formats.precision, formats.weight, formats.weight_precision)
    return Form(*multiplied, formats.three, formats.weight_three, *sizes, formats.margin, formats.every)


@dataclass(frozen=True)
class Mix:
    """How synthetic negatives are divided among programs and threads.

    Attributes:
        parts: Programs for each row.
        pieces: Tensors that a vector is split into. Each is spread over fewer threads, so fewer threads repeat the work
            that is the same for a whole vector.
        slots: Synthetic negatives that a program makes at a time, where it forms their vectors.
        warps: Warps of a program.
        stages: Triton's `num_stages` of the loops over slots, whose reads run ahead; 1 for none.
    """

    parts: int
    pieces: int
    slots: int
    warps: int
    stages: int


#: Parts, pieces, warps and stages by the dtype of the queue, tuned on an H100. A program takes as many slots as its
#: threads hold with 16 bytes of each piece.
MIXES = {
    torch.bfloat16: (4, 4, 1, 3),
    torch.float16: (4, 4, 1, 3),
    torch.float32: (8, 4, 1, 1),
}


def mix_of(dtype: torch.dtype, wide: int) -> Mix:
    """The `Mix` for vectors of ``wide`` numbers, a power of two, of a dtype."""
    parts, pieces, warps, stages = MIXES[dtype]
    if interpreted():
        return Mix(2, max(1, wide // 64), 16, 1, 1)
    pieces = min(pieces, wide // 32)
    if wide * dtype.itemsize > 512:
        # Without reads ahead, 8 bytes would be on the stack on compute capability 8.0.
        stages = max(stages, 2)
    return Mix(parts, pieces, max(2, 512 * warps * pieces // (wide * dtype.itemsize)), warps, stages)


def segments_of(capacity: int, lists: int, share: int) -> tuple[int, int]:
    """Sizes of the candidate lists of a row.

    Args:
        capacity: Most candidates of a row, a power of two.
        lists: Number of lists that the queue is split into.
        share: Queue keys of a list.

    Returns:
        The number of lists rounded up to a power of two, and the size of a list's segment. A segment has twice the room
        of an even spread, and at least 32 places, since few candidates spread less evenly.
    """
    many = next_power_of_2(lists)
    return many, min(next_power_of_2(share), max(2 * capacity // many, 32))


def select_warps(places: int, form: Form, wide: int) -> int:
    """Warps of `select` for a row's places of candidates, and vectors of ``wide`` numbers, a power of two."""
    # Wide keys that are recomputed would put 8 bytes on the stack on compute capability 10.0.
    places_of_a_warp = SELECT_PER_WARP // 2 if form.margin and wide > 256 else SELECT_PER_WARP
    return max(1, min(places // places_of_a_warp, 32))
