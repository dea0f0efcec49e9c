"""What a run gained, as values, as markdown and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_prune.metrics import Count

_MISSING = "–"


@dataclass(frozen=True)
class LayerRow:
    """One weight before and after.

    Args:
        name: plain name of the parameter.
        count: its shape and entries, before and left.
        macs: multiply-accumulates of its layer when dense, None where unknown.
        kept_macs: those of the weights that are left.
    """

    name: str
    count: Count
    macs: int | None = None
    kept_macs: float | None = None


@dataclass(frozen=True)
class MetricRow:
    """One validation metric over the run.

    Args:
        name: as logged.
        mode: `"max"` if higher is better, `"min"` if lower is.
        dense: at the last validation before pruning began, None if there was none.
        best: the best at the target sparsity (of the whole run where nothing is pruned), None if there was none.
        last: at the last validation of the run, None if there was none.
    """

    name: str
    mode: str
    dense: float | None = None
    best: float | None = None
    last: float | None = None


@dataclass(frozen=True)
class Totals:
    """The size of the network at one moment.

    Args:
        sparsity: the share removed of the weights that are pruned.
        compression_ratio: all parameters over those that are not zero.
        theoretical_speedup: multiply-accumulates over those left, None where unknown.
    """

    sparsity: float
    compression_ratio: float
    theoretical_speedup: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a run gained.

    Args:
        before: the network as the run found it.
        after: the network as the run left it.
        metrics: the validation metrics of the run.
        layers: the weights, in the model's order.
        pruned: whether anything was there to prune.
        at_target: whether the target sparsity was reached.
    """

    before: Totals
    after: Totals
    metrics: tuple[MetricRow, ...]
    layers: tuple[LayerRow, ...]
    pruned: bool = True
    at_target: bool = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What the tables leave open, and why."""
        notes = []
        if not self.metrics:
            notes.append("No validation metric was logged: give fit validation data and log a metric there.")
        if self.pruned and self.metrics and all(row.dense is None for row in self.metrics):
            notes.append(
                "Before pruning was never measured: no validation ran before the first weights were removed; "
                "a later begin leaves room for one."
            )
        if self.pruned and not self.at_target:
            notes.append("The target sparsity was not reached: the run ended inside the pruning window.")
        elif self.pruned and self.metrics and all(row.best is None for row in self.metrics):
            notes.append("At target was never measured: no validation ran after the target was reached.")
        if self.after.theoretical_speedup is None:
            notes.append("MACs are unknown: give SparsityMonitor(example_inputs=...).")
        return tuple(notes)

    def gains(self) -> list[list[str]]:
        """The cells of the upper table, its header first."""
        last = "last" if not self.pruned else "last, at target" if self.at_target else "last, target not reached"
        best = "best at target" if self.pruned else "best"
        first = "before pruning" if self.pruned else "at start"
        cells = [["", first, best, last]]
        for row in self.metrics:
            better = "higher" if row.mode == "max" else "lower"
            cells.append([f"{row.name} ({better} is better)", _number(row.dense), _number(row.best), _number(row.last)])
        before, after = self.before, self.after
        cells.append(["sparsity", _number(before.sparsity), "", _number(after.sparsity)])
        cells.append(["compression ratio", _times(before.compression_ratio), "", _times(after.compression_ratio)])
        cells.append(["theoretical speedup", _times(before.theoretical_speedup), "", _times(after.theoretical_speedup)])
        return cells

    def sizes(self) -> list[list[str]]:
        """The cells of the lower table, its header first, the totals last."""
        cells = [["weight", "shape", "params", "kept", "sparsity", "MACs", "MACs kept"]]
        cells += [_size(row) for row in self.layers]
        counts = [row.count for row in self.layers]
        macs = [(row.macs, row.kept_macs) for row in self.layers if row.macs is not None and row.kept_macs is not None]
        total = Count((), sum(count.total for count in counts), sum(count.kept for count in counts))
        dense = sum(each for each, _ in macs) if macs else None
        left = sum(each for _, each in macs) if macs else None
        return [*cells, _size(LayerRow("total", total, dense, left))]

    def scalars(self) -> dict[str, float]:
        """`summary/<metric>_{best,before,last}`, only those that were measured; the most telling first."""
        moments = {
            "best": {row.name: row.best for row in self.metrics},
            "before": {row.name: row.dense for row in self.metrics},
            "last": {row.name: row.last for row in self.metrics},
        }
        return {
            f"summary/{name}_{moment}": value
            for moment, values in moments.items()
            for name, value in values.items()
            if value is not None
        }


def to_markdown(summary: Summary) -> str:
    """Both tables and the notes as markdown, for TensorBoard's text page.

    >>> count = Count((2, 2), 4, 1)
    >>> row = MetricRow("val_acc", "max", dense=0.98, best=0.97, last=0.96)
    >>> layers = (LayerRow("fc.weight", count, 4, 1.0),)
    >>> summary = Summary(Totals(0.0, 1.0, 1.0), Totals(0.75, 4.0, 4.0), (row,), layers)
    >>> print(to_markdown(summary))
    |  | before pruning | best at target | last, at target |
    | :--- | ---: | ---: | ---: |
    | val_acc (higher is better) | 0.9800 | 0.9700 | 0.9600 |
    | sparsity | 0.0000 |  | 0.7500 |
    | compression ratio | 1.00x |  | 4.00x |
    | theoretical speedup | 1.00x |  | 4.00x |
    <BLANKLINE>
    | weight | shape | params | kept | sparsity | MACs | MACs kept |
    | :--- | ---: | ---: | ---: | ---: | ---: | ---: |
    | fc.weight | 2 x 2 | 4 | 1 | 0.7500 | 4 | 1 |
    | **total** |  | **4** | **1** | **0.7500** | **4** | **1** |
    """
    sizes = summary.sizes()
    sizes[-1] = [f"**{cell}**" if cell else "" for cell in sizes[-1]]
    blocks = [_markdown_table(summary.gains()), _markdown_table(sizes), *summary.notes]
    return "\n\n".join(blocks)


def to_rich(summary: Summary) -> RenderableType:
    """Both tables and the notes for the terminal."""
    gains = _rich_table("Before and after pruning" if summary.pruned else "The network", summary.gains())
    sizes = _rich_table("Weights", summary.sizes(), footer=True)
    return Group(gains, sizes, *(Text(note, style="yellow") for note in summary.notes))


def layer_rows(
    counts: Mapping[str, Count], macs: Mapping[str, tuple[int, float]] | None = None
) -> tuple[LayerRow, ...]:
    """One row per parameter; `macs` gives dense and left, where known (see `metrics.kept_macs`)."""
    known = macs or {}
    return tuple(
        LayerRow(name, each, *known[name]) if name in known else LayerRow(name, each) for name, each in counts.items()
    )


def short(number: float) -> str:
    """A count with a decimal prefix.

    >>> [short(n) for n in (0, 850, 1234, 25_502_912, 4_089_184_256)]
    ['0', '850', '1.23 k', '25.5 M', '4.09 G']
    """
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def _size(row: LayerRow) -> list[str]:
    count = row.count
    return [
        row.name,
        " x ".join(str(size) for size in count.shape),
        f"{count.total:,}",
        f"{count.kept:,}",
        f"{count.sparsity:.4f}",
        _MISSING if row.macs is None else f"{row.macs:,}",
        _MISSING if row.kept_macs is None else f"{row.kept_macs:,.0f}",
    ]


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _times(value: float | None) -> str:
    if value is None:
        return _MISSING
    return "infinite" if math.isinf(value) else f"{value:,.2f}x"


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    header, *rows = cells
    rule = [":---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _rich_table(title: str, cells: Sequence[Sequence[str]], footer: bool = False) -> Table:
    header, *rows = cells
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(header[0], justify="left", overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        if footer and index == len(rows) - 1:
            table.add_section()
        table.add_row(*(escape(cell) for cell in row))
    return table
