"""Accuracy of twins and of their ONNX files in ONNX Runtime, on whole test sets, as Markdown rows.

Run with `python -m tests.benchmarks.bench_int8 --folder FOLDER`; `LIGHTNING_PRUNE_DATA` names the data. The folder is
that of `bench_quantized_pruned`, whose MNIST network is trained there if it is not yet.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.quantization import AveragedMinMax, MeanSquaredError, Percentile, export_onnx, quantize
from lightning_prune.zoo import CIFAR10, MNIST, HanCNN
from tests.benchmarks.bench_quantized_pruned import loaded, train
from tests.quantization.networks import resnet20
from tests.quantization.test_onnx_export import run

MNIST_SETTINGS: list[dict[str, Any]] = [{}, {"outputs": True}]
CIFAR_SETTINGS: list[dict[str, Any]] = [
    {},
    {"outputs": True},
    {"per_channel": False},
    {"scheme": "symmetric"},
    {"scheme": "symmetric", "outputs": True},
    {"ranges": AveragedMinMax()},
    {"ranges": Percentile(0.9999)},
    {"bits": 16},
    {"bits": 6},
    {"bits": 4, "activation_bits": 8},
    {"bits": 4, "activation_bits": 8, "weight_ranges": MeanSquaredError()},
]
INTEGER = ("QLinearConv", "QGemm")
FLOAT = ("Conv", "FusedConv", "Gemm")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--network", choices=["mnist", "cifar"], help="only this one")
    options = parser.parse_args(arguments)
    folder = options.folder
    torch.set_num_threads(1)
    if options.network != "cifar":
        train("mnist-dense", folder)
    print("| network | setting | fp32 | twin | ORT | same top-1 | integer layers | twin / dense time |")
    print("|---|---|---|---|---|---|---|---|")
    networks: list[tuple[str, torch.nn.Module, Any, int, list[dict[str, Any]]]] = []
    if options.network != "cifar":
        network = loaded(HanCNN(), folder, "mnist-dense")
        networks.append(("HanCNN, MNIST", network, MNIST(download=False), 10_000, MNIST_SETTINGS))
    if options.network != "mnist":
        photos = CIFAR10("lossless_subset", augment=False, download=False)
        networks.append(("ResNet-20, CIFAR-10", resnet20(), photos, 1017, CIFAR_SETTINGS))
    for name, model, data, count, settings in networks:
        data.setup("fit")
        x, y = data._sets["test"].__getitems__(list(range(count)))
        seen, _ = data._sets["train"].__getitems__(list(range(512)))
        for setting in settings:
            twin = quantize(model, seen.split(128), **setting)
            seconds = [float("inf"), float("inf")]
            with torch.inference_mode():
                for _ in range(3):
                    for number, network in enumerate((model, twin)):
                        start = time.thread_time()
                        network(x[:128])
                        seconds[number] = min(seconds[number], time.thread_time() - start)
                dense, fake = _top(model, x), _top(twin, x)
            with tempfile.TemporaryDirectory() as place:
                export_onnx(twin, x[:2], Path(place) / "twin.onnx")
                parts = [run(Path(place) / "twin.onnx", part) for part in x.split(500)]
            real = torch.cat([output.argmax(1) for output, _ in parts])
            operators = parts[0][1]
            shares = [
                100 * (a == b).double().mean().item() for a, b in ((dense, y), (fake, y), (real, y), (real, fake))
            ]
            integer, floating = (sum(operators[kind] for kind in kinds) for kinds in (INTEGER, FLOAT))
            print(
                f"| {name} | {setting} | {' | '.join(f'{share:.2f}' for share in shares)} | "
                f"{integer} of {integer + floating} | {seconds[1] / seconds[0]:.2f} |",
                flush=True,
            )


def _top(network: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.cat([network(part).argmax(1) for part in x.split(500)])


if __name__ == "__main__":
    main()
