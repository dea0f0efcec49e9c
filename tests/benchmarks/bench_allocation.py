"""The latency-budget allocators against the exact programme: time, excess error, excess time.

    python -m tests.benchmarks.bench_allocation [--seeds N] [--json FILE]

Tables of five kinds and four sizes, N of each, with random coefficients, at five budgets between the time of the
fastest and of the slowest plan that is not dominated. Beside them stands a dynamic programme over 500 buckets of the
budget, once with times rounded up and once to the nearest, which overshoots. Times are of `time.thread_time`, on one
thread; the fast allocator's are the least of ten rounds, each over all tables of a kind and all budgets, so that a
while in which the machine is busy spoils a round and no case. Excess error is relative to the exact optimum, where that
is above 0.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lightning_prune.allocation import BudgetAllocator
from tests.benchmarks.harness import environment, write_json

Floats = npt.NDArray[np.float64]
Result = TypeVar("Result")

KINDS = ("convex", "noisy", "staircase", "random", "linear")
SIZES = ((4, 8), (12, 42), (54, 42), (200, 42))
SHARES = (0.05, 0.2, 0.5, 0.8, 0.95)
BUCKETS = 500
ROUNDS = 10


def tables(kind: str, items: int, levels: int, seed: int) -> tuple[Floats, Floats]:
    """Errors and times, `[items, levels]`."""
    rng = np.random.default_rng(seed)
    level = np.linspace(0.0, 0.99, levels)
    error = rng.lognormal(0, 1, (items, 1)) * level ** rng.uniform(1.5, 6, (items, 1))
    seconds = rng.lognormal(0, 1, (items, 1)) * (1 - level * rng.uniform(0.5, 1, (items, 1)))
    if kind == "noisy":  # neither monotone nor convex
        error, seconds = error * rng.lognormal(0, 0.3, error.shape), seconds * rng.lognormal(0, 0.3, error.shape)
    elif kind == "staircase":  # a time changes at two to seven levels only
        seconds = rng.lognormal(0, 1, (items, 1)) * np.ceil((1 - level) * rng.integers(2, 8, (items, 1)))
    elif kind == "random":
        error, seconds = rng.random(error.shape), rng.random(error.shape)
    elif kind == "linear":  # error saved per time is the same everywhere
        seconds = np.sort(rng.random(error.shape), axis=1)
        error = 2.0 - seconds
    return error, seconds


def bucketed(errors: Floats, times: Floats, budget: float, nearest: bool) -> npt.NDArray[np.int64]:
    """The plain programme over buckets of the budget; no plan at all is an array of -1."""
    steps = times / budget * BUCKETS
    # A time that is a whole number of buckets but for rounding stays one.
    cost = (np.rint(steps) if nearest else np.ceil(steps - 1e-9)).astype(np.int64)
    best, taken = np.zeros(BUCKETS + 1), []
    for error, width in zip(errors, cost, strict=True):
        padded = np.concatenate([np.full(BUCKETS + 1, np.inf), best])
        reach = np.arange(BUCKETS + 1) + BUCKETS + 1 - np.minimum(width, BUCKETS + 1)[:, None]
        options = padded[reach] + error[:, None]
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if not math.isfinite(best[BUCKETS]):
        return np.full(len(errors), -1)
    left, choices = BUCKETS, []
    for pick, width in zip(reversed(taken), cost[::-1], strict=True):
        choices.append(int(pick[left]))
        left -= int(width[choices[-1]])
    return np.array(choices[::-1])


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.thread_time()
    result = call()
    return time.thread_time() - begin, result


def least_s(calls: list[Callable[[], Any]]) -> list[float]:
    """Of each call, the time of its fastest round."""
    rounds = [[timed(call)[0] for call in calls] for _ in range(ROUNDS)]
    return [float(min(each)) for each in zip(*rounds, strict=True)]


def study(kind: str, items: int, levels: int, seeds: int) -> dict[str, Any]:
    rows = np.arange(items)
    measured: dict[str, list[float]] = {
        key: []
        for key in ("build_s", "fast_s", "exact_s", "up_s", "fast", "up", "up_time", "nearest", "nearest_time", "slack")
    }
    unproven = over = no_plan = 0
    calls: list[Callable[[], Any]] = []
    for seed in range(seeds):
        errors, times = tables(kind, items, levels, seed)
        coefficients = np.random.default_rng(1000 + seed).uniform(0.5, 2.0, items)
        build_s, allocator = timed(functools.partial(BudgetAllocator, errors, times))
        measured["build_s"].append(build_s)
        slowest = allocator.allocate(math.inf, coefficients).time
        for share in SHARES:
            budget = allocator.least_time + share * (slowest - allocator.least_time)
            calls.append(functools.partial(allocator.allocate, budget, coefficients))
            fast = calls[-1]()
            exact_s, exact = timed(functools.partial(allocator.exact, budget, coefficients))
            unproven += not exact.proven
            over += any(math.fsum(times[rows, found.choices]) > budget for found in (fast, exact))
            measured["exact_s"].append(exact_s)
            measured["slack"].append(1 - fast.time / budget)
            if exact.error > 0:
                measured["fast"].append(fast.error / exact.error - 1)
            for name, nearest in (("up", False), ("nearest", True)):
                begin = time.thread_time()
                choices = bucketed(errors * coefficients[:, None], times, budget, nearest)
                if name == "up":
                    measured["up_s"].append(time.thread_time() - begin)
                if choices[0] < 0:
                    no_plan += name == "up"
                    continue
                if exact.error > 0:
                    error = float((errors[rows, choices] * coefficients).sum())
                    measured[name].append(error / exact.error - 1)
                measured[f"{name}_time"].append(float(times[rows, choices].sum()) / budget - 1)
    measured["fast_s"] = least_s(calls)
    return {
        "kind": kind,
        "items": items,
        "levels": levels,
        "cases": len(calls),
        "over_budget": over,
        "unproven": unproven,
        "bucketed_up_without_plan": no_plan,
        **{name: quantiles(values) for name, values in measured.items()},
    }


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "p99": float(np.quantile(values, 0.99)),
        "most": max(values),
    }


def line(found: dict[str, Any]) -> str:
    def ms(key: str) -> str:
        return f"{1e3 * found[key]['median']:6.2f} {1e3 * found[key]['p95']:6.2f} {1e3 * found[key]['most']:8.2f}"

    def percent(key: str) -> str:
        return f"{100 * found[key]['median']:8.4f} {100 * found[key]['most']:8.3f}" if found[key] else f"{'-':>17}"

    return (
        f"{found['kind']:9} {found['items']:4}x{found['levels']:<3} {ms('fast_s')} |{ms('exact_s')} |"
        f" {percent('fast')} | {percent('up')} | {percent('nearest_time')} | {found['over_budget']:3}"
        f" {found['unproven']:3} {found['bucketed_up_without_plan']:4} of {found['cases']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="tables of each kind and size")
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'':18} {'fast, ms':>22} |{'exact, ms':>22} | {'fast above, %':>17} | {'buckets up, %':>17} |"
        f" {'nearest: over, %':>17} | over budget, unproven, buckets without a plan\n"
        f"{'':18} {'median':>6} {'p95':>6} {'most':>8} |{'median':>6} {'p95':>6} {'most':>8} |"
        + f" {'median':>8} {'most':>8} |"
        * 3
    )
    results = []
    for (items, levels), kind in itertools.product(SIZES, KINDS):
        results.append(study(kind, items, levels, arguments.seeds))
        print(line(results[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "seeds": arguments.seeds, "results": results})


if __name__ == "__main__":
    main()
