"""Accuracy of twins and of their ONNX files in ONNX Runtime, on whole test sets, as Markdown rows.

Run with `python -m tests.benchmarks.bench_int8`; `LIGHTNING_PRUNE_DATA` names the data.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lightning_prune.quantization import AveragedMinMax, MeanSquaredError, Percentile, export_onnx, quantize
from lightning_prune.zoo import CIFAR10, MNIST
from tests.quantization.networks import mnist_network, resnet20
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


def main() -> None:
    torch.set_num_threads(1)
    print("| network | setting | fp32 | twin | ORT | same top-1 | integer layers | twin / dense time |")
    print("|---|---|---|---|---|---|---|---|")
    digits, photos = MNIST(batch_size=64, download=False), CIFAR10("lossless_subset", augment=False, download=False)
    digits.setup("fit")
    photos.setup("test")
    networks: Any = (
        ("MNIST", mnist_network(digits, 800), digits, 10_000, MNIST_SETTINGS),
        ("ResNet-20", resnet20(), photos, 1017, CIFAR_SETTINGS),
    )
    for name, model, data, count, settings in networks:
        x, y = data._sets["test"].__getitems__(list(range(count)))
        seen, _ = data._sets["train"].__getitems__(list(range(512)))
        for options in settings:
            twin = quantize(model, seen.split(128), **options)
            seconds = [float("inf"), float("inf")]
            with torch.inference_mode():
                for _ in range(3):
                    for place, network in enumerate((model, twin)):
                        start = time.thread_time()
                        network(x[:128])
                        seconds[place] = min(seconds[place], time.thread_time() - start)
                dense, fake = model(x).argmax(1), twin(x).argmax(1)
            with tempfile.TemporaryDirectory() as folder:
                export_onnx(twin, x[:2], Path(folder) / "twin.onnx")
                output, operators = run(Path(folder) / "twin.onnx", x)
            real = output.argmax(1)
            shares = [
                100 * (a == b).double().mean().item() for a, b in ((dense, y), (fake, y), (real, y), (real, fake))
            ]
            integer, floating = (sum(operators[kind] for kind in kinds) for kinds in (INTEGER, FLOAT))
            print(
                f"| {name} | {options} | {' | '.join(f'{share:.2f}' for share in shares)} | "
                f"{integer} of {integer + floating} | {seconds[1] / seconds[0]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
