"""What 8 bits cost a pruned ResNet-20 on CIFAR-10, and 4 bits a pruned network on MNIST, as Markdown tables.

Run with `python -m tests.benchmarks.bench_quantized_pruned --folder FOLDER`; `LIGHTNING_PRUNE_DATA` names the data. What
is trained is kept in the folder, part by part, so the parts may be run one by one (`--part cifar-70`), or again.
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
    """The pretrained network, pruned by AGP in the first half of 7 epochs."""
    network = CIFARResNet(20)
    model = Classifier(
        network,
        initialize_from=str(WEIGHTS),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
    )
    data = CIFAR10("lossless_subset", download=False)
    return _fit(model, data, [Pruning(sparsity, end=0.5)], 7)


def mnist_dense(_: Path) -> Classifier:
    """Three epochs."""
    return _fit(_digits_classifier(), MNIST(download=False), [], 3)


def mnist_pruned(folder: Path) -> Classifier:
    """Two epochs of AGP to 90 %, and two more."""
    return _fit(_digits_classifier(folder), MNIST(download=False), [Pruning(0.9, end=Epochs(2))], 4)


def mnist_aware(folder: Path) -> Classifier:
    """The same, the last two with weights of 4 bits and activations of 8."""
    aware = QuantizationAwareTraining(4, activation_bits=8, begin=Epochs(2), freeze=0.9)
    return _fit(_digits_classifier(folder), MNIST(download=False), [Pruning(0.9, end=Epochs(2)), aware], 4)


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


def _train(name: str, folder: Path) -> None:
    path = folder / f"{name}.pt"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(0, verbose=False)
    start = time.perf_counter()
    torch.save(PARTS[name](folder).network.state_dict(), path)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)


def _loaded(network: nn.Module, folder: Path, name: str) -> nn.Module:
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
    return all(bool((layer.layer.get_parameter("weight")[weights[name] == 0] == 0).all()) for name, layer in layers.items())


def _nonzero_macs(table: LayerTable, network: nn.Module) -> float:
    """Of linear and convolution layers."""
    parameters = dict(network.named_parameters())
    return sum(spec.macs * (parameters[spec.name] != 0).double().mean().item() for spec in table)


def cifar_rows(folder: Path) -> list[dict[str, Any]]:
    x, y, seen = _images(CIFAR10("lossless_subset", augment=False, download=False))
    networks = {"dense": resnet20()} | {
        name.removeprefix("cifar-") + " %": _loaded(CIFARResNet(20), folder, name) for name in PARTS if "cifar" in name
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
        network = _loaded(HanCNN(), folder, name)
        weights = [p for p in network.parameters() if p.ndim > 1]
        row: dict[str, Any] = {
            "network": name,
            "images": len(y),
            "removed": 1 - sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights),
            "fp32": _top(_ranks(network, x, y), 1),
        }
        for bits in (8, 4, 3, 2):
            twin = quantize(network, seen.split(128), bits, activation_bits=8)
            row[f"int{bits}"] = _top(_ranks(twin, x, y), 1)
            row["zeros_stay"] = row.get("zeros_stay", True) and _kept_zeros(network, twin)
        rows.append(row)
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def show(payload: dict[str, Any]) -> str:
    columns = ["ResNet-20", "MACs", "weights", "fp32 top-1 / top-5", "int8 top-1 / top-5", "drop", "lost, won"]
    cifar_lines = [
        [
            row["network"] + ("" if row["per_channel"] else ", one range per layer"),
            f"{row['macs'] / 1e6:.1f} M (-{100 * row['macs_removed']:.1f} %)",
            f"{row['weights']:,} (-{100 * row['weights_removed']:.1f} %)",
            " / ".join(f"{value:.2f}" for value in row["fp32"]),
            " / ".join(f"{value:.2f}" for value in row["int8"]),
            f"{row['fp32'][0] - row['int8'][0]:+.2f} / {row['fp32'][1] - row['int8'][1]:+.2f}",
            f"{row['lost']}, {row['won']}",
        ]
        for row in payload["cifar"]
    ]
    mnist_lines = [
        [row["network"], f"{100 * row['removed']:.1f} %", *(f"{row[k]:.2f}" for k in ("fp32", "int8", "int4", "int3", "int2"))]
        for row in payload["mnist"]
    ]
    count = payload["cifar"][0]["images"]
    error = 100 * math.sqrt(0.9164 * (1 - 0.9164) / count)
    return (
        f"{_table(columns, cifar_lines)}\n\n{count} test images: one is {100 / count:.2f} points, the standard error of an "
        f"accuracy {error:.1f}.\n\n"
        f"{_table(['HanCNN on MNIST', 'removed', 'fp32', 'w8', 'w4', 'w3', 'w2'], mnist_lines)}\n\n"
        f"zeros stay zeros in all twins: {all(row['zeros_stay'] for kind in ('cifar', 'mnist') for row in payload[kind])}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--part", choices=[*PARTS, "tables"], action="append")
    parser.add_argument("--output", type=Path, help="of the figures, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = options.part or [*PARTS, "tables"]
    for name in PARTS:
        if name in parts:
            _train(name, options.folder)
    if "tables" in parts:
        payload = {"cifar": cifar_rows(options.folder), "mnist": mnist_rows(options.folder)}
        print(show(payload))
        if options.output:
            write_json(options.output, {"environment": environment(), **payload})


if __name__ == "__main__":
    main()
