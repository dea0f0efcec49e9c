"""The search against plans that need none, on real data: each with the same repair, tuning, recovery and kernels.

    python -m tests.benchmarks.bench_search_recipes mnist --folder runs/mnist-0
    python -m tests.benchmarks.bench_search_recipes cifar --folder runs/cifar-0
    python -m tests.benchmarks.bench_search_recipes cifar_jpeg --folder runs/cifar-jpeg-0

`cifar_jpeg` has the JPEG copy of all images, of which 5,000 test images judge; the published network, which has seen
none like them, is trained on the JPEGs for an epoch first.

Data are read from the folder LIGHTNING_PRUNE_DATA. For uniform, ERK, global-magnitude and sensitivity-threshold
plans the sparsest one is sought, by bisection, whose validation accuracy after repair and some steps of fine-tuning
drops by no more than the threshold; the candidates of the search get the same repair, the same steps and the same
threshold. All winners are then fine-tuned alike, confirmed, and executed in turn.

Every stage (`--only STAGE`) leaves its result in the folder and is not run again: dense, device, one per plan, search,
measure, figures. Stages run in this order, so that a run goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import LatencyEstimator, Magnitude, OneShot, Pruning, calibrate, layer_table
from lightning_prune.allocation import erk, global_shares, sensitivity_threshold, uniform
from lightning_prune.batch_norm import reestimate_batch_norm
from lightning_prune.commands.recovery import Tuning
from lightning_prune.latency import DeviceProfile
from lightning_prune.latency.timing import keep_freed_memory, repeated
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.reconstruction import DenseOutputs, reconstruct
from lightning_prune.runtime import AcceleratedModel, accelerate
from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.history import save_trials
from lightning_prune.search.one_shot import one_shot_masks
from lightning_prune.search.result_figures import scatter_figure
from lightning_prune.search.search import search_sparsity
from lightning_prune.search.sensitivity import sensitivity
from lightning_prune.search.storages import open_storage
from lightning_prune.targets import parameters
from lightning_prune.zoo import CIFAR10, MNIST, CIFARResNet, Classifier, HanCNN
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.recipe_figures import write_figures

LEVELS = (
    0.3,
    0.5,
    0.6,
    0.7,
    0.75,
    0.8,
    0.84,
    0.87,
    0.9,
    0.92,
    0.935,
    0.95,
    0.96,
    0.97,
    0.975,
    0.98,
    0.985,
    0.99,
    0.995,
)
"""Finer where it matters than the search's default, as bisection is."""

HAN = {"conv1": 0.65, "conv2": 0.95, "conv3": 0.98, "fc1": 0.98, "fc2": 0.90}
"""The plan made by hand that published Han-style results for this network use."""

_BISECTIONS = 8
_SCANNED = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_SWEEPS, _ROUNDS = 15, 15


@dataclass(frozen=True)
class Settings:
    """Of a task.

    Args:
        train_epochs: of the dense network; 0 where there are published weights.
        examples: of training, that candidates are repaired on.
        validated: validation examples that candidates are measured on; all confirm the winners.
        repair: of candidates, see `search_sparsity`.
        tuning_steps: that every candidate gets.
        recovery_batches: of fine-tuning that every winner gets.
        trials: of the search.
        plans: what the search is compared with.
    """

    train_epochs: int
    examples: int
    validated: int
    repair: Literal["layerwise", "sequential"]
    tuning_steps: int
    recovery_batches: int
    trials: int
    plans: tuple[str, ...]


FAMILIES = ("uniform", "erk", "global magnitude", "sensitivity threshold")
SETTINGS = {
    "mnist": Settings(3, 384, 3072, "sequential", 0, 250, 50, (*FAMILIES, "han")),
    "cifar": Settings(0, 128, 1000, "sequential", 0, 20, 40, FAMILIES),
    "cifar_jpeg": Settings(1, 256, 5000, "sequential", 0, 100, 40, FAMILIES),
}


def model_of(name: str) -> LightningModule:
    """Dense, as it is trained."""
    if name == "mnist":
        return Classifier(HanCNN(), input_shape=[1, 28, 28])
    return Classifier(
        CIFARResNet(20),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        input_shape=[3, 32, 32],
        initialize_from="cifar_resnets/resnet20-12fca82f.th",
    )


def data_of(name: str, seed: int) -> Any:
    """MNIST, or CIFAR-10 of which half the test images judge plans and the other half the result."""
    if name == "mnist":
        return MNIST(batch_size=128)
    variant: Literal["jpeg", "lossless_subset"] = "jpeg" if name == "cifar_jpeg" else "lossless_subset"
    return CIFAR10(variant=variant, val_from="test", val_share=0.5, split_seed=seed)


def quiet_trainer(**settings: Any) -> Trainer:
    """Without a word."""
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **settings)


class Bench:
    """One task, its trained network, and the folder of its results.

    Args:
        name: of the task.
        seed: of training, split and search.
        max_drop: the threshold.
        folder: of results.
        settings: of the task.
    """

    def __init__(self, name: str, seed: int, max_drop: float, folder: Path, settings: Settings) -> None:
        self.name, self.seed, self.max_drop, self.folder, self.settings = name, seed, max_drop, folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.data = data_of(name, seed)
        self.data.prepare_data()
        self.data.setup("fit")
        self.validation = [(x, y) for x, y in self.data.val_dataloader()]
        self.test = [(x, y) for x, y in self.data.test_dataloader()]
        self.example = self.validation[0][0][:16].contiguous()

    @cached_property
    def model(self) -> LightningModule:
        """Trained here, or elsewhere."""
        torch.manual_seed(self.seed)
        model = model_of(self.name)
        path = self.folder / "dense.pt"
        if self.settings.train_epochs and not path.exists():
            best = ModelCheckpoint(tempfile.mkdtemp(), monitor="val_acc", mode="max")
            quiet_trainer(max_epochs=self.settings.train_epochs, callbacks=[best]).fit(model, datamodule=self.data)
            torch.save(torch.load(best.best_model_path, weights_only=True)["state_dict"], path)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        model.trainer = None
        return model

    @cached_property
    def dense(self) -> nn.Module:
        return inference_copy(self.model)

    @cached_property
    def calibration(self) -> list[Tensor]:
        torch.manual_seed(0)
        found: list[Tensor] = []
        for x, _ in self.data.train_dataloader():
            found.append(x)
            if sum(map(len, found)) >= self.settings.examples:
                break
        return found

    @cached_property
    def table(self) -> Any:
        return layer_table(self.dense, self.example)

    @cached_property
    def outputs(self) -> DenseOutputs:
        return DenseOutputs()

    @cached_property
    def profile(self) -> DeviceProfile:
        path = self.folder / "device.json"
        if path.exists():
            return DeviceProfile.load(path)
        return calibrate(self.dense, self.example, profile=path, spread=0)

    @cached_property
    def dense_accuracy(self) -> float:
        return self.whole(self.dense)

    @cached_property
    def part(self) -> list[tuple[Tensor, Tensor]]:
        """Validation batches that judge candidates."""
        return self.validation[: math.ceil(self.settings.validated / len(self.validation[0][0]))]

    @cached_property
    def tune(self) -> Tuning | None:
        steps = self.settings.tuning_steps
        return Tuning(quiet_trainer(max_epochs=1), self.model, self.data, steps=steps) if steps else None

    @cached_property
    def curves(self) -> Sensitivity:
        """Of each layer pruned alone, without repair, as Han et al. look at them."""
        path = self.folder / "sensitivity.json"
        if not path.exists():
            sensitivity(self.dense, self.part[:8], levels=_SCANNED).save(path)
        return Sensitivity.load(path)

    def accuracy(self, network: nn.Module, batches: list[tuple[Tensor, Tensor]] | None = None) -> float:
        """On the part of the validation data that judges candidates, or other batches."""
        right = total = 0
        with torch.inference_mode():
            for x, y in self.part if batches is None else batches:
                right += int((network(x).argmax(1) == y).sum())
                total += len(y)
        return right / total

    def whole(self, network: nn.Module) -> float:
        """On all validation data."""
        return self.accuracy(network, self.validation)

    def recover(self, network: nn.Module, plan: SparsityPlan) -> nn.Module:
        """Fine-tuned with its zeros kept, or as it was where that did not help.

        What drops values out does so less often, as Han et al. (2015, section 3.3) have it: with a probability times
        the root of the share of weights that are left.
        """
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.model)
        model.load_state_dict(network.state_dict())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p *= math.sqrt(self.table.nonzeros(plan) / self.table.total_params)
        pruning = Pruning(plan, OneShot(), scope="local", end=0.01)
        trainer = quiet_trainer(
            max_epochs=1,
            limit_train_batches=self.settings.recovery_batches,
            limit_val_batches=0,
            enable_checkpointing=False,
            callbacks=[pruning],
        )
        trainer.fit(model, datamodule=self.data)
        model.trainer = None
        trained = inference_copy(model)
        return trained if self.whole(trained) >= self.whole(network) else network

    def candidate(self, plan: SparsityPlan) -> nn.Module:
        """What the search gives its candidates: one-shot by magnitude, least squares, BatchNorm, some steps."""
        network, spare = inference_copy(self.dense), inference_copy(self.dense)
        masks = {
            name: one_shot_masks(spare, name, [PlanEntry(share)], Magnitude())[0]
            for name, share in plan.items()
            if share > 0
        }
        sequential = self.settings.repair == "sequential"
        reconstruct(
            self.dense, masks, self.calibration, sequential=sequential, remember=self.outputs if sequential else None
        ).apply(network)
        reestimate_batch_norm(network, self.calibration)
        if self.tune is not None:
            self.tune(network, plan)
        return network.eval()

    def family(self, name: str) -> Callable[[float], SparsityPlan]:
        """Plans by one number in [0, 1]."""
        weights = {n: weight.detach() for n, weight in parameters(self.dense).items() if n in self.table.names}
        if name == "sensitivity threshold":
            curves = self.curves
            drops = curves.drops("accuracy").numpy()
            # Its argument is a drop: what each layer alone may cost.
            return lambda s: sensitivity_threshold(curves.names, curves.levels, drops, s * 0.05)
        makes: dict[str, Callable[[float], SparsityPlan]] = {
            "uniform": lambda s: uniform(self.table, s),
            "erk": lambda s: erk(self.table, s),
            "global magnitude": lambda s: global_shares({n: w.abs() for n, w in weights.items()}, s),
        }
        return makes[name]

    def stage(self, name: str) -> dict[str, Any]:
        """A plan, its network in the folder, and what is known of it; made unless it is there."""
        path = self.folder / f"{name.replace(' ', '-')}.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        began = time.monotonic()
        found = self.searched() if name == "search" else self.by_hand() if name == "han" else self.bisected(name)
        network = found.pop("network")
        torch.save(network.state_dict(), path.with_suffix(".pt"))
        found |= {
            "accuracy": self.whole(network),
            "test_accuracy": self.accuracy(network, self.test),
            "seconds": time.monotonic() - began,
        }
        write_json(path, found)
        print(
            name, {key: found[key] for key in ("before_recovery", "accuracy", "test_accuracy", "seconds")}, flush=True
        )
        return found

    def by_hand(self) -> dict[str, Any]:
        """Whatever it loses."""
        plan = SparsityPlan({f"network.{layer}.weight": share for layer, share in HAN.items()})
        network = self.candidate(plan)
        return {
            "plan": plan.as_dict(),
            "evaluations": 1,
            "before_recovery": self.accuracy(network),
            "network": self.recover(network, plan),
        }

    def bisected(self, name: str) -> dict[str, Any]:
        """The sparsest plan of a family whose accuracy is at least what the threshold leaves, as bisection sees it."""
        make, reference = self.family(name), self.accuracy(self.dense)
        low, high = (0.0, 1.0) if name == "sensitivity threshold" else (0.5, 0.995)
        plan = make(low)
        network = self.candidate(plan)
        value = self.accuracy(network)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tried = self.candidate(make(middle))
            reached = self.accuracy(tried)
            if reference - reached <= self.max_drop + 1e-9:
                low, plan, network, value = middle, make(middle), tried, reached
            else:
                high = middle
        return {
            "plan": plan.as_dict(),
            "evaluations": _BISECTIONS + 2,
            "before_recovery": value,
            "network": self.recover(network, plan),
        }

    def searched(self) -> dict[str, Any]:
        """The search's."""
        found = search_sparsity(
            self.dense,
            self.example,
            self.calibration,
            self.accuracy,
            max_drop=self.max_drop,
            profile=self.profile,
            levels=LEVELS,
            n_trials=self.settings.trials,
            repair=self.settings.repair,
            tune=self.tune,
            recover=self.recover,
            confirm=self.whole,
            seed=self.seed,
            storage=self.folder / "study.db",
            study_name="search",
        )
        return {
            "plan": found.plan.as_dict(),
            "evaluations": found.evaluations,
            "before_recovery": found.search_accuracy,
            "phases_s": found.details["seconds"],
            "network": found.model,
        }

    def draw(self, folder: Path) -> None:
        """The figures of the recipe."""
        network = inference_copy(self.dense)
        network.load_state_dict(torch.load(self.folder / "search.pt", weights_only=True))
        study = optuna.load_study(study_name="search", storage=open_storage(self.folder / "study.db"))
        history = save_trials(self.folder / "trials.json", study, unit="s")
        folder.mkdir(parents=True, exist_ok=True)
        print(write_figures(folder, self.dense, network, self.table, self.curves, scatter_figure(history)))

    def measure(self) -> dict[str, Any]:
        """All networks executed in turn, so that a slow spell of the machine meets all of them."""
        stages = {name: self.stage(name) for name in (*self.settings.plans, "search")}
        accelerated: dict[str, AcceleratedModel] = {"dense": accelerate(self.dense, self.example, self.profile)}
        for name in stages:
            network = inference_copy(self.dense)
            network.load_state_dict(torch.load(self.folder / f"{name.replace(' ', '-')}.pt", weights_only=True))
            accelerated[name] = accelerate(network, self.example, self.profile)
        best: dict[str, float] = dict.fromkeys(accelerated, math.inf)
        with torch.inference_mode():
            for _ in range(_SWEEPS):
                for name, fast in accelerated.items():
                    timing = repeated(lambda fast=fast: fast(self.example), _ROUNDS)  # type: ignore[misc]
                    best[name] = min(best[name], timing.best_s)
        estimator = LatencyEstimator(self.table, self.profile)
        rows: dict[str, dict[str, Any]] = {
            "dense": {
                "measured_ms": best["dense"] * 1e3,
                "accuracy": self.dense_accuracy,
                "test_accuracy": self.accuracy(self.dense, self.test),
            }
        }
        for name, found in stages.items():
            plan = SparsityPlan(found["plan"])
            shares = torch.tensor([plan.get(spec.name, 0.0) for spec in self.table], dtype=torch.float64)
            rows[name] = {
                "measured_ms": best[name] * 1e3,
                "speedup": best["dense"] / best[name],
                "estimated_ms": float(estimator.latency_s(shares)) * 1e3,
                "drop": self.dense_accuracy - found["accuracy"],
                "feasible": self.dense_accuracy - found["accuracy"] <= self.max_drop + 1e-9,
                "sparsity": 1 - self.table.nonzeros(plan) / self.table.total_params,
                **found,
            }
        for name, row in rows.items():
            print(
                f"{name:22s} {row['measured_ms']:8.3f} ms {row.get('speedup', 1.0):5.2f}x  "
                f"val {row['accuracy']:.4f} test {row['test_accuracy']:.4f}  removed {row.get('sparsity', 0.0):.3f}"
                f"{'' if row.get('feasible', True) else '  (drops too much)'}"
            )
        return {"rows": rows, "batch": len(self.example), "max_drop": self.max_drop, "seed": self.seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(SETTINGS))
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument(
        "--only", nargs="*", choices=["dense", "device", *FAMILIES, "han", "search", "measure", "figures"]
    )
    parser.add_argument("--figures", type=Path, help="folder of the figures, by default that of the run")
    parser.add_argument("--max_drop", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = SETTINGS[arguments.task]
    bench = Bench(arguments.task, arguments.seed, arguments.max_drop, arguments.folder, settings)
    for name in arguments.only or ["dense", "device", *settings.plans, "search", "measure", "figures"]:
        if name == "dense":
            print(
                f"dense {bench.dense_accuracy:.4f} on validation, {bench.accuracy(bench.dense, bench.test):.4f} on test"
            )
        elif name == "device":
            print(bench.profile.machine)
        elif name == "figures":
            bench.draw(arguments.figures or arguments.folder)
        elif name == "measure":
            write_json(arguments.folder / "results.json", {"environment": environment(), **bench.measure()})
        else:
            bench.stage(name)


if __name__ == "__main__":
    main()
