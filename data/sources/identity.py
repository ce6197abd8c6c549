"""A digest of a split, by which ranks, and a resumed run, see whether they read the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.sources.hf import HfSplit
from synco_fast.data.sources.parquet import ParquetSplit
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import ArraySplit, FileSplit, Split, SubsetSplit
from synco_fast.data.sources.stream import StreamSplit

__all__ = ["digest_of"]

#: Bytes of an array of images that are hashed, evenly spaced.
_SAMPLE = 64 << 20


def digest_of(split: Split) -> str:
    """A digest of a split's images and their order, 32 hexadecimal digits.

    It reads no image: files are known by their names below the source's folder, images in shards by name and size, rows
    of tables by number and label, and streams by the names of the shards with the images in each. A million names take
    less than half a second.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(split):
        content = part if isinstance(part, bytes) else part.tobytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _parts(split: Split) -> Iterator[bytes | NDArray[np.generic]]:
    yield str(len(split)).encode()
    if isinstance(split, SubsetSplit):
        yield split.numbers
        yield from _parts(split.whole)
    elif isinstance(split, FileSplit | ShardSplit):
        yield split.manifest.names.text
        yield split.manifest.names.ends
        if split.manifest.places is not None:
            yield split.manifest.places[:, 2]
    elif isinstance(split, StreamSplit):
        yield from _shards(split)
    elif isinstance(split, ArraySplit):
        step = max(1, split.images.nbytes // _SAMPLE)
        yield str(split.images.shape).encode()
        yield np.asarray(split.images[::step])
    elif isinstance(split, ParquetSplit | HfSplit) and split.labels is not None:
        yield split.labels


def _shards(split: StreamSplit) -> Iterator[bytes]:
    """Names below the folder that all shards share, so that a moved stream is the same."""
    first, last = min(split.shards), max(split.shards)
    same = next(
        (place for place, letters in enumerate(zip(first, last, strict=False)) if len({*letters}) > 1), len(first)
    )
    folder = len(first[:same].rpartition("/")[0])
    yield "\n".join(shard[folder:] for shard in split.shards).encode(errors="surrogateescape")
    yield str(split.counts).encode()
