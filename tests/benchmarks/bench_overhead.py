"""What a trial of a search takes beside the accuracy evaluation: 54 layers, 16 levels, 60 evaluations.

    python -m tests.benchmarks.bench_overhead [--storages memory sqlite journal] [--items N] [--seeds N] [--json FILE]

The accuracy is a formula, and the time that it takes is subtracted. A trial is counted from the end of the last one:
looking after other workers' trials, proposing, allocating, claiming the plan, writing and ending it are included. Wall
time, and processor time of the process, which does not depend on who else uses the machine; garbage collections of
Python, which come at any time, are in both and listed beside them.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_prune.search.layer_space import _groups
from lightning_prune.search.space import Candidate, SearchSpace
from lightning_prune.search.study import minimise
from tests.benchmarks.harness import environment, write_json
from tests.search.analytic import Network, space

STORAGES = {"memory": None, "sqlite": "study.db", "journal": "study.journal"}


def overheads(storage: str | None, items: int, seed: int, evaluations: int) -> dict[str, list[float]]:
    """Milliseconds of each trial but the first, and of each garbage collection."""
    each = space(items, 16, seed)
    of = SearchSpace(each.items, each.entries, each.errors, each.tables, each.cost, _groups(items))
    network, marks, collections = Network(of), list[tuple[float, float]](), [0.0]
    outside = np.zeros(2)

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def accuracy(candidate: Candidate) -> float:
        nonlocal outside
        begin = clocks()
        value = 0.95 - 2e-4 * (0.95 - network.true(candidate.choices))
        outside += np.subtract(clocks(), begin)
        return value

    def ended(study: Any, trial: Any) -> None:
        wall_s, cpu_s = np.subtract(clocks(), outside)
        marks.append((float(wall_s), float(cpu_s)))

    def collected(phase: str, info: Any) -> None:
        now_s = time.process_time()
        collections[-1] = now_s - collections[-1] if phase == "stop" else now_s
        if phase == "stop":
            collections.append(0.0)

    gc.callbacks.append(collected)
    try:
        minimise(
            of,
            accuracy,
            metric="accuracy",
            mode="max",
            max_drop=5e-4,
            dense_accuracy=0.95,
            n_trials=evaluations,
            seed=seed,
            storage=storage,
            study_name="search",
            progress=False,
            on_trial=ended,
        )
    finally:
        gc.callbacks.remove(collected)
    wall, cpu = 1e3 * np.diff(np.array(marks), axis=0).T
    return {"wall_ms": wall.tolist(), "cpu_ms": cpu.tolist(), "collections_ms": [1e3 * s for s in collections[:-1]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storages", nargs="*", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--items", type=int, default=54)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in arguments.storages:
        found: dict[str, list[float]] = {"wall_ms": [], "cpu_ms": [], "collections_ms": []}
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                file = STORAGES[name]
                storage = None if file is None else str(Path(folder) / file)
                for key, values in overheads(storage, arguments.items, seed, arguments.evaluations).items():
                    found[key] += values
        cpu, wall = np.array(found["cpu_ms"]), np.array(found["wall_ms"])
        results.append({"storage": name, "items": arguments.items, "trials": len(cpu), **found})
        print(
            f"{name:8} {arguments.items} layers, {len(cpu)} trials: CPU {np.median(cpu):5.1f} ms median, "
            f"{np.quantile(cpu, 0.95):5.1f} p95, {cpu.max():5.1f} worst; wall {np.median(wall):5.1f} median, "
            f"{np.quantile(wall, 0.95):5.1f} p95, {wall.max():5.1f} worst; "
            f"longest garbage collection {max(found['collections_ms'], default=0.0):5.1f}; "
            f"{(cpu > 50).sum()} trials above 50 ms CPU",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
