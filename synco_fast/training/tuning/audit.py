"""A launch audit: the operations of one training step by phase, counted as PyTorch dispatches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from synco_fast.runtime.phases import PHASES, recorded_by

__all__ = ["OTHER", "OperationCounter", "count_operations"]

#: Operations outside every phase.
OTHER = "other"
#: Operations that are no launch on a GPU although they return no view.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class OperationCounter(TorchDispatchMode):
    """Counts operations that compute or copy, by phase; views and allocations are not counted.

    On a GPU most operations are one launch; those whose name begins with ``_foreach``, and those that call cuDNN or
    cuBLAS, can be several. An operator of this package counts once, whatever it launches.

    Attributes:
        counts: Number of calls of each operation, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {}
        self._phase = OTHER

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the operations inside under this phase."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one operation and run it."""
        name = func._schema.name
        if name not in _FREE and not name.startswith("profiler::") and not _is_view(func):
            self.counts.setdefault(self._phase, Counter())[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether an operation only returns views of its inputs, without writing."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def count_operations(step: Callable[[], object]) -> dict[str, Counter[str]]:
    """The operations of one step, by phase in the order of a step.

    Args:
        step: Runs the step; one-time allocations must have been made before.
    """
    counter = OperationCounter()
    with recorded_by(counter), counter:
        step()
    return {name: counter.counts[name] for name in (*PHASES, OTHER) if name in counter.counts}
