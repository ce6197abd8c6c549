"""The training images of a run: the same on every rank, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synco_fast.data.sources.identity import digest_of
from synco_fast.data.sources.manifest import cache_folder
from synco_fast.data.sources.splits import Split
from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.errors import DataError
from synco_fast.runtime.spans import name_ranks

__all__ = ["SameImages"]

#: Kinds of lists that a message names.
_NAMED = 4


class SameImages:
    """The number of training images and their digest, compared over the ranks; called by all of them.

    Every rank opens the source for itself, with the manifest in the cache of its machine.

    Args:
        split: The training images of this rank.
        spec: The source.
        control: Communication between the ranks.

    Raises:
        DataError: The ranks have different images, or one of them does not know how many.
    """

    def __init__(self, split: Split, spec: str, control: HostGroup) -> None:
        try:
            own: tuple[int, str] | str = len(split), digest_of(split)
        except DataError as error:
            own = str(error)
        found = control.gather(own)
        for rank, said in enumerate(found):
            if isinstance(said, str):
                raise DataError(said if control.env.world == 1 else f"{said} (rank {rank})")
        self.number, self.digest = found[control.env.rank]
        if len(set(found)) > 1:
            raise DataError(
                f"data: found different training images: {_by_rank(found)}, expected the same on every rank; run "
                f"'synco-fast data check {spec}' on each machine, or remove {cache_folder() / 'lists'} there"
            )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"number": self.number, "digest": self.digest}

    def changes_since(self, state: dict[str, Any] | None, file: Path) -> str | None:
        """A line where the images differ from those of a checkpoint; None for one of an older version.

        A run may go on with other images, such as those that a check left, but it no longer equals one that never
        stopped.
        """
        if not state or state == self.state_dict():
            return None
        before, others = state["number"], "others" if state["number"] == self.number else "now"
        return (
            f"the training images changed since {file.name}: {before:,} then, {self.number:,} {others}; from here on "
            "the run differs from one that never stopped"
        )


def _by_rank(found: list[tuple[int, str]]) -> str:
    """The ranks of each list of images: ``1,281,167 on ranks 0-7, 1,281,164 on ranks 8-15``."""
    ranks: dict[tuple[int, str], list[int]] = {}
    for rank, images in enumerate(found):
        ranks.setdefault(images, []).append(rank)
    numbers: set[int] = set()
    said = []
    for (number, _), same in [*ranks.items()][:_NAMED]:
        said.append(f"{number:,}{' others' if number in numbers else ''} on {name_ranks(same)}")
        numbers.add(number)
    return ", ".join([*said, *(["..."] if len(ranks) > _NAMED else [])])
