"""Corrupt images of a run: counted, named once, and an error above a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.errors import DataError

__all__ = ["CorruptImages"]


class CorruptImages:
    """The corrupt training images of a run, and the images excluded from its evaluations.

    Args:
        images: How many training images there are.
        limit: Fraction of them above which the run stops; a single corrupt one never stops it.
        note: Called with a line for each corrupt image, once.
        key: What the configuration calls the limit.
    """

    def __init__(
        self, images: int, limit: float, note: Callable[[str], None], *, key: str = "data.max_corrupt"
    ) -> None:
        self._images, self._limit, self._note, self._key = images, limit, note, key
        self._found: dict[int, str] = {}
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self._found)

    def replaced(self, corrupt: dict[int, str]) -> None:
        """Add a batch's corrupt images, by number, with the reason.

        Raises:
            DataError: More are corrupt than the limit allows.
        """
        for index, reason in corrupt.items():
            if index not in self._found:
                self._found[index] = reason
                self._name(f"corrupt image {len(self._found)}, replaced by another", reason)
        if len(self._found) > max(1, self._limit * self._images):
            raise DataError(
                f"data: found {len(self._found)} corrupt images, {len(self._found) / self._images:.1%} of "
                f"{self._images}, expected at most {self._limit:.1%} ({self._key}); the last: "
                f"{next(reversed(self._found.values()))}"
            )

    def excluded(self, reasons: Iterable[str]) -> None:
        """Name images that an evaluation could not read."""
        for reason in reasons:
            self._name("corrupt image, excluded from the evaluation", reason)

    def _name(self, what: str, reason: str) -> None:
        if reason not in self._named:
            self._named.add(reason)
            self._note(f"{what}: {reason}")

    def share(self, control: HostGroup) -> None:
        """Exchange corrupt images between processes; called by all at the same step.

        Raises:
            DataError: More are corrupt than the limit allows.
        """
        if not control.max(len(self._found))[0]:
            return
        for found in control.gather(self._found):
            self.replaced(found)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"found": self._found, "named": sorted(self._named)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load from a checkpoint."""
        self._found, self._named = dict(state["found"]), set(state["named"])
