"""How long it takes to calibrate ResNet-50, one thread.

python -m tests.benchmarks.bench_calibration
"""

from __future__ import annotations

import time

import torch

from lightning_prune import calibrate
from tests.benchmarks.networks import NETWORKS


def main() -> None:
    torch.set_num_threads(1)
    model, inputs = NETWORKS["resnet50"]()
    for spread in (0, 60):
        start = time.perf_counter()
        profile = calibrate(model, inputs, spread=spread)
        seconds = time.perf_counter() - start
        found = profile.measurements
        print(
            f"spread {spread}: {seconds:.1f} s, {len(found)} timings of {len({m.work for m in found})} shapes, "
            f"quiet {profile.quiet}"
        )
        for name, error in profile.held_out.items():
            print(f"  {name:12s} held-out MAPE {100 * error.mape:.1f} %, within 10 % {100 * error.within_10:.0f} %")


if __name__ == "__main__":
    main()
