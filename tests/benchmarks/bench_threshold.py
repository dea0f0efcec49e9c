"""How long global magnitude pruning takes to find its masks: ``lowest`` against what torch and NumPy offer.

    python -m tests.benchmarks.bench_threshold [--rounds 9] [--output FILE.json]

The weights of ResNet-50 (54 tensors, 25.5 M float32), one thread, alternatives in turn, minimum of the rounds.
"ours: abs + masks" starts from the weights. The others get |w| for nothing, and concatenated where their name does
not say "cat"; kthvalue and partition alone find the threshold, not the masks, and keep all ties.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_prune.latency.timing import Timing, interleaved
from lightning_prune.selection import lowest
from tests.benchmarks.harness import environment, write_json

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
OURS = "ours: abs + masks"
GLOBAL_UNSTRUCTURED = "prune.global_unstructured"
KTHVALUE = "torch.kthvalue"
TOPK = "torch.topk"


def resnet50() -> nn.Module:
    """ResNet-50 whose convolution and linear weights are normal with the spread of its initialisation."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50()
    for module in prunable(model):
        nn.init.normal_(module.weight, 0.0, float(module.weight.detach().std()))
    return model.requires_grad_(False)


def prunable(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def masks_by_kthvalue(scores: list[Tensor], together: Tensor, k: int) -> list[Tensor]:
    threshold = torch.kthvalue(together, k).values
    return [score <= threshold for score in scores]


def masks_by_numpy_partition(scores: list[Tensor], k: int) -> list[Tensor]:
    """The shortest program with NumPy's selection; it needs a copy of all scores."""
    together = torch.cat([score.flatten() for score in scores]).numpy()
    together.partition(k - 1)
    return [score <= float(together[k - 1]) for score in scores]


def verify(scores: list[Tensor], together: Tensor, k: int) -> None:
    """Refuses to time a wrong answer."""
    ours = torch.cat([mask.flatten() for mask in lowest(scores, k)])
    highest_marked, lowest_left = together[ours].max(), together[~ours].min()
    if int(ours.sum()) != k or highest_marked > lowest_left:
        raise SystemExit(f"lowest is wrong: {int(ours.sum())} marked of {k}, {highest_marked} > {lowest_left}")


def measure(model: nn.Module, sparsity: float, rounds: int) -> dict[str, Timing]:
    weights = [module.weight.detach() for module in prunable(model)]
    scores = [weight.abs() for weight in weights]
    together = torch.cat([score.flatten() for score in scores])
    k = round(sparsity * together.numel())
    verify(scores, together, k)
    fresh: list[list[tuple[nn.Module, str]]] = []

    def copy_model() -> None:
        fresh[:] = [[(module, "weight") for module in prunable(copy.deepcopy(model))]]

    alternatives: dict[str, Callable[[], object]] = {
        OURS: lambda: lowest([weight.abs() for weight in weights], k),
        "ours: masks": lambda: lowest(scores, k),
        "numpy.partition": lambda: np.partition(together.numpy(), k - 1)[k - 1],
        "cat + numpy.partition + masks": lambda: masks_by_numpy_partition(scores, k),
        KTHVALUE: lambda: torch.kthvalue(together, k),
        "torch.kthvalue + masks": lambda: masks_by_kthvalue(scores, together, k),
        TOPK: lambda: torch.topk(together, k, largest=False, sorted=False),
        GLOBAL_UNSTRUCTURED: lambda: prune.global_unstructured(fresh[0], prune.L1Unstructured, amount=k),
    }
    timings: dict[str, Timing] = interleaved(
        alternatives,
        rounds,
        setup={GLOBAL_UNSTRUCTURED: copy_model},
        fewer_rounds={TOPK: min(rounds, 3), GLOBAL_UNSTRUCTURED: min(rounds, 3)},
    )
    return timings


def table(results: dict[float, dict[str, Timing]]) -> Table:
    shown = Table(title="ResNet-50 weights, one thread, minimum of the rounds (× ours: abs + masks)")
    shown.add_column("alternative")
    for sparsity in results:
        shown.add_column(f"sparsity {sparsity:g}, ms", justify="right")
    for name in next(iter(results.values())):
        cells = []
        for timings in results.values():
            best_s = timings[name].best_s
            flag = "" if timings[name].agrees else " !"
            cells.append(f"{best_s * 1e3:.1f} ({best_s / timings[OURS].best_s:.2f}×){flag}")
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each alternative; the slow ones get 3")
    parser.add_argument("--output", help="where to write the results as JSON")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = resnet50()
    results = {sparsity: measure(model, sparsity, options.rounds) for sparsity in SPARSITIES}
    console = Console(width=120)
    console.print(table(results))
    timings = [timing for per_alternative in results.values() for timing in per_alternative.values()]
    busy = sum(not timing.agrees for timing in timings)
    console.print(
        f"! wall and thread time differ by more than 5 % in {busy} of {len(timings)}: the machine was busy."
        if busy
        else "Wall and thread time agree within 5 % everywhere."
    )
    if options.output:
        payload = {
            "benchmark": "threshold",
            "environment": environment(),
            "entries": sum(module.weight.numel() for module in prunable(model)),
            "rounds": options.rounds,
            "results": [
                {
                    "sparsity": sparsity,
                    "alternative": name,
                    "ratio_to_ours": timing.best_s / per_alternative[OURS].best_s,
                    **timing.as_dict(),
                }
                for sparsity, per_alternative in results.items()
                for name, timing in per_alternative.items()
            ],
        }
        write_json(options.output, payload)


if __name__ == "__main__":
    main()
