"""What a report says about a fit, from its event files."""

from __future__ import annotations

import re

from lightning_prune.report.events import Events
from lightning_prune.report.figures import curves_figure
from lightning_prune.report.folder import RunFolder
from lightning_prune.report.page import Page
from lightning_prune.report.shared import add_curves, number

_TOTALS = ("global", "target")


def add_fit(page: Page, run: RunFolder, dense: bool = False) -> None:
    """Metrics and sparsities over training, and what they came to.

    Args:
        page: that is written.
        run: whose events are shown.
        dense: whether the fit is the training of the dense network that a search began with.
    """
    events = run.events
    if not dense and "summary" in events.texts:
        page.section("Before and after")
        _add_markdown(page, events.texts["summary"])
    page.section("Training of the dense network" if dense else "Metrics")
    add_curves(page, events, "Metrics over training")
    _add_sparsities(page, events)
    _add_latency(page, events)


def _add_sparsities(page: Page, events: Events) -> None:
    curves = {
        tag.removeprefix("sparsity/"): c for tag, c in events.scalars.items() if tag.startswith("sparsity/") and c
    }
    layers = {name: curve for name, curve in curves.items() if name not in _TOTALS}
    totals = {name: curves[name] for name in _TOTALS if name in curves}
    if not curves:
        return
    page.section("Sparsity")
    panels = {"of the whole network": totals, "of each layer": layers}
    ends = "; ".join(f"{name} ends at {number(curve[-1][1])}" for name, curve in (totals or layers).items())
    page.figure(
        curves_figure({title: each for title, each in panels.items() if each}),
        "Sparsity, the fraction removed, over training",
        f"Sparsity over training: {ends}",
    )
    page.table(
        "Sparsity at the end",
        ["weight", "at the start", "at the end"],
        [[name, number(curve[0][1]), number(curve[-1][1])] for name, curve in {**layers, **totals}.items()],
    )
    sizes = [("compression ratio", "compression_ratio"), ("theoretical speedup", "theoretical_speedup")]
    known = [(words, events.last(tag)) for words, tag in sizes]
    page.table("The network at the end", [], [[words, f"{value:.2f}x"] for words, value in known if value is not None])


def _add_latency(page: Page, events: Events) -> None:
    tags = {tag: c for tag, c in events.scalars.items() if tag.startswith("latency/") and c}
    times = {tag.removeprefix("latency/"): curve for tag, curve in tags.items() if tag.endswith("_ms")}
    speedups = {tag.removeprefix("latency/"): curve for tag, curve in tags.items() if not tag.endswith("_ms")}
    panels = {title: each for title, each in (("milliseconds", times), ("speedup", speedups)) if each}
    if not panels:
        return
    page.section("Estimated latency")
    ends = "; ".join(f"{name} ends at {number(curve[-1][1])}" for name, curve in {**times, **speedups}.items())
    page.figure(curves_figure(panels), "Latency by the device profile", f"Estimated latency over training: {ends}")


def _add_markdown(page: Page, text: str) -> None:
    """The summary that TensorBoard shows: tables and paragraphs."""
    for number_of, block in enumerate(text.split("\n\n")):
        lines = block.strip().splitlines()
        if len(lines) > 2 and all(line.startswith("|") for line in lines):
            header, _, *rows = [_cells(line) for line in lines]
            page.table("Metrics and sizes" if number_of == 0 else "Weights", header, rows)
        elif block.strip():
            page.text(block.strip())


def _cells(line: str) -> list[str]:
    return [re.sub(r"^\*\*(.*)\*\*$", r"\1", cell.strip()) for cell in line.strip().strip("|").split("|")]
