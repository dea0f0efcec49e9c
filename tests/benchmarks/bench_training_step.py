"""What masks cost: a training step and an eval forward with them against without, and against peers.

    python -m tests.benchmarks.bench_training_step [--rounds 40] [--builds 4] [--output FILE.json]

One thread, alternatives in turn, the least of the rounds. Every alternative has a copy of the network and of the
optimizer, built anew several times: where copies happen to lie in memory is worth a per cent or more. All are pruned
to 90 %. The peers multiply weights by masks inside the forward pass (torch.nn.utils.prune,
which Lightning's ModelPruning uses).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_prune import Pruner, SparsityPlan
from lightning_prune.latency.timing import Timing, interleaved
from lightning_prune.targets import prunable
from lightning_prune.zoo import MLP, CIFARResNet
from tests.benchmarks.harness import environment, write_json

SPARSITY = 0.9
BATCH = 32


def networks() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    torch.manual_seed(0)
    return {
        "ResNet-20, CIFAR-10": (lambda: CIFARResNet(20), torch.randn(BATCH, 3, 32, 32)),
        "MLP 3072-1024-1024-10": (lambda: MLP((3072, 1024, 1024, 10)), torch.randn(BATCH, 3072)),
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4)


def weighted(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in prunable(model)]


def torch_prune(model: nn.Module) -> None:
    """A user's loop over layers."""
    for module, name in weighted(model):
        prune.l1_unstructured(module, name, SPARSITY)


def model_pruning(model: nn.Module) -> None:
    """Lightning's callback, as it sets itself up and prunes once."""
    module = LightningModule()
    module.network = model
    callback = ModelPruning("l1_unstructured", parameters_to_prune=weighted(model), amount=SPARSITY)
    callback.setup(None, module, "fit")  # type: ignore[arg-type]
    callback.apply_pruning(SPARSITY)


def step(
    build: Callable[[], nn.Module], optimize: Callable[[nn.Module], Any], x: Tensor, prepare: str
) -> tuple[Callable[[], object], nn.Module]:
    """One training step under one of the alternatives."""
    torch.manual_seed(0)
    model = build().train()
    if prepare in PEERS:
        PEERS[prepare](model)
    optimizer = optimize(model)
    labels = torch.randint(10, (BATCH,))
    pruner = Pruner(model, SparsityPlan({"*": SPARSITY})) if prepare == "lightning-prune" else None
    if pruner is not None:
        pruner.attach([optimizer])
        pruner.update(1.0)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        if pruner is not None:
            pruner.observe(optimizer)
        optimizer.step()

    return run, model


PEERS = {"torch.nn.utils.prune": torch_prune, "Lightning ModelPruning": model_pruning}
ALTERNATIVES = ["dense", "lightning-prune", *PEERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--builds", type=int, default=4)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    print(f"{'network':<24}{'what':<14}{'alternative':<26}{'ms':>9}{'ratio':>8}{'wall=thread':>13}")
    for network, (build, x) in networks().items():
        for what, optimize in (("step, SGD", sgd), ("step, Adam", adam), ("eval forward", sgd)):
            timings: dict[str, Timing] = {}
            for _ in range(arguments.builds):
                prepared = {name: step(build, optimize, x, name) for name in ALTERNATIVES}
                runs = {name: run for name, (run, _) in prepared.items()}
                if what == "eval forward":
                    for run, model in prepared.values():
                        run()
                        model.eval()
                    runs = {name: torch.no_grad()(lambda m=model, x=x: m(x)) for name, (_, model) in prepared.items()}
                for name, found in interleaved(runs, arguments.rounds).items():
                    timings[name] = timings[name] + found if name in timings else found
            for name, timing in timings.items():
                ratio = timing.best_s / timings["dense"].best_s
                agrees = "yes" if timing.agrees else "no"
                print(f"{network:<24}{what:<14}{name:<26}{timing.best_s * 1e3:>9.2f}{ratio:>8.3f}{agrees:>13}")
                results.append(
                    {"network": network, "what": what, "alternative": name, "ratio": ratio, **timing.as_dict()}
                )
    if arguments.output:
        write_json(arguments.output, {"environment": environment(), "sparsity": SPARSITY, "results": results})


if __name__ == "__main__":
    main()
