"""Executes networks under random plans and compares the whole pass with its estimate.

    python -m tests.benchmarks.bench_network_estimator [--plans 70] [--json FILE]

Every network is calibrated first, and anew before each group of plans: shared machines become faster and slower by
many per cent within minutes, as neighbours take and leave the cache. A plan has one pattern for the network (zeros
anywhere, blocks of 8 x 8, whole filters) and a random sparsity for each layer. The kernels that the estimator calls
best run it, none timed beforehand. Passes are timed several times in a row, in sweeps over a group of plans, and the
least is compared with the estimate. As in calibration, what ran while a neighbour slowed the processor is timed again.

Beside each group the dense network is timed as well: "drift out" compares after scaling by what that took during
calibration. "Calibrations out" takes out the median error of each group: what a calibration, or the time in which it
and its plans ran, did to all of them alike. "Noise" is by how much the least of every other sweep differs from that of
the others, for one and the same network: no estimate can come closer.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_prune import Block, DeviceProfile, Filter, LatencyEstimator, Unstructured, calibrate, layer_table
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import KERNELS
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.profile import digest
from lightning_prune.latency.session import Session
from lightning_prune.latency.variants import pruned
from lightning_prune.layers import LayerTable
from lightning_prune.preparation import Prepared
from lightning_prune.runtime import assembled
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.networks import NETWORKS

PATTERNS: dict[str, Granularity] = {"unstructured": Unstructured(), "block8": Block(8, 8), "filter": Filter()}
MOST = {"unstructured": 0.99, "block8": 0.95, "filter": 0.8}
"""Greatest sparsities: with fewer filters, chains of depthwise layers are left without any channel."""
FEWEST = 64
"""Weights of fewer blocks stay dense, as do depthwise ones unless whole filters go: a few blocks left at random would
leave nothing that depends on the input."""

ROUNDS, SWEEPS = 5, 6
PATIENCE_S = 120.0  # for each network, lost in slow spells


def random_plan(layers: int, most: float, generator: torch.Generator) -> Tensor:
    """Sparsities around a common level, so that networks of every speed are met."""
    level = most * torch.rand((), generator=generator) ** 0.5
    return (level + 0.3 * (torch.rand(layers, generator=generator) - 0.5)).clamp(0.0, most).double()


def realised(
    model: nn.Module, names: tuple[str, ...], plan: Tensor, pattern: Granularity, seed: int
) -> tuple[nn.Module, Tensor, list[Granularity]]:
    """The model with random groups removed, the sparsities that come out, and each layer's pattern."""
    generator = torch.Generator().manual_seed(seed)
    masked = copy.deepcopy(model)
    sparsities, patterns = plan.clone(), []
    for row, name in enumerate(names):
        module: Any = masked.get_submodule(name.rpartition(".")[0])
        own, share = pattern, float(plan[row])
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        try:
            groups = own.groups(module.weight.shape).numel()
        except ValueError:
            own, groups = Unstructured(), module.weight.numel()
        if not isinstance(pattern, Filter) and (depthwise or groups < FEWEST):
            share = 0.0
        removed = min(round(share * groups), groups - 1)
        sparsities[row] = removed / groups
        module.weight = pruned(module, own, (removed / groups, 1.0), generator).weight
        patterns.append(own)
    return masked, sparsities, patterns


def anew(model: nn.Module, inputs: Any, profile: DeviceProfile, table: LayerTable) -> DeviceProfile:
    """The profile with the network measured again."""
    source = digest(table)
    others = replace(
        profile,
        measurements=tuple(m for m in profile.measurements if m.source != source),
        networks={key: network for key, network in profile.networks.items() if key != source},
    )
    session = Session(profile.machine, KERNELS, profile.rounds, others, None)
    session.measure_network(Prepared.of(model, inputs, drop_constants=False), source, lambda share: None)
    return session.profile(held_out=False)


def measure(
    name: str,
    build: Callable[[], tuple[nn.Module, Any]],
    plans: int,
    profile: DeviceProfile | None,
    first: int = 0,
    path: str | None = None,
    group: int = 12,
    spread: int = 60,
) -> tuple[list[dict[str, Any]], DeviceProfile]:
    model, inputs = build()
    model.eval().requires_grad_(False)
    table = layer_table(model, inputs)
    if profile is not None and profile.network(table) is not None:
        profile = anew(model, inputs, profile, table)
    else:
        profile = calibrate(model, inputs, profile=profile, spread=spread, progress=False)
    if path is not None:
        profile.save(path)
    kernels = {kernel.name: kernel for kernel in KERNELS}
    generator = torch.Generator().manual_seed(first)
    pace = Pace(torch.device("cpu"), PATIENCE_S)
    rows: list[dict[str, Any]] = []
    for start in range(first, first + plans, group):
        if start > first:
            profile = anew(model, inputs, profile, table)
        estimator = LatencyEstimator(table, profile)
        record = profile.network(table)
        assert record is not None
        dense_s = min(record.dense_s.values())
        best_dense = min(record.dense_s, key=record.dense_s.__getitem__)
        runs: dict[str, Callable[[], object]] = {}
        for number in range(start, min(start + group, first + plans)):
            kind = list(PATTERNS)[number % len(PATTERNS)]
            plan = random_plan(len(table), MOST[kind], generator)
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
            runs[str(number)] = functools.partial(network, inputs)
            rows.append(
                {
                    "network": name,
                    "plan": number,
                    "group": (number - first) // group,
                    "pattern": kind,
                    "mean_sparsity": float(sparsity.mean()),
                    "estimated_s": estimate,
                    "layout": layout,
                }
            )
        dense = assembled(model, inputs, {}, best_dense)
        runs["dense"] = functools.partial(dense, inputs)
        sweeps = [{name: pace.repeated(run, ROUNDS) for name, run in runs.items()} for _ in range(SWEEPS)]
        drift = min(sweep["dense"].best_s for sweep in sweeps) / dense_s
        for key in runs:
            if key == "dense":
                continue
            row = rows[int(key) - first]
            best = [sweep[key].best_s for sweep in sweeps]
            row["drift"] = drift
            row["measured_s"] = min(best)
            row["noise"] = abs(min(best[::2]) / min(best[1::2]) - 1.0)
            row["quiet"] = min((sweep[key] for sweep in sweeps), key=lambda timing: timing.best_s).agrees
    return rows, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=72, help="per network")
    parser.add_argument("--first", type=int, default=0, help="number of the first plan, to split a run")
    parser.add_argument("--group", type=int, default=12, help="plans after which the network is calibrated anew")
    parser.add_argument("--spread", type=int, default=60, help="shapes beside a network's that calibration times")
    parser.add_argument("--profile", help="of this machine, to be extended")
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet20", "mobilenet"])
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profile = None
    if arguments.profile and Path(arguments.profile).exists():
        profile = DeviceProfile.load(arguments.profile)
    for name in arguments.networks:
        torch.manual_seed(0)
        with torch.inference_mode():
            found, profile = measure(
                name,
                NETWORKS[name],
                arguments.plans,
                profile,
                arguments.first,
                arguments.profile,
                arguments.group,
                arguments.spread,
            )
        rows += found
        if arguments.json:
            write_json(arguments.json, {"environment": environment(), "rows": rows})
        print(line(name, found), flush=True)
        for kind in PATTERNS:
            print(line(f"  {kind}", [row for row in found if row["pattern"] == kind]))
    print(line("all", rows))


def line(name: str, rows: list[dict[str, Any]]) -> str:
    estimated, measured = (np.array([row[key] for row in rows]) for key in ("estimated_s", "measured_s"))
    drift = np.array([row["drift"] for row in rows])
    error = estimated / measured - 1
    steady = estimated * drift / measured - 1
    calibrations = np.unique([f"{row['network']} {row['group']}" for row in rows], return_inverse=True)[1]
    within = estimated / measured
    for calibration in range(calibrations.max() + 1):
        own = calibrations == calibration
        within[own] /= np.median(within[own])
    rank = spearmanr(estimated, measured).statistic
    noisy = sum(not row["quiet"] for row in rows)
    return (
        f"{name:14s} plans {len(rows):3d}"
        f"  MAPE {_percent(error)} bias {100 * error.mean():+5.2f} % within {_within(error)}"
        f" | drift out: MAPE {_percent(steady)} bias {100 * steady.mean():+5.2f} % within {_within(steady)}"
        f" | calibrations out: MAPE {_percent(within - 1)} within {_within(within - 1)}"
        f" | noise {100 * np.mean([row['noise'] for row in rows]):.2f} %"
        f" | Spearman {rank:.4f}  {1e3 * measured.min():.3f}-{1e3 * measured.max():.3f} ms  noisy {noisy}"
    )


def _percent(error: np.ndarray) -> str:
    return f"{100 * abs(error).mean():5.2f} %"


def _within(error: np.ndarray) -> str:
    return f"{100 * (abs(error) <= 0.1).mean():5.1f} %"


if __name__ == "__main__":
    main()
