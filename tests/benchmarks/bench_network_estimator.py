"""Executes networks under random plans and compares the whole pass with its estimate.

    python -m tests.benchmarks.bench_network_estimator [--plans 70] [--json FILE]

Every network is calibrated first. A plan has one pattern for the network (zeros anywhere, blocks of 8 x 8, whole filters)
and a random sparsity for each layer. The kernels that the estimator calls best run it, none timed beforehand; the pass is
timed in rounds that alternate with other plans', and the least of the rounds is compared with the estimate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_prune import Block, DeviceProfile, Filter, LatencyEstimator, Unstructured, calibrate, layer_table
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import KERNELS
from lightning_prune.latency.timing import repeated
from lightning_prune.latency.variants import pruned
from lightning_prune.runtime import assembled
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.networks import NETWORKS

PATTERNS: dict[str, Granularity] = {"unstructured": Unstructured(), "block8": Block(8, 8), "filter": Filter()}
IN_TURN = 10
ROUNDS, SWEEPS = 9, 3


def random_plan(layers: int, generator: torch.Generator) -> Tensor:
    """Sparsities around a common level, so that networks of every speed are met."""
    level = torch.rand((), generator=generator) ** 0.5
    return (level + 0.3 * (torch.rand(layers, generator=generator) - 0.5)).clamp(0.0, 0.99).double()


def realised(
    model: nn.Module, names: tuple[str, ...], plan: Tensor, pattern: Granularity, seed: int
) -> tuple[nn.Module, Tensor, list[Granularity]]:
    """The model with random groups removed, the sparsities that come out, and each layer's pattern."""
    generator = torch.Generator().manual_seed(seed)
    masked = type(model).__new__(type(model))
    masked = __import__("copy").deepcopy(model)
    sparsities, patterns = plan.clone(), []
    for row, name in enumerate(names):
        module = masked.get_submodule(name.rpartition(".")[0])
        own = pattern
        try:
            groups = own.groups(module.weight.shape).numel()
        except ValueError:
            own = Unstructured()
            groups = module.weight.numel()
        removed = min(round(float(plan[row]) * groups), groups - 1)
        sparsities[row] = removed / groups
        module.weight = pruned(module, own, (removed / groups, 1.0), generator).weight
        patterns.append(own)
    return masked, sparsities, patterns


def measure(
    name: str, build: Callable[[], tuple[nn.Module, Any]], plans: int, profile: DeviceProfile | None
) -> tuple[list[dict[str, Any]], DeviceProfile]:
    model, inputs = build()
    model.eval().requires_grad_(False)
    profile = calibrate(model, inputs, profile=profile)
    table = layer_table(model, inputs)
    estimator = LatencyEstimator(table, profile)
    kernels = {kernel.name: kernel for kernel in KERNELS}
    record = profile.network(table)
    assert record is not None
    dense_s = min(record.dense_s.values())
    best_dense = min(record.dense_s, key=record.dense_s.__getitem__)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for start in range(0, plans, IN_TURN):
        runs: dict[str, Callable[[], object]] = {}
        for number in range(start, min(start + IN_TURN, plans)):
            kind = list(PATTERNS)[number % len(PATTERNS)]
            plan = random_plan(len(table), generator)
            masked, sparsity, patterns = realised(model, table.names, plan, PATTERNS[kind], number)
            estimate = float(estimator.latency_s(sparsity, patterns))
            best = [estimator.kernels[i] for i in estimator.best_kernels(sparsity, patterns).tolist()]
            layout = estimator.best_layout(sparsity, patterns)
            network = assembled(
                masked,
                inputs,
                {n.rpartition(".")[0]: kernels[k] for n, k in zip(table.names, best, strict=True)},
                layout,
            )
            runs[str(number)] = lambda network=network: network(inputs)  # type: ignore[misc]
            rows.append(
                {
                    "network": name,
                    "plan": number,
                    "pattern": kind,
                    "mean_sparsity": float(sparsity.mean()),
                    "estimated_s": estimate,
                    "layout": layout,
                }
            )
        dense = assembled(model, inputs, {}, best_dense)
        runs["dense"] = lambda dense=dense: dense(inputs)  # type: ignore[misc]
        timings = {name: repeated(run, ROUNDS) for name, run in runs.items()}
        for _ in range(SWEEPS - 1):
            timings = {name: timings[name] + repeated(run, ROUNDS) for name, run in runs.items()}
        drift = timings.pop("dense").best_s / dense_s
        for number, timing in timings.items():
            rows[int(number)]["drift"] = drift
            rows[int(number)]["measured_s"] = timing.best_s
            rows[int(number)]["quiet"] = timing.agrees
    return rows, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=70, help="per network")
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet20", "mobilenet"])
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profile = None
    for name in arguments.networks:
        torch.manual_seed(0)
        with torch.inference_mode():
            found, profile = measure(name, NETWORKS[name], arguments.plans, profile)
        rows += found
        print(line(name, found))
        for kind in PATTERNS:
            print(line(f"  {kind}", [row for row in found if row["pattern"] == kind]))
    print(line("all", rows))
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "rows": rows})


def line(name: str, rows: list[dict[str, Any]]) -> str:
    estimated, measured = (np.array([row[key] for row in rows]) for key in ("estimated_s", "measured_s"))
    drift = np.array([row["drift"] for row in rows])
    error = estimated / measured - 1
    steady = estimated * drift / measured - 1
    rank = spearmanr(estimated, measured).statistic
    noisy = sum(not row["quiet"] for row in rows)
    return (
        f"{name:14s} plans {len(rows):3d}  MAPE {_percent(error)} bias {100 * error.mean():+5.2f} % within {_within(error)}"
        f" | drift out: MAPE {_percent(steady)} bias {100 * steady.mean():+5.2f} % within {_within(steady)}"
        f" | Spearman {rank:.4f}  {1e3 * measured.min():.3f}-{1e3 * measured.max():.3f} ms  noisy {noisy}"
    )


def _percent(error: np.ndarray) -> str:
    return f"{100 * abs(error).mean():5.2f} %"


def _within(error: np.ndarray) -> str:
    return f"{100 * (abs(error) <= 0.1).mean():5.1f} %"


if __name__ == "__main__":
    main()
