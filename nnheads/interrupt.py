"""Ctrl-C that lets the current step finish."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self, final


@final
class InterruptFlag:
    """Within the block, the first Ctrl-C sets ``requested``; a second one does what it always does.

    Only the main thread can take signals: elsewhere the block does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
