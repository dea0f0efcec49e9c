"""Ctrl-C, where it does no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Keeps Ctrl-C until `check`, so that no half of a trial is written; a second one is not kept.

    Signals belong to the main thread, and to whoever has a handler of their own: elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self._kept = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def check(self) -> None:
        """Raise what was kept.

        Raises:
            KeyboardInterrupt: there was a Ctrl-C.
        """
        if self._kept:
            self._kept = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Here Ctrl-C acts at once."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self._kept:
            self._kept = False
            raise KeyboardInterrupt
        self._kept = True
