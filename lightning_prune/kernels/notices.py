"""What torch says once per process, heard where nobody else does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable


def hear(notice: str, provoke: Callable[[], object]) -> None:
    """Let torch give a warning that it gives once per process, unheard.

    To be done on import of the module whose code would provoke it, which a module that comes pickled from another
    process needs as well. The filter comes and goes by itself: `warnings.catch_warnings` would also undo what other
    threads change meanwhile.

    Args:
        notice: pattern of the warning.
        provoke: makes torch give it.
    """
    warnings.filterwarnings("ignore", notice, UserWarning)
    with contextlib.suppress(UserWarning):  # should another thread have put its own filters back just now
        provoke()
    for entry in [entry for entry in warnings.filters if getattr(entry[1], "pattern", None) == notice]:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
