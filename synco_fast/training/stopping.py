"""Early stops by a signal or a time limit, at the same step on every process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from synco_fast.runtime.distributed import HostGroup

__all__ = ["StopSignals"]

#: Steps between two agreements of the processes on whether to stop.
_ASK_EVERY = 10


class StopSignals:
    """Handles stop signals and the time limit; all processes stop at the same step.

    Args:
        control: Communication between the processes.
        minutes: Time limit of this call of the run; None for no limit.
    """

    def __init__(self, control: HostGroup, minutes: float | None) -> None:
        self._control = control
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked = False
        self.agreed = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT request a stop after the current step; a second one ends the process at once."""

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
        """Whether the run stops after this step; the same on all processes."""
        if self._control.env.world == 1 or step % _ASK_EVERY == 0:
            self.agree()
        return self.agreed

    def agree(self) -> bool:
        """Agree on whether to stop; called by all processes at the same step."""
        stop = self._asked or (self._deadline is not None and time.monotonic() >= self._deadline)
        self.agreed = self.agreed or bool(self._control.max(int(stop))[0])
        return self.agreed
