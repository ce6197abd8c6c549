"""Early stops by a signal or a time limit, at the same step on every process."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synco_fast.runtime.distributed import HostGroup

__all__ = ["StopSignals"]

#: Seconds between two agreements of several processes on whether to stop, and the most steps. torchrun kills 30 s after
#: SIGTERM, and the checkpoint must be written by then.
_SECONDS, _STEPS = 1.0, 10
#: Seconds in which several signals are one request: a terminal or Slurm signals a run and also the program that started
#: it, such as a study or torchrun, which passes the request on.
_TOGETHER = 2.0
_STOPPING = "stopping after this step or evaluation, with a checkpoint; a second {} ends the run at once, without one"


class StopSignals:
    """Handles stop signals and the time limit; all processes stop at the same step.

    Args:
        control: Communication between the processes.
        minutes: Time limit of this call of the run; None for no limit.
        at: Step after which this call of the run stops; None for no limit.

    Attributes:
        received: The first signal that requested a stop; None if there was none.
        agreed: Whether the run stops.
    """

    def __init__(self, control: HostGroup, minutes: float | None, at: int | None = None) -> None:
        self._control, self._at = control, at
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._hung_up = False
        #: When a stop was first requested.
        self._asked: float | None = None
        #: Whether a further signal ended the process, or should have.
        self._insisted = False
        # The first step is the first that is timed, so the processes agree after it.
        self._interval, self._steps, self._since = 1, 0, time.monotonic()
        self.received: int | None = None
        self.agreed = False

    @contextmanager
    def on_signals(self, say: Callable[[str], None] | None = None) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP request a stop after the current step.

        A further SIGTERM or SIGINT, two seconds later or more, ends the process at once. A lost terminal can cause
        several SIGHUPs. SIGHUP stays ignored where it is, as under ``nohup``. Outside the main thread nothing is
        handled: Python forbids it.

        Args:
            say: Called once with a line for the user, from a thread of its own: a step or an evaluation may take
                minutes, and a handler must not wait for locks that the interrupted code may hold.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if number == signal.SIGHUP:
                self._hung_up = True
                _leave_lost_terminal()
            elif self._asked is not None and now - self._asked >= _TOGETHER:
                self._insisted = True
                raise KeyboardInterrupt
            elif self._asked is None and say is not None:
                name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
                _thread.start_new_thread(say, (_STOPPING.format(name),))
            self._asked = now if self._asked is None else self._asked
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

    def begin(self, step: int) -> None:
        """Time the steps from here; ``step`` is the number of completed ones."""
        self._steps, self._since = 0, time.monotonic()
        self.agreed = self._at is not None and step >= self._at

    def after_step(self, step: int) -> bool:
        """Whether the run stops after ``step`` steps; the same on all processes, which agree about once a second."""
        self._steps += 1
        if self._at is not None and step >= self._at:
            self.agreed = True
        elif self._control.env.world == 1 or self._steps >= self._interval:
            self.agree()
        return self.agreed

    def agree(self) -> bool:
        """Agree on whether to stop, and when to agree next; called by all processes at the same step.

        Raises:
            KeyboardInterrupt: A further signal came where Python discards what its handler raised: while an object is
                finalized, such as the batches that are left in the middle of an epoch.
        """
        if self._insisted:
            raise KeyboardInterrupt
        if self._hung_up:
            _leave_lost_terminal()
        now = time.monotonic()
        stop = self._asked is not None or (self._deadline is not None and now >= self._deadline)
        stops, slowest = self._control.max(int(stop), round(1e6 * (now - self._since)))
        self.agreed = self.agreed or bool(stops)
        if self._steps:
            # From the slowest process's time, which all know, so that all count to the same step.
            self._interval = max(1, min(_STEPS, int(_SECONDS * 1e6 * self._steps / max(slowest, 1))))
            self._steps, self._since = 0, now
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
