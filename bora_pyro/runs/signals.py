"""Stop a fit cleanly on Ctrl-C or SIGTERM: the signal is recorded, and the fit stops after saving its state.

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
    """Context manager that records the first SIGINT or SIGTERM. A second one has its usual effect.

    Calling the object tells whether a signal has arrived. Outside the main thread it has no effect, because Python handles
    signals only there.

    Args:
        quiet: do not report the signal on stderr.
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
        """Exit code of a program that was ended by the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        if not self.quiet:
            print(f"{self.received.name}: will save and stop after this step; a second signal stops at once", file=sys.stderr)
