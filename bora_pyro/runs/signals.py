"""Ctrl-C and SIGTERM as a wish to stop: noted, and fulfilled where nothing is lost by it.

>>> import os, signal
>>> with StopSignals(quiet=True) as stop:
...     before = stop()
...     os.kill(os.getpid(), signal.SIGTERM)
...     before, stop(), stop.exit_code
(False, True, 143)
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one does at once what it always does.

    Calling it tells whether one has come. Outside the main thread, where Python handles no signals, it does nothing.

    Args:
        quiet: do not say on stderr that one has come.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal has ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        if not self.quiet:
            print(f"{self.received.name}: stopping after this step, its state saved; once more stops at once", file=sys.stderr)
