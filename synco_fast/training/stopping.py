"""When a run ends early: a signal, a budget of time; the same step on every process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from synco_fast.runtime.distributed import HostGroup

__all__ = ["StopSignals"]

#: Steps between two times at which the processes of a job ask one another whether to stop.
_ASK_EVERY = 10


class StopSignals:
    """Collects the wish to stop and lets all processes act on it at the same step.

    Args:
        control: What the processes agree by.
        minutes: Budget of this start of the run; None for no limit.
    """

    def __init__(self, control: HostGroup, minutes: float | None) -> None:
        self._control = control
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked = False
        self.agreed = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask to stop after the current step; a second one ends the process at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self, step: int) -> bool:
        """Whether the run ends after this step, the same on every process."""
        if self._control.env.world == 1 or step % _ASK_EVERY == 0:
            self.agree()
        return self.agreed

    def agree(self) -> bool:
        """Ask every process; called by all of them at the same step."""
        wish = self._asked or (self._deadline is not None and time.monotonic() >= self._deadline)
        self.agreed = self.agreed or bool(self._control.max(int(wish))[0])
        return self.agreed
