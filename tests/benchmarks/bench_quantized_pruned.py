"""What 8 bits cost a pruned ResNet-20 on CIFAR-10, and 4 bits a pruned network on MNIST, as Markdown tables.

Run with `python -m tests.benchmarks.bench_quantized_pruned --folder FOLDER`; `LIGHTNING_PRUNE_DATA` names the data.
What is trained is kept in the folder, part by part, so the parts may be run one by one (`--part cifar-70`), or again.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from lightning_prune import Epochs, Pruning, compression_ratio, layer_table
from lightning_prune.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_prune.layers import LayerTable
from lightning_prune.quantization import quantize, quantized_layers
from lightning_prune.zoo import CIFAR10, MNIST, CIFARResNet, Classifier, HanCNN
from lightning_prune.zoo.datasets import TensorDataModule
from tests.benchmarks.harness import environment, write_json
from tests.quantization.networks import WEIGHTS, resnet20

CALIBRATION = 512
"""Training images, not augmented, that activations' ranges are found from."""


def cifar(sparsity: float, _: Path) -> Classifier:
    """The pretrained network, pruned by AGP in the first half of 5 epochs."""
    network = CIFARResNet(20)
    model = Classifier(
        network,
        initialize_from=str(WEIGHTS),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    )
    data = CIFAR10("lossless_subset", download=False)
    return _fit(model, data, [Pruning(sparsity, end=0.5)], 5)


def mnist_dense(_: Path) -> Classifier:
    """Two epochs."""
    return _fit(_digits_classifier(), MNIST(download=False), [], 2)


def mnist_pruned(folder: Path) -> Classifier:
    """An epoch of AGP to 90 %, and two more."""
    return _fit(_digits_classifier(folder), MNIST(download=False), [Pruning(0.9, end=Epochs(1))], 3)


def mnist_aware(folder: Path) -> Classifier:
    """The same, the last two with weights of 4 bits and activations of 8."""
    aware = QuantizationAwareTraining(4, activation_bits=8, begin=Epochs(1), freeze=0.9)
    return _fit(_digits_classifier(folder), MNIST(download=False), [Pruning(0.9, end=Epochs(1)), aware], 3)


def _digits_classifier(folder: Path | None = None) -> Classifier:
    model = Classifier(HanCNN(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    if folder is not None:
        model.network.load_state_dict(torch.load(folder / "mnist-dense.pt", weights_only=True))
    return model


def _fit(model: Classifier, data: TensorDataModule, callbacks: list[Callback], epochs: int) -> Classifier:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return model


PARTS: dict[str, Callable[[Path], Classifier]] = {
    "cifar-70": functools.partial(cifar, 0.7),
    "cifar-80": functools.partial(cifar, 0.8),
    "mnist-dense": mnist_dense,
    "mnist-pruned": mnist_pruned,
    "mnist-aware": mnist_aware,
}


def train(name: str, folder: Path) -> None:
    """Train a part and keep its weights, unless they are there."""
    path = folder / f"{name}.pt"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(0, verbose=False)
    start = time.perf_counter()
    torch.save(PARTS[name](folder).network.state_dict(), path)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)


def loaded(network: nn.Module, folder: Path, name: str) -> nn.Module:
    """With the weights of a part, in eval mode."""
    network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return network.eval()


def _images(data: TensorDataModule) -> tuple[Tensor, Tensor, Tensor]:
    """Test images and labels, and training images for calibration."""
    data.setup("fit")
    sets: Any = data._sets
    x, y = sets["test"].__getitems__(list(range(len(sets["test"]))))
    seen, _ = sets["train"].__getitems__(list(range(CALIBRATION)))
    return x, y, seen


def _ranks(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How many classes are more likely than the right one, `[examples]`."""
    with torch.inference_mode():
        logits = torch.cat([network(part) for part in x.split(256)])
    return (logits > logits.gather(1, y[:, None])).sum(1)


def _top(ranks: Tensor, k: int) -> float:
    return 100 * (ranks < k).double().mean().item()


def _kept_zeros(network: nn.Module, twin: nn.Module) -> bool:
    """Whether all weights that are zero are so in the twin (BatchNorm, which is folded there, scales rows)."""
    layers = quantized_layers(twin)
    weights = {name: getattr(network.get_submodule(name), "weight") for name in layers}  # noqa: B009
    return all(
        bool((layer.layer.get_parameter("weight")[weights[name] == 0] == 0).all()) for name, layer in layers.items()
    )


def _nonzero_macs(table: LayerTable, network: nn.Module) -> float:
    """Of linear and convolution layers."""
    parameters = dict(network.named_parameters())
    return sum(spec.macs * (parameters[spec.name] != 0).double().mean().item() for spec in table)


def cifar_rows(folder: Path) -> list[dict[str, Any]]:
    x, y, seen = _images(CIFAR10("lossless_subset", augment=False, download=False))
    networks = {"dense": resnet20()} | {
        name.removeprefix("cifar-") + " %": loaded(CIFARResNet(20), folder, name) for name in PARTS if "cifar" in name
    }
    table = layer_table(networks["dense"], x[:1])
    rows = []
    for name, network in networks.items():
        macs, weights = _nonzero_macs(table, network), _nonzero_weights(table, network)
        full = _ranks(network, x, y)
        for per_channel in (True, False):
            twin = quantize(network, seen.split(128), 8, "asymmetric", per_channel)
            ranks = _ranks(twin, x, y)
            rows.append(
                {
                    "network": name,
                    "per_channel": per_channel,
                    "images": len(y),
                    "macs": macs,
                    "macs_removed": 1 - macs / table.total_macs,
                    "weights": weights,
                    "weights_removed": 1 - weights / table.total_params,
                    "compression_ratio": compression_ratio(network),
                    "fp32": [_top(full, k) for k in (1, 5)],
                    "int8": [_top(ranks, k) for k in (1, 5)],
                    "lost": int(((full == 0) & (ranks > 0)).sum()),
                    "won": int(((full > 0) & (ranks == 0)).sum()),
                    "zeros_stay": _kept_zeros(network, twin),
                }
            )
    return rows


def _nonzero_weights(table: LayerTable, network: nn.Module) -> int:
    parameters = dict(network.named_parameters())
    return sum(int((parameters[spec.name] != 0).sum()) for spec in table)


def mnist_rows(folder: Path) -> list[dict[str, Any]]:
    x, y, seen = _images(MNIST(download=False))
    rows = []
    for name in ("mnist-dense", "mnist-pruned", "mnist-aware"):
        network = loaded(HanCNN(), folder, name)
        weights = [p for p in network.parameters() if p.ndim > 1]
        row: dict[str, Any] = {
            "network": name,
            "images": len(y),
            "removed": 1 - sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights),
            "fp32": _top(_ranks(network, x, y), 1),
        }
        for bits in (8, 4):
            twin = quantize(network, seen.split(128), bits, activation_bits=8)
            row[f"int{bits}"] = _top(_ranks(twin, x, y), 1)
            row["zeros_stay"] = row.get("zeros_stay", True) and _kept_zeros(network, twin)
        rows.append(row)
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def show_cifar(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["ResNet-20", "MACs", "weights", "fp32 top-1 / top-5", "int8 top-1 / top-5", "drop", "lost, won"]
    lines = [
        [
            row["network"] + ("" if row["per_channel"] else ", one range per layer"),
            f"{row['macs'] / 1e6:.1f} M (-{100 * row['macs_removed']:.1f} %)",
            f"{row['weights']:,} (-{100 * row['weights_removed']:.1f} %)",
            " / ".join(f"{value:.2f}" for value in row["fp32"]),
            " / ".join(f"{value:.2f}" for value in row["int8"]),
            f"{row['fp32'][0] - row['int8'][0]:+.2f} / {row['fp32'][1] - row['int8'][1]:+.2f}",
            f"{row['lost']}, {row['won']}",
        ]
        for row in rows
    ]
    count, share = rows[0]["images"], rows[0]["fp32"][0] / 100
    error = 100 * math.sqrt(share * (1 - share) / count)
    return (
        f"{_table(columns, lines)}\n\n{count} test images: one is {100 / count:.2f} points, the standard error of an "
        f"accuracy {error:.1f}"
    )


def show_mnist(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["HanCNN", "removed", "fp32", "weights of 8 bits", "of 4"]
    return _table(
        columns,
        [
            [row["network"], f"{100 * row['removed']:.1f} %", *(f"{row[k]:.2f}" for k in ("fp32", "int8", "int4"))]
            for row in rows
        ],
    )


TABLES: dict[str, tuple[Callable[[Path], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], str]]] = {
    "cifar-table": (cifar_rows, show_cifar),
    "mnist-table": (mnist_rows, show_mnist),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for weights, and the tables as JSON")
    parser.add_argument("--part", choices=[*PARTS, *TABLES], action="append", help="all unless given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.part or [*PARTS, *TABLES]:
        if name in PARTS:
            train(name, options.folder)
        else:
            rows_of, show = TABLES[name]
            rows = rows_of(options.folder)
            stay = all(row["zeros_stay"] for row in rows)
            print(f"{show(rows)}\n\nzeros stay zeros in all twins: {stay}\n", flush=True)
            write_json(options.folder / f"{name}.json", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
