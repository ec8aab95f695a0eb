"""Signals that ask a process to stop: noted, to be looked at where stopping loses nothing."""

import os
import signal
import threading
import time
from types import FrameType

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGTERM ends jobs, SIGINT is Ctrl-C, SIGUSR1 is what SLURM is told to send some time before the end."""

AGAIN_S = 1.0
"""A second Ctrl-C counts from here on: a launcher passes the first one on to processes that have it already."""


RESUME_ME = 75
"""Exit code of a training that stopped and can go on: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):  # noqa: N818 (no error)
    """Training was asked to stop and did, with everything it needs to go on in a checkpoint; says why and where."""


class StopSignals:
    """Listens for the signals that ask a process to stop; a second Ctrl-C stops it at once.

    Signals come to a process, so one of these listens at a time: :data:`STOP`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since_s: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self._interrupted_s = 0.0

    def listen(self) -> None:
        """Take over from whoever handles the signals, unless it is done; works in the main thread alone."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self.received = None
        if self.since_s is None:  # the runs of a sweep share a process and its time
            self.since_s = time.monotonic()
        self._before = {number: signal.signal(number, self._note) for number in HEARD}

    def forget(self) -> None:
        """Give the signals back."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def ignore(self) -> None:
        """Heed no more: a launcher that sees one process end signals the others, which are about to end well."""
        for number in HEARD:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT and self._interrupted_s and now_s - self._interrupted_s > AGAIN_S:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not self._interrupted_s:
            self._interrupted_s = now_s
            if os.environ.get("LOCAL_RANK", "0") == "0":  # a handler may interrupt a write, so not through sys.stderr
                os.write(2, b"stopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self.received = signal.Signals(number)


STOP = StopSignals()
"""The process's own."""
