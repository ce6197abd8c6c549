"""Samples of tar shards in WebDataset's layout: which members belong together, and which image of a sample is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = ["LABEL_SUFFIXES", "Sample", "choose_images", "is_best", "sample_key", "split_suffix"]

LABEL_SUFFIXES = (".cls", ".json")
"""Suffixes of members that may name a class."""


class Sample(NamedTuple):
    """A sample, by the places of its images among those given.

    Attributes:
        name: Its name, by which its label is found.
        image: The image that is read.
        others: Those that are not.
    """

    name: str
    image: int
    others: list[int]


def sample_key(name: str) -> str:
    """WebDataset's key of a member: its name up to the first dot behind the folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def split_suffix(name: str) -> tuple[str, str]:
    """A member's name without its suffix, and the suffix in lower case."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return stem, suffix.lower()


def is_best(name: str) -> bool:
    """Whether no other image of a sample comes before this one: a JPEG with nothing but a suffix behind its key."""
    stem, suffix = split_suffix(name)
    return stem == sample_key(name) and suffix in (".jpg", ".jpeg")


def choose_images(names: Sequence[str], labels: Collection[str], whole: Collection[str] = ()) -> list[Sample]:
    """One image of each sample, in the order of their first images.

    Members whose names agree up to the first dot behind the folder form a sample. The image is the member with nothing
    but a suffix behind the dot (``7.jpg``), before others (``7.mask.png``), and a JPEG before other formats. Names with
    more dots are names of their own where they have a label of their own, or where no image and no label has nothing
    but a suffix behind the first dot.

    Args:
        names: Those of the images.
        labels: Those of the members with labels, without their suffixes.
        whole: Keys that are known to be those of samples.
    """
    stems = [split_suffix(name)[0] for name in names]
    keys = [sample_key(name) for name in names]
    whole = {*whole, *(key for stem, key in zip(stems, keys, strict=True) if stem == key)} | {
        stem for stem in labels if "." not in stem.rpartition("/")[2]
    }
    found: dict[str, Sample] = {}
    ranks: dict[str, tuple[bool, bool]] = {}
    for place, (name, stem, key) in enumerate(zip(names, stems, keys, strict=True)):
        sample = key if key in whole and (stem == key or stem not in labels) else stem
        rank = stem != sample, split_suffix(name)[1] not in (".jpg", ".jpeg")
        if sample not in found:
            found[sample], ranks[sample] = Sample(sample, place, []), rank
        elif rank < ranks[sample]:
            held = found[sample]
            found[sample], ranks[sample] = Sample(sample, place, [*held.others, held.image]), rank
        else:
            found[sample].others.append(place)
    return [*found.values()]
