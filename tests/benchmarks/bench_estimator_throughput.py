"""How many candidate networks a second the estimator answers for.

    python -m tests.benchmarks.bench_estimator_throughput [--json FILE]

ResNet-50, 54 layers, five kernels in one layout, random per-layer sparsities, minimum over kernels and sum included,
one thread, the least of nine rounds. Costs are fitted to invented measurements: the arithmetic does not depend on them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
import torchvision

from lightning_prune import DeviceProfile, LatencyEstimator, layer_table
from lightning_prune.kernels import BSR, CSR, Dense, LayerKernel, Shrunk
from lightning_prune.kernels.workload import runnable
from lightning_prune.latency.fitted import fitted_cost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.timing import repeated
from tests.benchmarks.harness import environment, write_json

KERNELS: tuple[LayerKernel, ...] = (Dense(), CSR(), BSR(4), BSR(8), Shrunk())
CANDIDATES = 1 << 18


def estimator() -> LatencyEstimator:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    table = layer_table(model.eval(), torch.empty(1, 3, 224, 224, device="meta"))
    works = [work for calls in runnable(table).values() for work in calls]
    machine = Machine.here(torch.device("cpu"), torch.float32)
    measurements = []
    for kernel in KERNELS:
        slow = {"dense": 1.0, "csr": 3.0, "bsr-4": 2.2, "bsr-8": 1.8, "shrunk": 1.02}[kernel.name]
        for work in works:
            if not kernel.refuses(work, torch.float32, torch.device("cpu")):
                for sparsity, living in kernel.points if kernel.uses_sparsity else ((0.0, 1.0),):
                    kept = max((1 - sparsity) * max(living, 0.02), 0.01) if kernel.uses_sparsity else 1.0
                    seconds = 1e-5 + slow * kept * work.macs / 5e10
                    measurements.append(Measurement(kernel.name, work, sparsity, max(living, 0.01), seconds, 0.0, "x"))
    costs = {k.name: fitted_cost(k, [m for m in measurements if m.kernel == k.name]) for k in KERNELS}
    return LatencyEstimator(table, DeviceProfile(machine, costs, tuple(measurements)))


def scalar(latency: LatencyEstimator, candidates: torch.Tensor) -> torch.Tensor:
    """The same, one number at a time: a least over kernels for each layer, and their sum."""
    totals = []
    for candidate in candidates.double():
        times = latency.kernel_latency_s(candidate)
        totals.append(sum(min(layer) for layer in times.tolist()))
    return torch.tensor(totals, dtype=torch.float64)


def peak_bytes(candidates: int) -> int:
    """Greatest memory beyond that of a process that asks for 1,024 candidates."""
    code = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "from tests.benchmarks.bench_estimator_throughput import estimator\n"
        f"e = estimator(); s = torch.rand({candidates}, len(e.table)); e.latency_s(s[:1024])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; e.latency_s(s)\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    latency = estimator()
    torch.manual_seed(0)
    rates = {}
    for dtype in (torch.float32, torch.float64):
        candidates = torch.rand(CANDIDATES, len(latency.table), dtype=dtype)
        timing = repeated(lambda candidates=candidates: latency.latency_s(candidates), 9)  # type: ignore[misc]
        rates[str(dtype)] = CANDIDATES / timing.best_s
        error = (latency.latency_s(candidates[:200]).double() / scalar(latency, candidates[:200]) - 1).abs().max()
        print(
            f"{len(latency.table)} layers x {len(latency.kernels)} kernels, {dtype}: {rates[str(dtype)] / 1e6:.2f} "
            f"million networks/s, largest relative error against the scalar reference {float(error):.1e}, "
            f"wall and thread time agree: {timing.agrees}"
        )
    memory = {count: peak_bytes(count) for count in (1 << 14, 1 << 18, 1 << 20)}
    print(
        "memory beyond the candidates and the result:", {n: f"{(b - 4 * n) / 2**20:.1f} MiB" for n, b in memory.items()}
    )
    print("whole process, peak:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "networks_per_s": rates, "memory_bytes": memory})


if __name__ == "__main__":
    main()
