"""Exported twins run in ONNX Runtime, in integers, and give what the twin gives."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.quantization import export_onnx, quantize, quantized_layers
from lightning_prune.quantization.onnx_export import _fitting
from lightning_prune.zoo import CIFAR10, MNIST
from lightning_prune.zoo.datasets import TensorDataModule, data_folder
from tests.quantization.networks import WEIGHTS, mnist_network, resnet20
from tests.test_folding import trained

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort: Any = pytest.importorskip("onnxruntime")


def run(path: Path, *inputs: Tensor, optimised: bool = True) -> tuple[Tensor, Counter[str]]:
    """Result, and the operators that ran."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    (output,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return torch.from_numpy(output), Counter(node.op_type for node in nodes)


def content(path: Path) -> dict[str, Any]:
    """Initialisers by name."""
    return {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}


class Net(nn.Module):
    """Convolutions, one of them transposed, BatchNorm, and a dead filter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.down = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        y: Tensor = self.fc(self.down(self.up(x).relu()).mean((2, 3)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    trained(model)
    model.one.weight.data[3] = 0.0
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": True},
        {"bits": 4, "activation_bits": 6, "scheme": "symmetric", "per_channel": False},
        {"bits": 16},
    ],
    ids=str,
)
def test_what_the_twin_gives(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = net(), torch.randn(16, 3, 8, 8)
    twin = quantize(model, [x], **options)
    path = tmp_path / "deep" / "net.onnx"
    export_onnx(twin, x[:1], path)
    bits = options.get("bits", 8)
    container = np.uint8 if bits <= 8 else np.uint16
    kept = content(path)
    for name, layer in quantized_layers(twin).items():
        low = layer.quantizers.weight.quantizer.grid.low
        (stored,) = (value for key, value in kept.items() if key.endswith(f"{name}.weight_integers"))
        assert stored.dtype == container
        assert np.array_equal(stored, layer.integer_weight().numpy() - low)
        assert stored.max() < 2**bits
    with torch.no_grad():
        expected = twin(x)
    step = 3 / 2 ** options.get("activation_bits", bits) * expected.abs().max()
    for optimised in (False, True):
        result, operators = run(path, x, optimised=optimised)
        assert (result - expected).abs().max() < step
        assert (result - expected).abs().median() < 1e-4
        nodes = {"QuantizeLinear", "DequantizeLinear"}
        assert nodes < set(operators)
    if options.get("outputs"):
        assert operators["QLinearConv"] == 2
        assert operators["QGemm"] == 1
        assert operators["Conv"] + operators["FusedConv"] + operators["Gemm"] == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]
    assert all(entry.suffix == ".onnx" for entry in path.parent.iterdir())


def test_widths_of_their_own_and_a_layer_in_floating_point(tmp_path: Path) -> None:
    model, x = net(), torch.randn(16, 3, 8, 8)
    twin = quantize(model, [x], 6, exclude="up", first_bits=8, last_bits=16)
    path = tmp_path / "net.onnx"
    export_onnx(twin, x[:1], path)
    kinds = {key.rpartition(".")[0]: value.dtype for key, value in content(path).items() if "weight_integers" in key}
    assert {key.rpartition(".")[2]: kind for key, kind in kinds.items()} == {
        "one": np.uint8,
        "down": np.uint8,
        "fc": np.uint16,
    }
    result, operators = run(path, x, optimised=False)
    assert operators["ConvTranspose"] == 1
    with torch.no_grad():
        expected = twin(x)
    assert (result - expected).abs().max() < 3 / 63 * expected.abs().max()
    assert (result - expected).abs().median() < 1e-3


class Linears(nn.Module):
    """Two inputs; sums that leave 16 bits, and a bias that its weights are too small for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 2), nn.Linear(4, 4)
        self.a.weight.data = torch.ones(2, 64) * torch.tensor([[1.0], [-1.0]])
        self.a.bias.data.zero_()
        self.b.weight.data = torch.randn(4, 4) * torch.tensor([[1.0], [1e-14], [0.0], [1.0]])
        self.b.bias.data = torch.tensor([0.5, 3.0, 0.12345, 0.0])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(input=y)], 1)


def test_sums_biases_and_inputs_by_position_and_the_twin_is_not_changed(tmp_path: Path) -> None:
    """With signed weights in ONNX Runtime sums saturate, on processors without VNNI."""
    torch.manual_seed(0)
    seen = torch.cat([torch.full((3, 64), -1.0), torch.ones(3, 64)]), torch.randn(6, 4)
    twin = quantize(Linears(), [seen], 8, "symmetric", forward=lambda model, batch: model(*batch))
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    modules = list(twin.modules())
    path, x, y = tmp_path / "layers.onnx", torch.ones(6, 64), seen[1]
    export_onnx(twin, (x[:1], y[:1]), path)
    expected = twin(x, y)
    for optimised in (False, True):
        result, operators = run(path, x, y, optimised=optimised)
        assert (result - expected).abs().max() < 1e-4
    assert operators["QGemm"] == 2
    assert torch.equal(expected[:, 4], torch.full((6,), 0.12345))
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert list(twin.modules()) == modules
    assert before.keys() == twin.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_inputs_by_name_and_a_fixed_batch(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.a(x) + y

    x, y = torch.randn(5, 4), torch.randn(5, 3)
    twin = quantize(Two(), [{"x": x, "y": y}])
    path = tmp_path / "fixed.onnx"
    export_onnx(twin, {"x": x, "y": y}, path, dynamic_batch=False)
    assert (run(path, x, y)[0] - twin(x, y)).abs().max() < 0.02
    assert not onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_steps_grow_only_where_they_must() -> None:
    weight = torch.tensor([[1.0], [1e-12], [0.0], [0.0]])
    step, bias, input_step = torch.full((4,), 1e-13), torch.tensor([0.0, 4.0, 2.0, 0.0]), torch.tensor(0.5)
    assert _fitting(step, weight, bias, input_step).tolist() == pytest.approx([1e-13, 2.0**-27, 2.0**-28, 1e-13])
    assert _fitting(step[:1], weight, bias, input_step).item() == 2.0**-27


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class OfBatchTwo(Branching):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x).reshape(2, 3)


def test_what_is_refused_leaves_the_file_that_was(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"old")
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"Linear has no quantised layer; export what quantize\(\) returned"):
        export_onnx(nn.Linear(3, 2), x, path)
    with pytest.raises(ValueError, match=r"Branching cannot be traced for ONNX: .*\n.*control flow depends on values"):
        export_onnx(quantize(Branching(), [x]), x, path)
    with pytest.raises(
        ValueError, match=r"forward of OfBatchTwo fixes the first dimension of x, .*dynamic_batch=False"
    ):
        export_onnx(quantize(OfBatchTwo(), [x]), x, path)
    with pytest.raises(ValueError, match=r"layer '0' has weights of torch.float64; only float32 can be exported"):
        export_onnx(quantize(nn.Sequential(nn.Linear(3, 2)).double(), [x.double()]), x.double(), path)
    grouped = quantize(nn.Sequential(nn.ConvTranspose1d(4, 4, 1, groups=2)), [torch.ones(2, 4, 3)])
    with pytest.raises(ValueError, match=r"layer '0' is a transposed convolution of 2 groups.*per_channel=False"):
        export_onnx(grouped, torch.ones(2, 4, 3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = quantize(nn.Linear(3, 2), [torch.ones(2, 3)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        export_onnx(twin, torch.ones(1, 3), tmp_path / "x.onnx")


def agreement(model: nn.Module, data: TensorDataModule, count: int, path: Path) -> tuple[float, ...]:
    """Share of equal top-1; accuracies of the model, the twin and ONNX Runtime."""
    x, y = data._sets["test"].__getitems__(list(range(count)))
    seen, _ = data._sets["train"].__getitems__(list(range(128)))
    twin = quantize(model, [seen])
    export_onnx(twin, x[:2], path)
    with torch.inference_mode():
        dense, fake = model(x).argmax(1), twin(x).argmax(1)
    real = run(path, x)[0].argmax(1)
    return tuple(same.double().mean().item() for same in (real == fake, dense == y, fake == y, real == y))


# The whole test sets, and more settings, are in benchmarks/bench_int8.py.


@pytest.mark.skipif(not (data_folder() / "MNIST/raw").is_dir(), reason="no MNIST below LIGHTNING_PRUNE_DATA")
def test_mnist_in_integers(tmp_path: Path) -> None:
    data = MNIST(batch_size=64, download=False)
    data.setup("fit")
    same, dense, fake, real = agreement(mnist_network(data, 200), data, 1000, tmp_path / "mnist.onnx")
    assert dense > 0.95
    assert same >= 0.995
    assert abs(fake - real) <= 0.001
    assert fake >= dense - 0.005


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no pretrained ResNet-20 below LIGHTNING_PRUNE_DATA")
def test_resnet20_in_integers(tmp_path: Path) -> None:
    data = CIFAR10("lossless_subset", augment=False, download=False)
    data.setup("test")
    same, dense, fake, real = agreement(resnet20(), data, 150, tmp_path / "resnet.onnx")
    assert dense > 0.88
    assert same > 1 - 1.5 / 150  # a picture between two classes may go either way
    assert abs(fake - real) <= 1 / 150 + 1e-9
    assert dense - fake <= 0.01
