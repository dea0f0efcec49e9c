"""Weight histograms in TensorBoard, counted at one moment and written at a later one, if at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

_BINS = 97  # odd, so that zero lies in the middle of a bin however wide the weights are spread


@dataclass(frozen=True)
class Histogram:
    """The distribution of a weight.

    Args:
        reach: the largest magnitude; the bins divide `[-reach, reach]` evenly.
        counts: entries per bin.
        total: the sum of all values.
        squares: the sum of their squares.
        zeros: how many are exactly zero.
    """

    reach: float
    counts: tuple[float, ...]
    total: float
    squares: float
    zeros: int

    def without_zeros(self) -> Histogram:
        """The same values less the exact zeros, in the same bins.

        >>> values = histogram(torch.tensor([-1.0, 0.0, 0.0, 0.01, 1.0]))
        >>> values.counts[48], values.without_zeros().counts[48]
        (3.0, 1.0)
        """
        counts = list(self.counts)
        counts[len(counts) // 2] -= self.zeros
        return Histogram(self.reach, tuple(counts), self.total, self.squares, 0)


def histogram(weight: Tensor) -> Histogram | None:
    """Counts the finite values of a weight, on the CPU: on others not every run counts alike; None if it has none."""
    values = weight.detach().flatten().float().cpu()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    reach = float(values.abs().max())
    zeros = values.numel() - int(values.count_nonzero())
    if reach == 0.0:
        return Histogram(0.0, (float(zeros),), 0.0, 0.0, zeros)
    counts = torch.histc(values, bins=_BINS, min=-reach, max=reach)
    return Histogram(reach, tuple(counts.tolist()), float(values.sum()), float(values.square().sum()), zeros)


class Histograms:
    """Takes the shapes of weights when told, and writes what it took last when told.

    Tags: `weights/<parameter>` of all entries, `weights_kept/<parameter>` of those that are not zero.
    """

    def __init__(self, loggers: Sequence[TensorBoardLogger]) -> None:
        self._loggers = loggers
        self._taken: dict[str, Histogram] = {}
        self._step: int | None = None

    def take(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Counts the weights as they are now."""
        if self._loggers:
            found = {name: histogram(weight) for name, weight in weights.items()}
            self._taken = {name: each for name, each in found.items() if each is not None}
            self._step = step

    def write(self, names: Collection[str], step: int | None = None) -> None:
        """Writes what was taken last, unless it is written already; `step` overrules that of the taking."""
        if self._step is None:
            return
        for logger in self._loggers:
            for name in names:
                if name in self._taken:
                    each, at = self._taken[name], self._step if step is None else step
                    _add(logger, f"weights/{name}", each, at)
                    _add(logger, f"weights_kept/{name}", each.without_zeros(), at)
        self._step = None


def _add(logger: TensorBoardLogger, tag: str, values: Histogram, step: int) -> None:
    width = 2 * values.reach / len(values.counts)
    limits = [width * (place + 1) - values.reach for place in range(len(values.counts))]
    # TensorBoard takes the two ends for the outer edges of the first and the last bin.
    logger.experiment.add_histogram_raw(
        tag,
        min=-values.reach,
        max=values.reach,
        num=int(sum(values.counts)),
        sum=values.total,
        sum_squares=values.squares,
        bucket_limits=limits,
        bucket_counts=list(values.counts),
        global_step=step,
    )
