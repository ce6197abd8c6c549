"""Early stops by a signal or a time limit, at the same step on every process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synco_fast.runtime.distributed import HostGroup

__all__ = ["StopSignals"]

#: Steps between two agreements of the processes on whether to stop.
_ASK_EVERY = 10


class StopSignals:
    """Handles stop signals and the time limit; all processes stop at the same step.

    Args:
        control: Communication between the processes.
        minutes: Time limit of this call of the run; None for no limit.

    Attributes:
        received: The first signal that requested a stop; None if there was none.
        agreed: Whether the run stops.
    """

    def __init__(self, control: HostGroup, minutes: float | None) -> None:
        self._control = control
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked = self._hung_up = False
        self.received: int | None = None
        self.agreed = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP request a stop after the current step.

        A second SIGTERM or SIGINT ends the process at once. A lost terminal can cause several SIGHUPs. SIGHUP stays
        ignored where it is, as under ``nohup``. Outside the main thread nothing is handled: Python forbids it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                self._hung_up = True
                _leave_lost_terminal()
            elif self._asked:
                raise KeyboardInterrupt
            self._asked = True
            self.received = self.received or number

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, ask) for number in numbers}
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
        if self._hung_up:
            _leave_lost_terminal()
        stop = self._asked or (self._deadline is not None and time.monotonic() >= self._deadline)
        self.agreed = self.agreed or bool(self._control.max(int(stop))[0])
        return self.agreed


def _leave_lost_terminal() -> None:
    """Redirect output to /dev/null if its terminal is lost: writing to it would raise an error and end the run."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
