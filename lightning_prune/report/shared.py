"""Parts that reports of fits and of searches share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_prune.report.events import Curve, Events
from lightning_prune.report.figures import curves_figure
from lightning_prune.report.folder import RunFolder
from lightning_prune.report.page import Page
from lightning_prune.search.figures import sensitivity_figure
from lightning_prune.search.result_figures import plain

MISSING = "–"
_NOT_METRICS = ("sparsity/", "summary/", "latency/", "mask/", "search/", "lr-")
_NOR = ("epoch", "compression_ratio", "theoretical_speedup", "hp_metric")
_STAGES = ("train_", "val_", "test_")


def number(value: Any, digits: int = 4) -> str:
    """A number in words: a dash where it is not known.

    >>> number(0.98765), number(None), number(float("nan"))
    ('0.9877', '–', '–')
    """
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else MISSING


def ms(seconds: Any) -> str:
    """Seconds as milliseconds.

    >>> ms(0.0012345), ms(None)
    ('1.234', '–')
    """
    known = isinstance(seconds, int | float) and math.isfinite(seconds)
    return f"{seconds * 1e3:.4g}" if known else MISSING


def metric_panels(events: Events) -> dict[str, dict[str, Curve]]:
    """The user's metrics, those of training and validation in one panel."""
    panels: dict[str, dict[str, Curve]] = {}
    for tag, curve in sorted(events.scalars.items()):
        if tag.startswith(_NOT_METRICS) or tag in _NOR or not curve:
            continue
        bare = tag.removesuffix("_epoch").removesuffix("_step").removesuffix("_at_target")
        stage = next((each for each in _STAGES if bare.startswith(each)), "")
        panels.setdefault(bare.removeprefix(stage), {})[tag] = curve
    return panels


def add_curves(page: Page, events: Events, caption: str) -> None:
    """The metric curves of a run, if it logged any, and what they came to."""
    panels = metric_panels(events)
    if not panels:
        return
    page.figure(curves_figure(panels), caption, f"{caption}: {'; '.join(map(_curve_in_words, _flat(panels)))}")
    page.table(
        f"{caption}, in numbers",
        ["metric", "first", "lowest", "highest", "last"],
        [[tag, *map(number, _ends([v for _, v in curve]))] for tag, curve in _flat(panels)],
    )


def add_kernels(page: Page, run: RunFolder) -> None:
    """The kernel report, if `profile` wrote one."""
    if run.kernels is None:
        return
    page.section("Kernels")
    report = run.kernels
    machine = report.get("machine")
    where = f" on {machine.get('device')}, {machine.get('threads')} thread(s)" if isinstance(machine, Mapping) else ""
    rows = [
        [
            str(row["layer"]),
            number(row.get("sparsity"), 3),
            str(row.get("kernel", MISSING)),
            *(ms(row.get(key)) for key in ("estimated_s", "measured_s", "dense_s")),
            _pays_from(row.get("pays_from")),
        ]
        for row in report["layers"]
    ]
    times = [ms(report.get(key)) for key in ("estimated_s", "measured_s", "dense_s")]
    rows.append(["whole pass", "", str(report.get("layout", "")), *times, ""])
    header = ["layer", "sparsity", "kernel", "estimated ms", "measured ms", "dense ms", "pays from"]
    page.table(f"Which kernel runs each layer{where}", header, rows)


def add_sensitivity(page: Page, run: RunFolder) -> None:
    """The curves of each layer pruned alone, if there are any."""
    result = run.sensitivity
    if result is None:
        return
    page.section("Sensitivity")
    shown = replace(result, names=tuple(map(plain, result.names)))
    caption = f"Metrics with one layer pruned and the others dense, over {result.examples} examples"
    page.figure(
        sensitivity_figure(shown, result.metrics),
        caption,
        f"{caption}: {len(result.names)} layers at {len(result.levels)} levels; the tables below have the numbers",
    )
    for metric in result.metrics:
        page.table(
            f"{metric}, dense {number(result.dense[metric])}",
            ["layer", *(f"{level:g}" for level in result.levels)],
            [[name, *map(number, row)] for name, row in zip(result.names, result.values[metric], strict=True)],
            fold=True,
        )


def add_configuration(page: Page, run: RunFolder) -> None:
    """The command and the files that say what was run."""
    page.section("Command and configuration")
    if run.command is not None:
        page.table("What was run", [], [["command", run.command]])
    for name, text in run.files.items():
        page.code(name, text)


def _flat(panels: Mapping[str, Mapping[str, Curve]]) -> list[tuple[str, Curve]]:
    return [(tag, curve) for curves in panels.values() for tag, curve in curves.items()]


def _curve_in_words(named: tuple[str, Curve]) -> str:
    tag, curve = named
    return f"{tag} goes from {number(curve[0][1])} to {number(curve[-1][1])}"


def _ends(values: Sequence[float]) -> tuple[float | None, ...]:
    finite = [value for value in values if math.isfinite(value)]
    return values[0], min(finite, default=None), max(finite, default=None), values[-1]


def _pays_from(value: Any) -> str:
    return str(value) if isinstance(value, str) else number(value, 2)
