"""How well kernels' times are estimated: at sparsities and for shapes that were not measured.

    python -m tests.benchmarks.bench_kernel_estimator [--shapes 600] [--json FILE]

Shapes are a sample of those of known networks. Every kernel is timed on each at the sparsities of calibration and at
others. Held-out shapes are dealt by shape, five folds; a random forest on the same coordinates (nn-Meter's way) and
times proportional to the kept FLOPs are fitted to the same folds. "Again" is by how much the times of some shapes
differed when they were all measured once more, from the beginning: no estimate can be closer than the machine itself.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestRegressor

from lightning_prune import DeviceProfile
from lightning_prune.kernels import KERNELS, LayerKernel
from lightning_prune.latency.fitted import columns, fitted_cost, held_out_errors, stacked
from lightning_prune.latency.fitted import summary as error_summary
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement, telling
from lightning_prune.latency.session import Session
from lightning_prune.latency.timing import keep_freed_memory
from lightning_prune.latency.variants import points
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.shapes import layer_shapes

UNSEEN = ((0.55, 1.0), (0.78, 1.0), (0.9, 1.0), (0.98, 1.0))
UNSEEN_SHRUNK = ((0.25, 1.0), (0.5, 0.5), (0.7, 0.3), (0.75, 0.75))
FOLDS, CHUNK = 5, 30
AGAIN = 5  # one in so many chunks of shapes is measured again
DENSE = 3  # times more shapes are timed dense: they have one time each where sparse kernels have five


def with_unseen(kernel: LayerKernel) -> LayerKernel:
    """The kernel, to be timed at other places as well."""
    other = copy.copy(kernel)
    if kernel.uses_sparsity:
        other.points = kernel.points + (UNSEEN_SHRUNK if kernel.name.startswith("shrunk") else UNSEEN)
    return other


def new_session() -> Session:
    machine = Machine.here(torch.device("cpu"), torch.float32)
    return Session(machine, [with_unseen(kernel) for kernel in KERNELS], 9, None, None)


def measured(shapes: int) -> tuple[list[Measurement], list[Measurement], list[Measurement], bool]:
    """Measurements at the places of calibration, at others, from the same passes, and of some shapes again."""
    every = layer_shapes(DENSE * shapes)
    works, more = every[:shapes], every[shapes:]
    works.sort(key=lambda w: (w.kind, w.macs + 20 * (w.weights + w.input_elements + w.output_elements)))
    session, again = new_session(), new_session()
    for start in range(0, len(works), CHUNK):
        session.measure_spread(works[start : start + CHUNK], lambda share: None)
        print(f"\r{min(start + CHUNK, len(works))} of {len(works)} shapes", end="", flush=True)
    print()
    session.measure_spread(more, lambda share: None, dense_only=True)
    for start in range(CHUNK * (AGAIN // 2), len(works), CHUNK * AGAIN):
        again.measure_spread(works[start : start + CHUNK], lambda share: None)
    by_name = {kernel.name: kernel for kernel in KERNELS}
    seen: list[Measurement] = []
    others: list[Measurement] = []
    for m in session.measurements:
        usual = points(by_name[m.kernel], m.work)
        (seen if (m.sparsity, m.living) in usual else others).append(m)
    return seen, others, again.measurements, session.quiet


def differences(first: list[Measurement], again: list[Measurement]) -> np.ndarray:
    """Of the times of the same measurements."""

    def by_place(measurements: list[Measurement]) -> dict[Any, float]:
        return {(m.kernel, m.work, m.sparsity, m.living): m.seconds for m in measurements}

    before = by_place(first)
    return np.array([seconds / before[key] - 1 for key, seconds in by_place(again).items() if key in before])


def errors_at_unseen(kernel: LayerKernel, seen: list[Measurement], others: list[Measurement]) -> np.ndarray:
    cost = fitted_cost(kernel, telling(kernel, seen))
    found: list[float] = []
    others = [m for m in others if m.kernel == kernel.name]
    for work in {m.work for m in others}:
        own = [m for m in others if m.work == work]
        found += (cost.seconds(work, stacked(kernel, own)).numpy() / [m.seconds for m in own] - 1.0).tolist()
    return np.array(found)


def peers(kernel: LayerKernel, seen: list[Measurement]) -> dict[str, np.ndarray]:
    """Errors of the two others on the same kind of folds."""
    by_work: dict[Any, list[Measurement]] = {}
    for m in seen:
        by_work.setdefault(m.work, []).append(m)
    rows = [m for group in by_work.values() for m in group]
    seconds = np.array([m.seconds for m in rows])
    x = np.concatenate(
        [columns(kernel.coordinates(work, left := stacked(kernel, group)), left) for work, group in by_work.items()]
    )
    flops = np.array([m.work.macs * max((1 - m.sparsity) * m.living, 1e-4) for m in rows])
    shapes = sorted(by_work, key=str)
    fold = dict(zip(shapes, np.random.default_rng(0).permutation(len(shapes)) % FOLDS, strict=True))
    folds = np.array([fold[m.work] for m in rows])
    kinds = np.array([[m.work.kind == "linear", m.work.groups, m.work.taps] for m in rows], dtype=float)
    forest_x = np.concatenate([x, kinds], axis=1)
    result: dict[str, list[float]] = {"forest": [], "flops": []}
    for held in range(FOLDS):
        rest, out = folds != held, folds == held
        forest = RandomForestRegressor(100, random_state=0, n_jobs=1).fit(forest_x[rest], np.log(seconds[rest]))
        result["forest"] += (np.exp(forest.predict(forest_x[out])) / seconds[out] - 1).tolist()
        rate = np.median(seconds[rest] / flops[rest])
        result["flops"] += (rate * flops[out] / seconds[out] - 1).tolist()
    return {name: np.array(errors) for name, errors in result.items()}


def summary(errors: np.ndarray) -> dict[str, float]:
    return {"mape": float(abs(errors).mean()), "within_10": float((abs(errors) <= 0.1).mean()), "n": len(errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=600)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--profile", help="where to write a device profile of the measurements")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    seen, others, again, quiet = measured(arguments.shapes)
    if arguments.profile:
        costs = {k.name: fitted_cost(k, own) for k in KERNELS if (own := telling(k, seen))}
        machine = Machine.here(torch.device("cpu"), torch.float32)
        held_out = {}
        for kernel in (k for k in KERNELS if k.name in costs):
            own = telling(kernel, seen)
            if kept := error_summary(held_out_errors(kernel, own, FOLDS), len({m.work for m in own})):
                held_out[kernel.name] = kept
        DeviceProfile(machine, costs, tuple(seen), held_out=held_out, rounds=9, quiet=quiet).save(arguments.profile)
    heads = ("unseen sparsities", "unseen shapes", "random forest", "FLOPs", "again")
    print(f"{'MAPE / share within 10 %':28s}" + "".join(f"{head:20s}" for head in heads))
    results: dict[str, Any] = {}
    for kernel in KERNELS:
        own = telling(kernel, seen)
        if not any(m.kernel == kernel.name for m in seen):
            continue
        other = [m for m in others if m.kernel == kernel.name]
        found = {"shapes": held_out_errors(kernel, own, FOLDS), **peers(kernel, own)}
        repeated = differences([m for m in seen + others if m.kernel == kernel.name], again)
        if len(repeated):
            found["again"] = repeated
        if other:
            found["sparsities"] = errors_at_unseen(kernel, seen, others)
        results[kernel.name] = {name: summary(errors) for name, errors in found.items()}
        cells = [
            f"{100 * r['mape']:5.1f} % {100 * r['within_10']:4.0f} %    "
            if (r := results[kernel.name].get(name))
            else " " * 17
            for name in ("sparsities", "shapes", "forest", "flops", "again")
        ]
        print(f"{kernel.name:12s} {len({m.work for m in own}):4d} shapes     ", "  ".join(cells), flush=True)
    print("machine quiet:", quiet)
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "quiet": quiet, "kernels": results})


if __name__ == "__main__":
    main()
