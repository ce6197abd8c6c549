"""Images in each shard of a stream: from an index beside the shards, or as an earlier check counted them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synco_fast.data.files import atomic_write
from synco_fast.data.sources.manifest import cache_folder
from synco_fast.data.sources.pack_index import INDEX, counts_in
from synco_fast.data.sources.stream_reader import PIPE, is_url, read_whole

__all__ = ["Counts", "Stamp", "counts_beside", "find_counts", "keep_counts", "stamp_of"]

#: Counts by shard, or None.
Counts = tuple[int, ...] | None
#: Size and modification time in nanoseconds of a local shard; None for others.
Stamp = tuple[int, int] | None
_FILE = "file://"
#: By which images are counted: one of each sample. The first rules counted all images of a sample, or kept no stamps.
_RULES = 2


def find_counts(shards: Sequence[str], title: str) -> tuple[Counts, str | None]:
    """Images in each shard, if anything tells, and a note where that may be out of date.

    An index beside the shards comes first, since it moves with them. Counts of a check are those of the shards as they
    were: for local files, size and modification time must be the same.
    """
    beside = counts_beside(shards)
    if beside is not None:
        return beside, None
    file = _kept_file(shards)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        counts = _checked(found["counts"], len(shards)) if found["shards"] == [*shards] else None
        date = datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()
        again = f"'synco-fast data check {title}' counts again"
        if found.get("rules") != _RULES:
            return None, f"{title}: the check of {date} is of an earlier version, by other rules; {again}"
        kept = [None if stamp is None else tuple(stamp) for stamp in found["stamps"]]
        now = [stamp_of(shard) for shard in shards]
        changed = sum(one != other for one, other in zip(kept, now, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    if counts is None:
        return None, None
    if changed:
        return None, f"{title}: {changed:,} of {len(shards):,} shards changed since the check of {date}; {again}"
    if None in now:
        return counts, f"{title}: {sum(counts):,} images, as counted on {date}; if the shards changed since, {again}"
    return counts, None


def keep_counts(shards: Sequence[str], counts: Sequence[int], stamps: Sequence[Stamp]) -> str:
    """Keep the number of images in each shard in the user's cache, for later runs; returns the file.

    Args:
        shards: Their names.
        counts: Images in each.
        stamps: Of each, from before they were counted.

    Raises:
        OSError: The cache cannot be written.
    """
    file = _kept_file(shards)
    with atomic_write(file) as temporary:
        kept = {"shards": [*shards], "counts": [*counts], "stamps": [*stamps], "rules": _RULES}
        temporary.write_text(json.dumps(kept), encoding="utf-8")
    return str(file)


def stamp_of(shard: str) -> Stamp:
    """The stamp of a shard; None if it is no local file."""
    name = shard.removeprefix(_FILE)
    if name.startswith(PIPE) or is_url(name):
        return None
    try:
        about = Path(name).expanduser().stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def _kept_file(shards: Sequence[str]) -> Path:
    key = hashlib.sha256("\n".join(shards).encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_folder() / "lists" / f"{key}.json"


def _checked(counts: Any, shards: int) -> Counts:
    good = (
        isinstance(counts, list) and len(counts) == shards and all(type(each) is int and each >= 0 for each in counts)
    )
    return tuple(counts) if good and sum(counts) else None


def counts_beside(shards: Sequence[str]) -> Counts:
    """The counts in an index beside the shards: a pack's, ``sizes.json``, or WebDataset's ``index.json``.

    An index counts only if it has every shard.
    """
    if any(shard.startswith(PIPE) for shard in shards):
        return None
    found: dict[str, int] = {}
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        for name, read in ((INDEX, counts_in), ("sizes.json", _sizes), ("index.json", _wids)):
            with suppress(Exception):  # no such file, no access, another layout: no index
                beside = read(read_whole(f"{folder}/{name}" if folder else name))
                found |= {f"{folder}/{shard}" if folder else shard: count for shard, count in beside.items()}
                if beside:
                    break
    return _checked([found.get(shard) for shard in shards], len(shards))


def _sizes(content: bytes) -> dict[str, int]:
    return dict(json.loads(content))


def _wids(content: bytes) -> dict[str, int]:
    rows = json.loads(content)["shardlist"]
    return {str(row["url"]).rpartition("/")[2]: row["nsamples"] for row in rows}
