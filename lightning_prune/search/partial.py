"""Sums of an unfinished scan, in a file from which it goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.files import write_text

_SCHEMA = "lightning-prune/sensitivity-partial/1"
_EVERY_S = 2.0

Totals = Mapping[str, tuple[float, float]]
"""Metric -> its sum over examples, and their number."""

_WHAT = {
    "network": "another network",
    "weights": "other weights",
    "names": "other layers",
    "levels": "other levels",
    "criterion": "another criterion",
    "granularity": "another granularity",
    "data": "other data",
}


@dataclass
class Partial:
    """What a scan has summed up so far; batches one after another, in each the layers one after another.

    Args:
        key: what must be the same for the scan to go on.
        batches: finished.
        begun: batches whose dense pass is in `dense`: as many as are finished, or one more.
        layers: finished in the batch that is not.
        examples: in the batches that were begun.
        data: names the batches that were begun.
        dense: metric -> sum and number of examples.
        pruned: metric -> layer -> level -> sum and number of examples.
        runs: passes so far.
        work: the same in whole passes.
    """

    key: dict[str, Any]
    batches: int = 0
    begun: int = 0
    layers: int = 0
    examples: int = 0
    data: str = ""
    dense: dict[str, list[float]] = field(default_factory=dict)
    pruned: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    runs: int = 0
    work: float = 0.0

    def add_dense(self, totals: Totals, examples: int, data: str) -> None:
        """A batch is begun."""
        for metric, (amount, number) in totals.items():
            if metric not in self.dense:
                self.dense[metric] = [0.0, 0.0]
                blank = range(len(self.key["levels"]))
                self.pruned[metric] = [[[0.0, 0.0] for _ in blank] for _ in self.key["names"]]
            self.dense[metric][0] += amount
            self.dense[metric][1] += number
        self.begun, self.examples, self.data = self.begun + 1, self.examples + examples, data

    def add_layer(self, row: Sequence[Totals]) -> None:
        """The next layer of the batch is finished, with totals for every level."""
        for column, totals in enumerate(row):
            for metric, (amount, number) in totals.items():
                cell = self.pruned[metric][self.layers][column]
                cell[0] += amount
                cell[1] += number
        self.layers += 1
        if self.layers == len(self.key["names"]):
            self.batches, self.layers = self.batches + 1, 0


class Keeper:
    """Writes partial sums to a file now and then, if there is one.

    Args:
        path: of the file, None for none. One that exists is continued.
        key: what must be the same.

    Raises:
        ValueError: the file is of another scan, or none.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path = path
        self.state = Partial(key)
        self._written_s = time.monotonic()
        if path is not None and path.exists():
            self.state = _loaded(path)
            for what, value in key.items():
                if self.state.key.get(what) != value:
                    raise other(path, what)

    def require_data(self, data: str) -> None:
        """Check that the batches so far are those of the file.

        Raises:
            ValueError: they are not.
        """
        if data != self.state.data:
            raise other(self.path, "data")

    def write(self, at_once: bool = False) -> None:
        """Write, unless the last time was a moment ago."""
        if self.path is not None and self.state.begun and (at_once or time.monotonic() - self._written_s > _EVERY_S):
            write_text(self.path, json.dumps({"schema": _SCHEMA, **asdict(self.state)}))
            self._written_s = time.monotonic()

    def remove(self) -> None:
        """Nothing is left to go on with."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def other(path: Path | None, what: str) -> ValueError:
    """The error for a file of another scan."""
    return ValueError(
        f"{str(path)!r} holds the beginning of sensitivities for {_WHAT[what]}; go on with what it was begun with, "
        "name another file, or remove this one"
    )


def weights_digest(network: nn.Module) -> str:
    """Names the parameters and buffers of a network."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(f"{name}".encode())
        if isinstance(value, Tensor):
            found.update(fingerprint(value))
    return found.hexdigest()[:16]


def fingerprint(batch: Any) -> bytes:
    """Names the tensors of a batch."""
    found = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def _loaded(path: Path) -> Partial:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] == _SCHEMA:
            return Partial(**{each.name: content[each.name] for each in fields(Partial)})
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{str(path)!r} is no beginning of sensitivities; name another file, or remove this one")
