"""Small networks of which every plan was evaluated: what a search finds can be held against the truth.

    python -m tests.benchmarks.truth_tables [--folder FOLDER] [NAME ...]

A network of four prunable layers is trained on scikit-learn's digits for some seconds. Each layer has eight levels:
weights are removed by magnitude and the kept ones repaired by layerwise least squares on training data. The accuracy of
all 8^4 = 4,096 plans is measured on images that were not trained on. Latencies are made up, not measured: a dense
kernel, and a sparse one whose time is affine in the density and which is the slower one at low sparsities.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.plan import PlanEntry
from lightning_prune.search.space import CostTable, Floats, Ints, SearchSpace

LEVELS = (0.0, 0.5, 0.7, 0.8, 0.87, 0.92, 0.95, 0.98)
FOLDER = Path(__file__).parent / "tables"
SHOWN = ("cnn-0", "mlp-1", "wide-2")
"""The tables on which results are reported; what was tuned was tuned on tables of other seeds."""


@dataclass(frozen=True)
class Truth:
    """Every plan of one network.

    Args:
        accuracy: share of images classified rightly, `[8, 8, 8, 8]`.
        errors: relative output errors of each layer alone, `[layers, levels]`.
        latency_s: made-up times, `[layers, levels]`.
    """

    accuracy: Floats
    errors: Floats
    latency_s: Floats

    @property
    def drop(self) -> Floats:
        """Against the dense network, one value per plan."""
        return np.asarray(self.accuracy.flat[0] - self.accuracy, dtype=np.float64)

    @property
    def total_s(self) -> Floats:
        """Latency of every plan, in the shape of the accuracies."""
        grids = np.meshgrid(*self.latency_s, indexing="ij")
        return np.asarray(sum(grids), dtype=np.float64)

    def best_s(self, max_drop: float) -> float:
        """The least latency of all plans within the drop."""
        return float(self.total_s[self.drop <= max_drop + 1e-9].min())

    def space(self, groups: tuple[int, ...] | None = None) -> SearchSpace:
        """What a search chooses from: one item per layer and, unless given, one group per item."""
        items = len(self.errors)
        rows = np.arange(items)

        def cost(choices: Ints) -> Floats:
            return np.asarray(self.latency_s[rows, choices].sum(axis=-1), dtype=np.float64)

        return SearchSpace(
            items=tuple((f"layer{item}.weight",) for item in range(items)),
            entries=tuple(tuple(PlanEntry(level) for level in LEVELS) for _ in range(items)),
            errors=self.errors,
            tables=(CostTable(self.latency_s),),
            cost=cost,
            groups=tuple(range(items)) if groups is None else groups,
        )

    def save(self, path: Path) -> None:
        """Write it as a compressed file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path, accuracy=self.accuracy.astype(np.float32), errors=self.errors, latency_s=self.latency_s
        )

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read what `save` wrote."""
        with np.load(path) as file:
            accuracy, errors, latency_s = (
                np.asarray(file[name], dtype=np.float64) for name in ("accuracy", "errors", "latency_s")
            )
        return cls(accuracy, errors, latency_s)


def truth(name: str, folder: Path = FOLDER) -> Truth:
    """The stored table of a name such as "cnn-0" (a network and a seed), made if it is not there."""
    path = folder / f"{name}.npz"
    if not path.exists():
        kind, seed = name.rsplit("-", 1)
        made(kind, int(seed)).save(path)
    return Truth.load(path)


def made(kind: str, seed: int) -> Truth:
    """Trains a network and evaluates every plan."""
    from lightning_prune.reconstruction import layer_statistics, repair

    torch.manual_seed(seed)
    train, train_labels, held, held_labels = _digits(seed)
    stages = _stages(kind)
    network = nn.Sequential(*stages)
    _fit(network, train, train_labels)
    network.eval()
    layers = [_layer(stage) for stage in stages]
    names = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]
    statistics = layer_statistics(network, [train], names)
    errors = np.zeros((4, 8))
    repaired: list[list[tuple[Tensor, Tensor]]] = []
    for item, (name, layer) in enumerate(zip(names, layers, strict=True)):
        assert layer.bias is not None
        weight, bias = layer.weight.detach(), layer.bias.detach()
        masks = [_mask(weight, level) for level in LEVELS]
        done = repair(weight, masks, statistics[name], bias=bias)
        errors[item, 1:] = [each.error.relative for each in done[1:]]
        repaired.append([(weight, bias), *((each.weight, each.bias) for each in done[1:] if each.bias is not None)])
    accuracy = np.zeros((8,) * 4)

    def walk(prefix: tuple[int, ...], x: Tensor) -> None:
        item = len(prefix)
        if item == 4:
            accuracy[prefix] = float((x.argmax(1) == held_labels).double().mean())
            return
        for level, (weight, bias) in enumerate(repaired[item]):
            layers[item].weight.data = weight
            layers[item].bias = nn.Parameter(bias)
            walk((*prefix, level), stages[item](x))

    with torch.no_grad():
        walk((), held)
    return Truth(accuracy, errors, _latencies(network, stages, train[:1], seed))


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16.0
    labels = torch.from_numpy(bunch.target).long()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, held = order[:900], order[900:]
    return (images[train] - 0.305) / 0.376, labels[train], (images[held] - 0.305) / 0.376, labels[held]


def _stages(kind: str) -> list[nn.Sequential]:
    relu, flat = nn.ReLU, nn.Flatten
    if kind == "cnn":
        return [
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), relu()),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), relu(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), relu(), nn.MaxPool2d(2)),
            nn.Sequential(flat(), nn.Linear(128, 10)),
        ]
    if kind == "mlp":
        return [
            nn.Sequential(flat(), nn.Linear(64, 160), relu()),
            nn.Sequential(nn.Linear(160, 96), relu()),
            nn.Sequential(nn.Linear(96, 64), relu()),
            nn.Sequential(nn.Linear(64, 10)),
        ]
    if kind == "wide":
        return [
            nn.Sequential(nn.Conv2d(1, 24, 5, padding=2), relu(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(24, 48, 3), relu()),
            nn.Sequential(flat(), nn.Linear(192, 96), relu()),
            nn.Sequential(nn.Linear(96, 10)),
        ]
    raise ValueError(f"networks are cnn, mlp and wide, got {kind!r}")


def _layer(stage: nn.Sequential) -> nn.Conv2d | nn.Linear:
    return next(module for module in stage if isinstance(module, nn.Conv2d | nn.Linear))


def _mask(weight: Tensor, level: float) -> Tensor:
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().argsort(stable=True)[: round(level * weight.numel())]] = False
    return kept.view_as(weight)


def _fit(network: nn.Module, images: Tensor, labels: Tensor, epochs: int = 30, batch: int = 50) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()


def _latencies(network: nn.Module, stages: list[nn.Sequential], example: Tensor, seed: int) -> Floats:
    """Dense at 100 G multiply-adds a second; sparse at a third of that per nonzero, with an overhead of its own."""
    rng = np.random.default_rng(1000 + seed)
    x, rows = example, []
    density = 1.0 - np.array(LEVELS)
    for stage in stages:
        layer = _layer(stage)
        y = nn.Sequential(*itertools.takewhile(lambda module, layer=layer: module is not layer, stage), layer)(x)  # type: ignore[misc]
        positions = y[0, 0].numel() if y.ndim == 4 else 1
        dense_s = 2e-7 + 64 * positions * layer.weight.numel() / 1e11
        overhead_s = (0.05 + 0.1 * rng.random()) * dense_s
        row = overhead_s + density * dense_s * rng.uniform(1.6, 3.0)
        row[0] = dense_s
        rows.append(row)
        x = stage(x)
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=SHOWN)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        table = truth(name, arguments.folder)
        for max_drop in (0.005, 0.01, 0.02):
            best = table.best_s(max_drop)
            feasible = table.total_s[table.drop <= max_drop + 1e-9]
            print(
                f"{name:8} dense accuracy {table.accuracy.flat[0]:.4f}, drop {max_drop}: {feasible.size} of 4096 "
                f"feasible, speedup of the best {table.total_s.flat[0] / best:.2f}, "
                f"{(feasible <= 1.01 * best).sum()} within 1 % of it"
            )


if __name__ == "__main__":
    main()
