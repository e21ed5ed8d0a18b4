"""Signals that end a run: the first one lets a step finish and be saved, the second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_LAUNCHED, _ECHO_S = "TORCHELASTIC_RUN_ID", 1.0  # what torchrun sets


class Stop:
    """Says whether the run was asked to end.

    Attributes:
        asked: name of the signal that asked, or empty.
        patient: a step is under way that can be finished and saved; otherwise a signal interrupts at once.
        since: when it asked, in seconds of ``time.monotonic``.
    """

    def __init__(self):
        self.asked, self.patient = "", False
        self.since = 0.0

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Signals wait for the end of a step inside this block."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def _hear(self, number: int, frame) -> None:
        if self.asked and _LAUNCHED in os.environ and time.monotonic() - self.since < _ECHO_S:
            return  # the launcher hands on what the terminal has sent to all
        if not self.patient or self.asked:
            raise KeyboardInterrupt
        self.since = time.monotonic()
        self.asked = signal.Signals(number).name
        # Not print or click: a signal can come in the middle of another print.
        os.write(2, f"invdiff: {self.asked}: saving after this step; once more to stop at once\n".encode())


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """A :class:`Stop` that hears Ctrl-C, SIGTERM and SIGUSR1, except where they are ignored or outside a main thread.

    Raises:
        KeyboardInterrupt: from within the block, where a signal is to end it at once.
    """
    stop, old = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs ask
                old[number] = signal.signal(number, stop._hear) or signal.SIG_DFL
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
