"""What a report says about a search."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_prune.plan import SparsityPlan
from lightning_prune.report.folder import RunFolder
from lightning_prune.report.page import Page
from lightning_prune.report.shared import MISSING, add_curves, ms, number
from lightning_prune.search import result_figures as figures
from lightning_prune.search.history import History, TrialRecord
from lightning_prune.search.importances import importances
from lightning_prune.search.result import SearchResult
from lightning_prune.search.winner import winner_layers


def add_search(page: Page, run: RunFolder) -> None:
    """The verdict, the numbers, the trials and the winner."""
    result, history = run.result, run.history
    if result is None:
        page.verdict("The search has no result yet: it is running, or was interrupted. These are its trials.", None)
    else:
        page.verdict(verdict(result), None if result.is_front else result.feasible)
        page.section("Result")
        if not result.is_front:
            page.table("What was found", ["", "dense", "found", "change"], _numbers(result))
        page.table("The search", [], _about(result))
    if history is not None:
        _add_trials(page, history, result)
    if result is not None and result.is_front:
        _add_front(page, result)
    elif result is not None:
        _add_winner(page, result)
        _add_estimate(page, result)
    page.section("Recovery")
    add_curves(page, run.recovery, "Metrics while the winner was fine-tuned")


def verdict(result: SearchResult) -> str:
    """Whether the search succeeded, in words."""
    if result.is_front:
        return (
            f"A front of {len(result.front)} plans: none is both more accurate and has less {result.objective} than "
            "another. Nobody has chosen one of them: they are estimates, not recovered and not executed."
        )
    allowed = f"at most {result.max_drop:g} was allowed"
    if not math.isfinite(result.accuracy):
        return f"Not feasible: {result.metric} of the network that was found is no finite number ({allowed})."
    became = f"dropped by {result.drop:.4f} to" if result.drop > 0 else "is"
    numbers = f"{result.metric} {became} {result.accuracy:.4f} (dense {result.dense_accuracy:.4f}; {allowed})"
    if not result.plan and not result.bits:
        return (
            f"Not feasible: no plan was evaluated, the network stays dense; {result.metric} is "
            f"{result.dense_accuracy:.4f}."
            if not result.feasible
            else f"Feasible, but nothing is removed: no cheaper network was found; {numbers}."
        )
    if not result.feasible:
        return f"Not feasible: {numbers}. What follows is the plan that came nearest."
    if math.isfinite(result.speedup):
        return f"Feasible: {numbers}, and a pass is {result.speedup:.2f} times as fast, measured."
    if result.cost > 0 and math.isfinite(result.dense_cost):
        return (
            f"Feasible: {numbers}, with {result.dense_cost / result.cost:.2f} times less {result.objective}, estimated."
        )
    return f"Feasible: {numbers}."


def _numbers(result: SearchResult) -> list[list[str]]:
    """Cells of what was found beside dense; what is not known of both is left out."""
    scale, unit = figures.scaled(result.unit)

    def pair(name: str, dense: float, found: float, factor: float) -> list[str]:
        ratio = dense / found if found and dense else math.nan
        cells = [
            str(value) if isinstance(value, int) else f"{factor * value:.4g}" if math.isfinite(value) else MISSING
            for value in (dense, found)
        ]
        change = f"{ratio:.2f}x less" if ratio >= 1 else f"{1 / ratio:.2f}x more"
        return [name, *cells, change if math.isfinite(ratio) else MISSING]

    drop = (
        MISSING
        if not math.isfinite(result.drop)
        else f"{(-result.drop if result.mode == 'max' else result.drop) + 0.0:+.4f}"  # no minus before 0
    )
    searched = f"{result.objective} by the search"
    if result.objective in ("latency", "throughput"):
        searched += " (dense: its fastest kernels)"
    what = f"{result.metric}, quantised ({result.quantization})" if result.quantization else result.metric
    rows = [[what, number(result.dense_accuracy), number(result.accuracy), drop]]
    if result.quantization:
        rows.append(
            [f"{result.metric} in floating point", number(result.dense_accuracy), number(result.float_accuracy), ""]
        )
        rows.append([f"{result.metric}, all layers quantised", number(result.quantized_dense_accuracy), "", ""])
    if math.isfinite(result.search_accuracy) and result.search_accuracy != result.accuracy:
        rows.append([f"{result.metric} before recovery", "", number(result.search_accuracy), ""])
    rows += [
        pair("measured latency, ms", result.dense_measured_latency_s, result.measured_latency_s, 1e3),
        pair("estimated latency, ms", result.dense_latency_s, result.latency_s, 1e3),
        pair(f"{searched}{f', {unit}' if unit else ''}", result.dense_cost, result.cost, scale),
    ]
    if result.params:
        rows.append(pair("weights", result.params, result.nonzeros, 1))
    if result.dense_macs:
        rows.append(pair("multiply-accumulates", result.dense_macs, result.macs, 1))
    return [row for row in rows if row[1:3] != [MISSING, MISSING]]


def _about(result: SearchResult) -> list[list[str]]:
    against = [["drop against threshold", f"{number(result.drop)} of at most {result.max_drop:g}"]]
    rows = [
        *(against if not result.is_front else []),
        ["evaluations, the dense network's included", f"{result.evaluations}"],
        ["share of the planned weights removed", number(result.sparsity)],
    ]
    if math.isfinite(result.speedup):
        rows.append(["speedup, measured", f"{result.speedup:.2f}x"])
    if math.isfinite(result.dense_latency_s / result.latency_s if result.latency_s else math.nan):
        rows.append(["speedup, estimated", f"{result.dense_latency_s / result.latency_s:.2f}x"])
    for key, value in result.details.items():
        if key == "seconds" and isinstance(value, dict):
            rows += [[f"seconds of {phase}", number(seconds, 1)] for phase, seconds in value.items()]
        elif isinstance(value, str | int | float):
            rows.append([str(key).replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)])
    return rows


def _add_trials(page: Page, history: History, result: SearchResult | None) -> None:
    page.section("Trials")
    done = history.evaluated
    skipped = [t for t in history.trials if t.reason and not t.evaluated]
    page.text(
        f"{len(history.trials)} trials: {len(done)} were evaluated, of which "
        f"{sum(map(history.feasible, done))} were accurate enough and {sum(t.accuracy is None for t in done)} "
        f"diverged; {len(skipped)} were not evaluated, as their outcome was known or could not be better."
    )
    if not history.trials:
        return
    winner = result.cost if result is not None else history.best.cost if history.best is not None else None
    costs = [t.cost for t in done if t.cost is not None]
    scale, unit = figures.scaled(history.unit)
    spread = f"from {scale * min(costs):.4g} to {scale * max(costs):.4g} {unit}" if costs else "not known"
    page.figure(
        figures.scatter_figure(history, winner),
        f"{history.metric} against the estimated {history.objective} of every trial",
        f"Scatter of {len(done)} evaluations: {history.objective} {spread}, {history.metric} against a threshold of "
        f"{number(history.threshold)}; the table of all trials has the numbers",
    )
    best = history.best_so_far()
    page.figure(
        figures.progress_figure(history),
        f"The least {history.objective} that was accurate enough, evaluation by evaluation",
        f"Best so far: from {scale * best[0]:.4g} to {scale * best[-1]:.4g} {unit} in {len(best)} evaluations",
    )
    _add_importances(page, history)
    header = [
        "trial",
        "state",
        f"{history.objective}, {unit}",
        history.metric,
        "drop",
        "seconds",
        "not evaluated because",
    ]
    page.table("All trials", header, [_trial(t, scale) for t in history.trials], fold=True)


def _add_importances(page: Page, history: History) -> None:
    history = replace(history, importances=history.importances or importances(history))
    if not history.importances:
        page.text("What each coefficient decided cannot be told: too few trials, or they all came out alike.")
        return
    top = [f"{max(shares, key=shares.__getitem__)} of the {what}" for what, shares in history.importances.items()]
    page.figure(
        figures.importance_figure(history.importances),
        "How much the budget and each group's coefficient decided, by a random forest over the evaluations",
        f"Importance of the parameters: most was decided by {', '.join(top)}",
    )


def _trial(trial: TrialRecord, scale: float) -> list[str]:
    cost = MISSING if trial.cost is None else f"{scale * trial.cost:.4g}"
    accuracy = "diverged" if trial.measured and trial.accuracy is None else number(trial.accuracy)
    seconds = number(trial.seconds, 2)
    return [str(trial.number), trial.state.lower(), cost, accuracy, number(trial.drop), seconds, trial.reason or ""]


def _add_front(page: Page, result: SearchResult) -> None:
    page.section("The front")
    scale, unit = figures.scaled(result.unit)
    layers = list(dict.fromkeys(name for point in result.front for name in point["plan"]))
    plans = [SparsityPlan(point["plan"]) for point in result.front]
    header = [
        "trial",
        f"{result.objective}, {unit}",
        result.metric,
        "drop",
        *(f"sparsity of {name}" for name in layers),
    ]
    rows = [
        [
            str(point["trial"]),
            f"{scale * point['cost']:.4g}",
            number(point["accuracy"]),
            number(point["drop"]),
            *(number(plan.get(name, 0.0)) for name in layers),
        ]
        for point, plan in zip(result.front, plans, strict=True)
    ]
    page.table("Its plans, the cheapest first", header, rows)


def _add_winner(page: Page, result: SearchResult) -> None:
    page.section("The network that was found" if result.feasible else "The network that came nearest")
    layers = winner_layers(result)
    if not layers:
        page.text("The plan removes nothing.")
        return
    page.figure(
        figures.winner_figure(layers),
        "Sparsity of each layer, and the kernel that runs it",
        "Sparsity per layer: " + "; ".join(f"{layer.name} {layer.sparsity:.3f}" for layer in layers[:20]),
    )
    columns = {
        "layer": [layer.name for layer in layers],
        "sparsity": [number(layer.sparsity) for layer in layers],
        "pattern": [layer.pattern for layer in layers],
        "bits": [str(result.bits.get(layer.name, "")) for layer in layers],
        "kernel": [layer.kernel or "" for layer in layers],
        "weights": ["" if layer.params is None else f"{layer.params:,}" for layer in layers],
        "nonzeros": ["" if layer.nonzeros is None else f"{layer.nonzeros:,}" for layer in layers],
        "estimated ms": [ms(layer.estimated_s).strip(MISSING) for layer in layers],
        "measured ms": [ms(layer.measured_s).strip(MISSING) for layer in layers],
        "dense ms": [ms(layer.dense_s).strip(MISSING) for layer in layers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    page.table("Layer by layer", list(shown), list(zip(*shown.values(), strict=True)))


def _add_estimate(page: Page, result: SearchResult) -> None:
    if not (math.isfinite(result.measured_latency_s) and math.isfinite(result.dense_measured_latency_s)):
        return
    page.section("Estimate against measurement")
    off = [
        f"{name}: estimated {ms(estimate)} ms, measured {ms(measured)} ms"
        + (f", {estimate / measured - 1:+.1%}" if math.isfinite(estimate) and measured > 0 else "")
        for name, estimate, measured in (
            ("dense", result.dense_latency_s, result.dense_measured_latency_s),
            ("pruned", result.latency_s, result.measured_latency_s),
        )
    ]
    page.figure(
        figures.estimate_figure(result, winner_layers(result)),
        "Latency by the device profile beside that of the network executed",
        "; ".join(off),
    )
    page.text("; ".join(off) + ".")
    if result.disagreement:
        page.text(result.disagreement)
