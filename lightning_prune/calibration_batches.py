"""Runs a model on calibration batches and leaves it as it was."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import BaseTorchDispatchMode

from lightning_prune.tracing import observe

_HINT = "batches hold what the model takes and nothing else: of a labelled loader, [x for x, _ in loader]"


class NotFinite(ValueError):
    """Found within a forward; it goes to the caller as it is."""


class Enough(Exception):
    """The rest of the forward is not needed."""


def run(model: nn.Module, index: int, batch: Any) -> None:
    """One batch, in eval mode, leaving the model as it is."""
    try:
        observe(model, batch, BaseTorchDispatchMode())
    except Enough:
        pass
    except NotFinite:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} did not run on calibration batch {index}: {type(error).__name__}: {error}\n{_HINT}"
        ) from error


def each(batches: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
    """The batches with their numbers; the global generator, from which loaders draw seeds, stays as it was.

    To be closed (`contextlib.closing`), so that this holds after an error, too.

    Raises:
        ValueError: there are none.
    """
    index = -1
    state = torch.get_rng_state()
    try:
        for index, batch in enumerate(batches):
            yield index, batch
    finally:
        torch.set_rng_state(state)
    if index < 0:
        raise ValueError("there are no calibration batches; pass at least one")
