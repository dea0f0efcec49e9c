"""The SIMD kernel against the fastest dense engine: layers, whole networks, threads, and a figure.

    python -m tests.benchmarks.bench_simd [--rounds 9] [--output FILE.json] [--figure FILE.svg] [--from FILE.json]

One thread, alternatives in turn, minimum of the rounds. Dense is the fastest of PyTorch in both memory layouts and of
ONNX Runtime where it is installed. Networks run with the batch last where it can lie so, layers alone as images come.
Rates count only weights that are left; a layer's share of the dense rate is of what the dense engine reaches on the
same layer.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_prune.kernels import BSR, CHWN, CSR, NCHW, NHWC, SIMD, Dense, LayerKernel
from lightning_prune.kernels.batch_last import lies_last
from lightning_prune.latency.timing import keep_freed_memory
from lightning_prune.preparation import inputs_in_layout
from lightning_prune.runtime import assembled
from tests.benchmarks.harness import environment, write_json

LAYERS = {
    "16 -> 16, 3x3, 32x32": (16, 16, 3, 32),
    "64 -> 64, 3x3, 8x8": (64, 64, 3, 8),
    "256 -> 64, 1x1, 56x56": (256, 64, 1, 56),
    "128 -> 128, 3x3, 28x28": (128, 128, 3, 28),
    "256 -> 1024, 1x1, 14x14": (256, 1024, 1, 14),
    "512 -> 512, 3x3, 7x7": (512, 512, 3, 7),
}
SPARSITIES = (0.8, 0.9, 0.95)
CURVE = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
IN_CURVE = "128 -> 128, 3x3, 28x28"
Run = Callable[[], object]


def least(runs: Mapping[str, Run], rounds: int, least_s: float = 0.01) -> dict[str, float]:
    """Least seconds of each, in turn; each turn lasts a while, with one call to warm the caches."""
    best = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in runs.items():
                run()
                end = time.perf_counter() + least_s
                while (start := time.perf_counter()) < end or best[name] == float("inf"):
                    run()
                    best[name] = min(best[name], time.perf_counter() - start)
    return best


def onnx_run(model: nn.Module, x: Tensor, threads: int = 1) -> Run | None:
    """A call of ONNX Runtime, or None without it."""
    try:
        import onnxruntime
    except ImportError:
        return None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    fed = {"x": x.numpy()}
    return lambda: session.run(None, fed)


def dense_runs(model: nn.Module, x: Tensor, threads: int = 1) -> dict[str, Run]:
    """Every dense engine at hand."""
    runs: dict[str, Run] = {}
    for layout in (NCHW, NHWC) if x.ndim == 4 else (NCHW,):
        network = Dense(layout).build(model) if isinstance(model, nn.Conv2d) else assembled(model, x, {}, layout)
        lying = inputs_in_layout(x, layout)
        runs[f"torch {layout}"] = lambda network=network, lying=lying: network(lying)  # type: ignore[misc]
    if (session := onnx_run(model, x, threads)) is not None:
        runs["onnxruntime"] = session
    return runs


def layout_of(x: Tensor) -> str:
    """In which memory layout the SIMD kernel runs networks with such inputs."""
    return CHWN if lies_last(len(x), images=x.ndim == 4) else NCHW


def pruned(
    model: nn.Module, sparsity: float, magnitude: bool, only_pointwise: bool = False, layout: str = NCHW
) -> dict[str, LayerKernel]:
    """Set weights to zero, at random or the smallest of each layer; the kernels of the layers that have been pruned."""
    kernels: dict[str, LayerKernel] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if only_pointwise and (isinstance(layer, nn.Linear) or layer.kernel_size != (1, 1)):
            continue
        scores = layer.weight.detach().abs() if magnitude else torch.rand(layer.weight.shape)
        dropped = scores.flatten().argsort()[: round(sparsity * scores.numel())]
        layer.weight.data.view(-1)[dropped] = 0.0
        kernels[name] = SIMD(layout)
    return kernels


def check(run: Run, expected: Tensor, what: str) -> None:
    """Refuses to time a wrong answer."""
    with torch.inference_mode():
        found = run()
    assert isinstance(found, Tensor)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= 1e-4:
        raise SystemExit(f"{what}: relative error {error:.1e}")


def measure_layer(name: str, batch: int, sparsities: tuple[float, ...], others: bool, rounds: int) -> dict[str, Any]:
    inputs, outputs, window, size = LAYERS[name]
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, window, padding=window // 2).requires_grad_(False)
    x = torch.randn(batch, inputs, size, size)
    runs = dense_runs(layer, x)
    engines = list(runs)
    for sparsity in sparsities:
        sparse = copy.deepcopy(layer)
        pruned(sparse, sparsity, magnitude=False)
        kernels: list[LayerKernel] = [SIMD(), *([CSR(), BSR(4)] if others else [])]
        for kernel in kernels:
            given = sparse
            if isinstance(kernel, BSR):  # in blocks, as it wants them
                given = copy.deepcopy(layer)
                kept = torch.rand(outputs // 4, inputs // 4, 1, 1) >= sparsity
                given.weight.mul_(kept.repeat_interleave(4, 0).repeat_interleave(4, 1))
            built = kernel.build(given)
            runs[f"{kernel.name} {sparsity}"] = lambda built=built: built(x)  # type: ignore[misc]
            check(runs[f"{kernel.name} {sparsity}"], given(x), f"{name} {kernel.name} {sparsity}")
    seconds = least(runs, rounds)
    dense_s = min(seconds[engine] for engine in engines)
    macs = layer.weight.numel() * batch * size * size
    return {
        "layer": name,
        "batch": batch,
        "seconds": seconds,
        "dense_s": dense_s,
        "dense_flops_per_s": 2 * macs / dense_s,
        "speedups": {key: dense_s / value for key, value in seconds.items() if key not in engines},
    }


def resnet18() -> nn.Module:
    model: Any = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(1024, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18, CIFAR, B=16": (resnet18, (16, 3, 32, 32)),
    "ResNet-50, 224x224, B=1": (torchvision.models.resnet50, (1, 3, 224, 224)),
    "MobileNetV2, 224x224, B=1": (torchvision.models.mobilenet_v2, (1, 3, 224, 224)),
    "MLP 3 x 1024, B=64": (mlp, (64, 1024)),
}
POINTWISE = "MobileNetV2, 224x224, B=1"


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in eval mode whose BatchNorms are not those of a new one."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


def measure_network(name: str, rounds: int, threads: int = 1) -> dict[str, Any]:
    """A network at all sparsities, random and magnitude masks, against the dense one."""
    build, shape = NETWORKS[name]
    model, x = trained(build), torch.randn(shape)
    runs = dense_runs(model, x, threads)
    engines = list(runs)
    for sparsity in SPARSITIES:
        for masks in ("random", "magnitude"):
            sparse = trained(build)
            kernels = pruned(sparse, sparsity, masks == "magnitude", name == POINTWISE, layout_of(x))
            network = assembled(sparse, x, kernels, layout_of(x))
            runs[f"{masks} {sparsity}"] = lambda network=network: network(x)  # type: ignore[misc]
            check(runs[f"{masks} {sparsity}"], sparse(x), f"{name} {masks} {sparsity}")
    seconds = least(runs, rounds)
    dense_s = min(seconds[engine] for engine in engines)
    return {
        "network": name,
        "threads": threads,
        "seconds": seconds,
        "dense_s": dense_s,
        "speedups": {key: dense_s / value for key, value in seconds.items() if key not in engines},
    }


def measure_pointwise(rounds: int) -> dict[str, Any]:
    """The 1x1 convolutions of MobileNetV2, each alone, summed up."""
    model, shapes = trained(torchvision.models.mobilenet_v2), dict[nn.Conv2d, torch.Size]()
    x = torch.randn(1, 3, 224, 224)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.register_forward_hook(lambda m, args, y: shapes.__setitem__(m, args[0].shape))
    model(x)
    dense_s, sparse_s = 0.0, dict.fromkeys(SPARSITIES, 0.0)
    for layer, shape in shapes.items():
        layer._forward_hooks.clear()
        runs = dense_runs(layer, x := torch.randn(shape))
        engines = list(runs)
        for sparsity in SPARSITIES:
            sparse = copy.deepcopy(layer)
            pruned(sparse, sparsity, magnitude=False)
            built = SIMD().build(sparse)
            runs[str(sparsity)] = lambda built=built, x=x: built(x)  # type: ignore[misc]
        seconds = least(runs, rounds, 0.003)
        dense_s += min(seconds[engine] for engine in engines)
        for sparsity in SPARSITIES:
            sparse_s[sparsity] += seconds[str(sparsity)]
    return {
        "network": "1x1 layers of MobileNetV2, each alone",
        "dense_s": dense_s,
        "speedups": {f"random {sparsity}": dense_s / value for sparsity, value in sparse_s.items()},
    }


def measure_threads(rounds: int) -> dict[str, float]:
    """How many times faster two threads are than one, on whole networks at 90 %."""
    found = {}
    for name, (build, shape) in NETWORKS.items():
        model, x = trained(build), torch.randn(shape)
        kernels = pruned(model, 0.9, False, name == POINTWISE, layout_of(x))
        network = assembled(model, x, kernels, layout_of(x))
        best = {1: float("inf"), 2: float("inf")}
        for _ in range(2 * rounds):
            for threads in best:
                torch.set_num_threads(threads)
                best[threads] = min(best[threads], least({"": lambda network=network, x=x: network(x)}, 1)[""])  # type: ignore[misc]
        torch.set_num_threads(1)
        found[name] = best[1] / best[2]
    return found


def draw(curve: Mapping[str, Any], path: str | Path) -> None:
    """Speedup against sparsity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(CURVE, [1 / (1 - s) for s in CURVE], "k:", label="ceiling, 1 / (1 − s)")
    for kernel, label in (("simd", "SIMD"), ("bsr-4", "BSR, blocks of 4 x 4"), ("csr", "CSR")):
        axes.plot(CURVE, [curve["speedups"][f"{kernel} {s}"] for s in CURVE], "o-", markersize=4, label=label)
    axes.axhline(1.0, color="gray", linewidth=1, label="dense, the fastest engine")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    axes.set_yscale("log", base=2)
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set(xlabel="sparsity", ylabel="speedup over dense", title=f"{curve['layer']}, one image, one thread")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def show(results: Mapping[str, Any]) -> None:
    """Markdown tables."""
    print("| layer | batch | dense, GF/s |", " | ".join(f"{s:.0%}" for s in SPARSITIES), "| rate at 80 % |")
    print("|---|---|---|---|---|---|---|")
    for row in results["layers"]:
        speedups = [row["speedups"][f"simd {s}"] for s in SPARSITIES]
        rate = row["dense_flops_per_s"] / 1e9
        cells = " | ".join(f"{speedup:.1f}x" for speedup in speedups)
        print(f"| {row['layer']} | {row['batch']} | {rate:.0f} | {cells} | {0.2 * speedups[0]:.0%} of dense |")
    print("\n| network | dense, ms | masks |", " | ".join(f"{s:.0%}" for s in SPARSITIES), "|")
    print("|---|---|---|---|---|---|")
    for row in results["networks"]:
        for masks in ("random", "magnitude"):
            if f"{masks} {SPARSITIES[0]}" in row["speedups"]:
                cells = " | ".join(f"{row['speedups'][f'{masks} {s}']:.2f}x" for s in SPARSITIES)
                print(f"| {row['network']} | {row['dense_s'] * 1e3:.2f} | {masks} | {cells} |")
    for name, ratio in results.get("two_threads", {}).items():
        print(f"two threads, {name}, 90 %: {ratio:.2f}x of one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", action="store_true", help="compare two threads with one, too")
    parser.add_argument("--output", help="where to write the results as JSON")
    parser.add_argument("--figure", help="where to draw speedup against sparsity, .svg or .png")
    parser.add_argument("--from", dest="source", help="show and draw what --output wrote, without measuring")
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if options.source:
        results: dict[str, Any] = json.loads(Path(options.source).read_text())
    else:
        keep_freed_memory()
        torch.set_num_threads(1)
        results = {
            "benchmark": "simd",
            "environment": environment(),
            "rounds": options.rounds,
            "layers": [
                measure_layer(name, batch, SPARSITIES, False, options.rounds) for batch in (1, 16) for name in LAYERS
            ],
            "curve": measure_layer(IN_CURVE, 1, CURVE, True, options.rounds),
            "networks": [
                *(measure_network(name, options.rounds) for name in NETWORKS),
                measure_pointwise(options.rounds),
            ],
        }
        if options.threads:
            results["two_threads"] = measure_threads(options.rounds)
    show(results)
    if options.output:
        write_json(options.output, results)
    if options.figure:
        draw(results["curve"], options.figure)


if __name__ == "__main__":
    main()
