"""What `accelerate` reaches on pruned networks, against the faster of the dense memory layouts.

    python -m tests.benchmarks.bench_accelerate [--networks mlp resnet20 mobilenet] [--json FILE]

Networks are calibrated, masked at random in three patterns, accelerated, and timed in turn with the model as it is and
with the dense network of either layout, BatchNorm folded. Ratios are to the fastest of those three.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

from lightning_prune import accelerate, calibrate, layer_table
from lightning_prune.latency.timing import repeated
from lightning_prune.runtime import assembled
from tests.benchmarks.bench_network_estimator import PATTERNS, realised
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.networks import NETWORKS

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ROUNDS, SWEEPS = 9, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet20", "mobilenet"])
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profile = None
    for name in arguments.networks:
        torch.manual_seed(0)
        model, inputs = NETWORKS[name]()
        model.eval().requires_grad_(False)
        profile = calibrate(model, inputs, profile=profile)
        names = layer_table(model, inputs).names
        for pattern, granularity in PATTERNS.items():
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
                with torch.inference_mode():
                    best = dict.fromkeys(alternatives, float("inf"))
                    for _ in range(SWEEPS):
                        for key, network in alternatives.items():
                            timing = repeated(functools.partial(network, inputs), ROUNDS)
                            best[key] = min(best[key], timing.best_s)
                report = fast.kernel_report()
                dense_s = min(seconds for key, seconds in best.items() if key != "fast")
                row = {
                    "network": name,
                    "pattern": pattern,
                    "sparsity": sparsity,
                    "speedup": dense_s / best["fast"],
                    "measured_s": best["fast"],
                    "estimate_over_measured": report.estimated_s / best["fast"],
                    "relative_error": report.relative_error,
                    "kernels": sorted({layer.kernel for layer in report.layers}),
                }
                rows.append(row)
                print(
                    f"{name:10s} {pattern:12s} {sparsity:4.2f}  {1e3 * best['fast']:8.3f} ms  "
                    f"{row['speedup']:5.2f}x dense  estimate/measured {row['estimate_over_measured']:.3f}  "
                    f"error {report.relative_error:.1e}  "
                    f"{', '.join(row['kernels'])}",
                    flush=True,
                )
    slowest = min(row["speedup"] for row in rows)
    close = [abs(row["estimate_over_measured"] - 1) <= 0.1 for row in rows]
    print(f"slowest {slowest:.3f}x, estimates within 10 %: {sum(close)} of {len(close)}")
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
