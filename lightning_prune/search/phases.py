"""What whoever watches a search is told, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Phases:
    """What whoever watches a search is told, and how long its phases took.

    Args:
        said: is called with a line about what happens next.
        seconds: name of the phase -> seconds.
    """

    said: Callable[[str], None] = lambda line: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, line: str) -> Iterator[None]:
        """Say a line, and take the time."""
        self.said(line)
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began_s
