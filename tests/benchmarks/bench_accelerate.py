"""What `accelerate` reaches on pruned networks, against the faster of the dense memory layouts.

    python -m tests.benchmarks.bench_accelerate [--networks mlp resnet20 mobilenet] [--json FILE]

Networks are calibrated, masked at random in three patterns, accelerated, and timed in turn with the model as it is and
with the dense network of either layout, BatchNorm folded. Ratios are to the fastest of those three: the median over
turns, so that slow spells of a shared machine, which meet all networks of a turn, drop out. "Noise" is by how much
that ratio differs between every other turn and the others.

The estimate is of the profile alone, made before the network ran.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch

from lightning_prune import DeviceProfile, accelerate, calibrate, layer_table
from lightning_prune.latency.timing import repeated
from lightning_prune.runtime import assembled
from tests.benchmarks.bench_network_estimator import PATTERNS, anew, realised
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.networks import NETWORKS

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ROUNDS, SWEEPS = 3, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet20", "mobilenet"])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--profile", help="of this machine, to be extended")
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profile = None
    if arguments.profile and Path(arguments.profile).exists():
        profile = DeviceProfile.load(arguments.profile)
    for name in arguments.networks:
        torch.manual_seed(0)
        model, inputs = NETWORKS[name]()
        model.eval().requires_grad_(False)
        table = layer_table(model, inputs)
        if profile is not None and profile.network(table) is not None:
            profile = anew(model, inputs, profile, table)
        else:
            profile = calibrate(model, inputs, profile=profile, progress=False)
        if arguments.profile:
            profile.save(arguments.profile)
        names = table.names
        for pattern in arguments.patterns:
            granularity = PATTERNS[pattern]
            for sparsity in SPARSITIES:
                plan = torch.full((len(names),), sparsity, dtype=torch.float64)
                masked, _, _ = realised(model, names, plan, granularity, 0)
                fast = accelerate(masked, inputs, profile)
                alternatives = {
                    "fast": fast,
                    "as it is": masked,
                    "nchw": assembled(masked, inputs, {}, "nchw"),
                    "nhwc": assembled(masked, inputs, {}, "nhwc"),
                }
                times: dict[str, list[float]] = {key: [] for key in alternatives}
                with torch.inference_mode():
                    for _ in range(SWEEPS):
                        for key, network in alternatives.items():
                            times[key].append(repeated(functools.partial(network, inputs), ROUNDS).best_s)
                report = fast.kernel_report()
                dense = min((key for key in times if key != "fast"), key=lambda key: statistics.median(times[key]))
                ratios = [other / own for other, own in zip(times[dense], times["fast"], strict=True)]
                halves = statistics.median(ratios[::2]) / statistics.median(ratios[1::2])
                best_s = min(times["fast"])
                row = {
                    "network": name,
                    "pattern": pattern,
                    "sparsity": sparsity,
                    "speedup": statistics.median(ratios),
                    "noise": abs(halves - 1.0),
                    "measured_s": best_s,
                    "estimate_over_measured": report.estimated_s / best_s,
                    "sparse": any(not layer.kernel.startswith("dense") for layer in report.layers),
                    "relative_error": report.relative_error,
                    "kernels": sorted({layer.kernel for layer in report.layers}),
                }
                rows.append(row)
                print(
                    f"{name:10s} {pattern:12s} {sparsity:4.2f}  {1e3 * best_s:8.3f} ms  "
                    f"{row['speedup']:5.2f}x dense (noise {100 * row['noise']:.1f} %)  "
                    f"estimate/measured {row['estimate_over_measured']:.3f}  "
                    f"error {report.relative_error:.1e}  "
                    f"{', '.join(row['kernels'])}",
                    flush=True,
                )
    slowest = min(row["speedup"] for row in rows)
    below = sum(row["speedup"] < 0.98 for row in rows)
    noise = statistics.mean(row["noise"] for row in rows)
    print(f"slowest {slowest:.3f}x, below 0.98x: {below} of {len(rows)}, noise {100 * noise:.1f} %")
    off = [abs(row["estimate_over_measured"] - 1) for row in rows]
    close = sum(error <= 0.1 for error in off)
    print(f"estimates within 10 %: {close} of {len(off)}, mean error {100 * statistics.mean(off):.1f} %")
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
