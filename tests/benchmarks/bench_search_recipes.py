"""The search against plans that need none, on real data: each with the same repair, recovery and kernels.

    python -m tests.benchmarks.bench_search_recipes mnist cifar

Data are read from the folder LIGHTNING_PRUNE_DATA. For uniform, ERK, global-magnitude, LAMP and sensitivity-threshold
plans the sparsest one is sought, by bisection, whose validation accuracy after repair drops by no more than the
threshold; the search gets the same threshold. All winners are fine-tuned alike, confirmed, and executed in turn.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import LatencyEstimator, Magnitude, OneShot, Pruning, calibrate, layer_table
from lightning_prune.allocation import erk, global_shares, lamp, sensitivity_threshold, uniform
from lightning_prune.batch_norm import reestimate_batch_norm
from lightning_prune.input_statistics import layer_statistics
from lightning_prune.latency.timing import keep_freed_memory, repeated
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.reconstruction import repair
from lightning_prune.runtime import AcceleratedModel, accelerate
from lightning_prune.search.one_shot import one_shot_masks
from lightning_prune.search.search import search_sparsity
from lightning_prune.search.sensitivity import sensitivity
from lightning_prune.targets import parameters
from lightning_prune.zoo import CIFAR10, MNIST, CIFARResNet, Classifier, HanCNN
from tests.benchmarks.harness import environment, write_json

_BISECTIONS = 9
_SWEEPS, _ROUNDS = 9, 5


@dataclass
class Task:
    """A trained network and its data."""

    name: str
    model: LightningModule
    data: Any
    example: Tensor
    calibration: list[Tensor]
    validation: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    recovery_epochs: int

    def accuracy(self, network: nn.Module, batches: list[tuple[Tensor, Tensor]] | None = None) -> float:
        right = total = 0
        with torch.inference_mode():
            for x, y in self.validation if batches is None else batches:
                right += int((network(x).argmax(1) == y).sum())
                total += len(y)
        return right / total

    def recover(self, network: nn.Module, plan: SparsityPlan) -> nn.Module:
        """Fine-tuned with its zeros kept: the best epoch on validation data."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(network.state_dict())
        best = ModelCheckpoint(tempfile.mkdtemp(), monitor="val_acc_at_target", mode="max")
        trainer = quiet_trainer(self.recovery_epochs, [Pruning(plan, OneShot(), scope="local", end=0.01), best])
        trainer.fit(model, datamodule=self.data)
        model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        return inference_copy(model)


def quiet_trainer(epochs: int, callbacks: list[Any]) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def mnist(seed: int) -> Task:
    torch.manual_seed(seed)
    data: Any = MNIST(batch_size=128)
    model = Classifier(HanCNN(), input_shape=[1, 28, 28])
    best = ModelCheckpoint(tempfile.mkdtemp(), monitor="val_acc", mode="max")
    quiet_trainer(3, [best]).fit(model, datamodule=data)
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return task("mnist", model, data, 16, recovery_epochs=1)


def cifar(seed: int) -> Task:
    torch.manual_seed(seed)
    data: Any = CIFAR10(variant="lossless_subset")
    model = Classifier(
        CIFARResNet(20),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        input_shape=[3, 32, 32],
        initialize_from="cifar_resnets/resnet20-12fca82f.th",
    )
    return task("cifar", model, data, 16, recovery_epochs=3)


def task(name: str, model: LightningModule, data: Any, batch: int, recovery_epochs: int) -> Task:
    model.trainer = None
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    calibration, seen = [], 0
    for x, _ in data.train_dataloader():
        calibration.append(x)
        seen += len(x)
        if seen >= 1024:
            break
    validation = [(x, y) for x, y in data.val_dataloader()]
    test = [(x, y) for x, y in data.test_dataloader()]
    return Task(
        name, model, data, validation[0][0][:batch].contiguous(), calibration, validation, test, recovery_epochs
    )


def repaired(task: Task, plan: SparsityPlan, statistics: Any, dense: nn.Module) -> nn.Module:
    """One-shot by magnitude, least squares, new BatchNorm statistics: what the search gives its candidates."""
    network = inference_copy(dense)
    own, whole = parameters(network), parameters(dense)
    with torch.no_grad():
        for name, share in plan.items():
            if share == 0:
                continue
            masks = one_shot_masks(inference_copy(dense), name, [PlanEntry(share)], Magnitude())
            bias_name = f"{name.rpartition('.')[0]}.bias"
            [done] = repair(whole[name], masks, statistics[name], bias=whole.get(bias_name))
            own[name].copy_(done.weight)
            if done.bias is not None:
                own[bias_name].copy_(done.bias)
    reestimate_batch_norm(network, task.calibration)
    return network


def bisected(
    make: Callable[[float], SparsityPlan], evaluate: Callable[[SparsityPlan], float], least: float
) -> SparsityPlan:
    """The plan of the largest share whose accuracy is at least `least`, as far as bisection sees."""
    low, high, found = 0.0, 0.995, make(0.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        plan = make(middle)
        if evaluate(plan) >= least:
            low, found = middle, plan
        else:
            high = middle
    return found


def compare(task: Task, max_drop: float, seed: int) -> dict[str, Any]:
    dense = inference_copy(task.model)
    table = layer_table(dense, task.example)
    weights = {name: weight.detach() for name, weight in parameters(dense).items() if name in table.names}
    statistics = layer_statistics(dense, task.calibration, list(weights))
    dense_accuracy = task.accuracy(dense)
    print(f"{task.name}: dense {dense_accuracy:.4f} on validation, {task.accuracy(dense, task.test):.4f} on test")
    profile = calibrate(dense, task.example, spread=0)
    estimator = LatencyEstimator(table, profile)
    curves = sensitivity(dense, task.validation)
    drops = curves.drops("accuracy").numpy()

    families: dict[str, Callable[[float], SparsityPlan]] = {
        "uniform": lambda s: uniform(table, s),
        "erk": lambda s: erk(table, s),
        "global magnitude": lambda s: global_shares({n: w.abs() for n, w in weights.items()}, s),
        "lamp": lambda s: lamp(weights, s),
        # its argument is a drop: what each layer alone may cost
        "sensitivity threshold": lambda s: sensitivity_threshold(curves.names, curves.levels, drops, s * 0.05),
    }
    networks: dict[str, nn.Module] = {}
    plans: dict[str, SparsityPlan] = {}
    evaluations: dict[str, int] = {}
    for name, make in families.items():
        plan = bisected(
            make,
            lambda p: task.accuracy(repaired(task, p, statistics, dense)),
            dense_accuracy - max_drop,
        )
        plans[name], evaluations[name] = plan, _BISECTIONS
        networks[name] = task.recover(repaired(task, plan, statistics, dense), plan)
    began = time.monotonic()
    found = search_sparsity(
        dense,
        task.example,
        task.calibration,
        task.accuracy,
        max_drop=max_drop,
        profile=profile,
        recover=task.recover,
        seed=seed,
    )
    seconds = time.monotonic() - began
    plans["search"], evaluations["search"] = found.plan, found.evaluations
    networks["search"] = found.model if found.model is not None else dense

    accelerated: dict[str, AcceleratedModel] = {
        name: accelerate(network, task.example, profile) for name, network in networks.items()
    }
    accelerated["dense"] = accelerate(dense, task.example, profile)
    best: dict[str, float] = dict.fromkeys(accelerated, math.inf)
    with torch.inference_mode():
        for _ in range(_SWEEPS):  # in turn, so that a slow spell of the machine meets all of them
            for name, fast in accelerated.items():
                timing = repeated(lambda fast=fast: fast(task.example), _ROUNDS)  # type: ignore[misc]
                best[name] = min(best[name], timing.best_s)
    rows = {}
    for name in accelerated:
        network = networks.get(name, dense)
        plan = plans.get(name, SparsityPlan({}))
        shares = torch.tensor([plan.get(spec.name, 0.0) for spec in table], dtype=torch.float64)
        accuracy = task.accuracy(network)
        rows[name] = {
            "measured_ms": best[name] * 1e3,
            "speedup": best["dense"] / best[name],
            "estimated_ms": float(estimator.latency_s(shares)) * 1e3,
            "accuracy": accuracy,
            "drop": dense_accuracy - accuracy,
            "feasible": dense_accuracy - accuracy <= max_drop + 1e-9,
            "test_accuracy": task.accuracy(network, task.test),
            "sparsity": 1 - table.nonzeros(plan) / table.total_params if len(plan) else 0.0,
            "evaluations": evaluations.get(name, 1),
            "plan": plan.as_dict(),
        }
        print(
            f"{name:22s} {rows[name]['measured_ms']:8.3f} ms {rows[name]['speedup']:5.2f}x  "
            f"val {accuracy:.4f} test {rows[name]['test_accuracy']:.4f}  sparsity {rows[name]['sparsity']:.3f}"
            f"{'' if rows[name]['feasible'] else '  (drops too much)'}"
        )
    return {"rows": rows, "dense_accuracy": dense_accuracy, "search_s": seconds, "batch": len(task.example)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["mnist", "cifar"], choices=["mnist", "cifar"])
    parser.add_argument("--max_drop", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="bench_search_recipes.json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = {}
    for name in arguments.tasks:
        made = {"mnist": mnist, "cifar": cifar}[name](arguments.seed)
        results[name] = compare(made, arguments.max_drop, arguments.seed)
        write_json(arguments.output, {"environment": environment(), "max_drop": arguments.max_drop, **results})


if __name__ == "__main__":
    main()
