"""What every kernel promises."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
import math
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import NM, Block, Unstructured, kernels
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import LAYOUTS, SIMD, Int8, LayerKernel, Workload, expected_occupancy
from lightning_prune.kernels.batch_last import batch_last
from lightning_prune.kernels.int8 import unavailable
from lightning_prune.quantization.quantizers import Quantizer
from lightning_prune.quantization.schemes import Grid
from tests.contracts.tables import KERNELS, defined
from tests.latency.profiles import workload_of

CPU = torch.device("cpu")
Layer: TypeAlias = nn.Linear | nn.Conv2d

every = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def test_table_is_complete() -> None:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    classes = {kind for module in modules for kind in defined(module, LayerKernel) if not inspect.isabstract(kind)}
    assert {type(kernel) for kernel in KERNELS} == classes
    assert {kind.__name__ for kind in classes} <= set(kernels.__all__)


def test_names_under_which_profiles_are_kept() -> None:
    assert [kernel.name for kernel in kernels.KERNELS] == [
        "dense",
        "dense-nhwc",
        "dense-chwn",
        "simd",
        "simd-chwn",
        "csr",
        "bsr-4",
        "bsr-8",
        "bsr-16",
        "shrunk",
        "shrunk-nhwc",
        "semi-structured",
    ]
    assert [kernel.name for kernel in kernels.QUANTIZED_KERNELS] == ["int8", "int8-nhwc"]
    assert len({kernel.name for kernel in KERNELS}) == len(set(KERNELS)) == len(KERNELS)


@dataclass
class Case:
    """A layer and an input for it."""

    layer: Layer
    x: Tensor

    def __repr__(self) -> str:
        zeros = (self.layer.weight == 0).double().mean().item()
        return f"{self.layer} x={tuple(self.x.shape)} strides={self.x.stride()} zeros={zeros:.2f}"


def exact(layer: Layer, x: Tensor) -> tuple[Tensor, float]:
    """The layer's result in float64, and the magnitude of what was added up in it."""
    precise, positive = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
        y: Tensor = precise(x.double().contiguous())
        return y, float(positive(x.double().abs().contiguous()).max()) if y.numel() else 0.0


def assert_right(y: Tensor, layer: Layer, x: Tensor, tolerance: float = 1e-5) -> None:
    expected, magnitude = exact(layer, x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert float((y.double() - expected).abs().max()) <= tolerance * magnitude if y.numel() else True


def meant(kernel: LayerKernel, layer: Layer, x: Tensor) -> tuple[Layer, Tensor]:
    """The layer and the input that a kernel's result is exact for: rounded ones of those that round."""
    if kernel.exact or not x.numel():
        return layer, x
    rounded = copy.deepcopy(layer)
    weight = Quantizer(Grid(7, "symmetric"), len(layer.weight))
    weight.cover(*layer.weight.detach().flatten(1).aminmax(dim=1))
    rounded.weight = nn.Parameter(weight(layer.weight.detach()))
    inputs = Quantizer(Grid())
    inputs.cover(*(bound.view(1) for bound in x.aminmax()))
    return rounded, inputs(x)


def zeros_in(weight: Tensor, pattern: str, sparsity: float, generator: torch.Generator) -> None:
    """Set weights to zero."""
    out, inputs, *window = weight.shape
    shape = {
        "weights": weight.shape,
        "rows": (out, 1, *[1] * len(window)),
        "columns": (1, inputs, *[1] * len(window)),
        "blocks": (-(-out // 4), -(-inputs // 4), *window),
    }[pattern]
    kept = torch.rand(shape, generator=generator) >= sparsity
    if pattern == "blocks":
        kept = kept.repeat_interleave(4, 0).repeat_interleave(4, 1)[:out, :inputs]
    with torch.no_grad():
        weight.mul_(kept)


@st.composite
def cases(draw: Any, unit: int) -> Case:
    """Any layer and input that PyTorch runs; channels are mostly multiples of a unit."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    counts = st.integers(1, 9) if unit == 1 else st.integers(1, 3)
    inputs, outputs = (unit * draw(counts), unit * draw(counts)) if draw(st.integers(0, 3)) else draw(pair(1, 9))
    bias = draw(st.booleans())
    strided = draw(st.booleans())
    layer: Layer
    if draw(st.booleans()):
        layer = nn.Linear(inputs, outputs, bias)
        lead = draw(st.sampled_from([(), (1,), (2,), (7,), (16,), (2, 3), (2, 4), (1, 1), (0,), (2, 0, 3)]))
        whole = torch.randn(*lead, inputs * 2, generator=generator)
        x = whole[..., ::2] if strided else whole[..., :inputs].contiguous()
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, inputs]))
        if groups == inputs:
            outputs = inputs * draw(st.sampled_from([1, 1, 2]))
        elif inputs % groups or outputs % groups:
            groups = 1
        window, dilation = draw(pair(1, 3)), draw(pair(1, 2))
        stride = draw(pair(1, 3))
        padding: Any = draw(st.sampled_from(["same", "valid", (0, 0), (1, 1), (0, 2), (2, 1)]))
        if padding == "same":
            stride = (1, 1)
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        layer = nn.Conv2d(inputs, outputs, window, stride, padding, dilation, groups, bias, mode)
        least = [max(3, d * (w - 1) + 1) for d, w in zip(dilation, window, strict=True)]
        size = [low + draw(st.integers(0, 5)) for low in least]
        lead = draw(st.sampled_from([(), (1,), (2,), (3,), (8,)]))
        whole = torch.randn(*lead, inputs, size[0], size[1] * 2, generator=generator)
        x = whole[..., ::2] if strided else whole[..., : size[1]].contiguous()
        if x.ndim == 4:
            x = draw(st.sampled_from([x, x.to(memory_format=torch.channels_last), batch_last(x)]))
        if draw(st.booleans()):
            layer = layer.to(memory_format=torch.channels_last)
    pattern = draw(st.sampled_from(["weights", "rows", "columns", "blocks"]))
    zeros_in(layer.weight, pattern, draw(st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0])), generator)
    return Case(layer, x)


def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def runs(kernel: LayerKernel, layer: Layer, x: Tensor) -> bool:
    sample = x if x.numel() else x.new_zeros(1, layer.weight.shape[1])
    return kernel.refuses(workload_of(layer, sample), x.dtype, CPU) is None


@every
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=60)
@given(data=st.data())
def test_result_is_the_layers(kernel: LayerKernel, data: st.DataObject) -> None:
    case = data.draw(cases(getattr(kernel, "size", 1)))
    if runs(kernel, case.layer, case.x):
        before = case.x.clone()
        with torch.no_grad():
            assert_right(kernel.build(case.layer)(case.x), *meant(kernel, case.layer, case.x))
        assert torch.equal(case.x, before)


def linear(rows: int = 3) -> tuple[Layer, Tensor]:
    return nn.Linear(64, 32), torch.randn(rows, 64)


def convolution(**options: Any) -> tuple[Layer, Tensor]:
    return nn.Conv2d(32, 64, 3, **options), torch.randn(2, 32, 7, 7)


SAMPLES: dict[str, Callable[[], tuple[Layer, Tensor]]] = {
    "linear": linear,
    "one row": lambda: linear(1),
    "sequence": lambda: (nn.Linear(32, 32, bias=False), torch.randn(2, 5, 32)),
    "rows that fill vectors": lambda: linear(16),
    "conv": convolution,
    "images that fill vectors": lambda: (nn.Conv2d(32, 64, 3, padding=1), torch.randn(8, 32, 7, 7)),
    "strided images that fill vectors": lambda: (nn.Conv2d(32, 64, 3, stride=2), torch.randn(16, 32, 7, 7)),
    "strided conv": lambda: convolution(stride=2, padding=1, bias=False),
    "same conv": lambda: convolution(padding="same", padding_mode="circular"),
    "pointwise": lambda: (nn.Conv2d(32, 32, 1), torch.randn(2, 32, 5, 5)),
    "one pixel": lambda: (nn.Conv2d(32, 32, 1), torch.randn(1, 32, 1, 1)),
    "depthwise": lambda: (nn.Conv2d(32, 32, 3, groups=32), torch.randn(2, 32, 7, 7)),
    "grouped": lambda: (nn.Conv2d(32, 64, 3, groups=4), torch.randn(2, 32, 7, 7)),
}


def sampled(name: str) -> tuple[Layer, Tensor]:
    """A layer with most of its filters and some more weights removed, and an input."""
    torch.manual_seed(0)
    layer, x = SAMPLES[name]()
    generator = torch.Generator().manual_seed(0)
    zeros_in(layer.weight, "rows", 0.5, generator)
    zeros_in(layer.weight, "blocks", 0.5, generator)
    return layer, x


# Which of them runs which layer on a CPU is for `test_who_refuses_what`.
RUNNING = [(kernel, name) for kernel in KERNELS for name in SAMPLES if runs(kernel, *sampled(name))]


@pytest.mark.parametrize(("kernel", "name"), RUNNING, ids=lambda value: getattr(value, "name", value))
class TestBuilt:
    @pytest.fixture
    def sample(self, name: str) -> tuple[Layer, Tensor]:
        return sampled(name)

    @pytest.fixture
    def built(self, kernel: LayerKernel, sample: tuple[Layer, Tensor]) -> nn.Module:
        return kernel.build(sample[0])

    def test_copies_give_the_same(self, built: nn.Module, sample: tuple[Layer, Tensor], kernel: LayerKernel) -> None:
        layer, x = sample
        y = built(x)
        assert torch.equal(copy.deepcopy(built)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(built))(x), y)
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight.mul_(2.0)
        twice = kernel.build(other)
        assert not torch.equal(twice(x), y)
        saved = io.BytesIO()
        torch.save(built.state_dict(), saved)
        saved.seek(0)
        twice.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(twice(x), y)

    def test_runs_in_several_threads_at_once(self, built: nn.Module, sample: tuple[Layer, Tensor]) -> None:
        inputs = [torch.randn_like(sample[1]) for _ in range(8)]

        def without_gradients(x: Tensor) -> Tensor:
            with torch.no_grad():  # which is a thread's own
                y: Tensor = built(x)
                return y

        expected = [without_gradients(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(without_gradients, inputs * 5))
        assert all(torch.equal(a, b) for a, b in zip(results, expected * 5, strict=True))

    def test_a_result_outlives_the_next_call(self, built: nn.Module, sample: tuple[Layer, Tensor]) -> None:
        y = built(sample[1])
        before = y.clone()
        y2 = built(sample[1] + 1.0)
        assert torch.equal(y, before)
        y.fill_(math.nan)
        assert not y2.isnan().any()
        assert torch.equal(built(sample[1]), before)

    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_takes_other_batches(
        self, kernel: LayerKernel, built: nn.Module, sample: tuple[Layer, Tensor], batch: int
    ) -> None:
        layer, x = sample
        x = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            assert_right(built(x), *meant(kernel, layer, x))

    def test_takes_other_image_sizes(self, kernel: LayerKernel, built: nn.Module, sample: tuple[Layer, Tensor]) -> None:
        layer, x = sample
        if x.ndim == 4:
            with torch.no_grad():
                for size in (4, 9):
                    x = torch.randn(2, x.shape[1], size, size + 1)
                    assert_right(built(x), *meant(kernel, layer, x))

    def test_leaves_the_layer_alone(self, kernel: LayerKernel, sample: tuple[Layer, Tensor]) -> None:
        layer, x = sample
        layer(x).sum().backward()
        before = {name: (value, value.clone(), value._version) for name, value in layer.named_parameters()}
        strides, state = layer.weight.stride(), torch.get_rng_state()
        built = kernel.build(layer)
        built(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert layer.weight.stride() == strides
        for name, value in layer.named_parameters():
            same, values, version = before[name]
            assert value is same
            assert value.requires_grad
            assert value.grad is not None
            assert value._version == version
            assert torch.equal(value, values)
        own = [*built.parameters(), *built.buffers()]
        assert not any(tensor.requires_grad or tensor.grad is not None for tensor in own)
        theirs = {value.untyped_storage().data_ptr() for value in layer.parameters()}
        assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in own}

    def test_double_precision(self, kernel: LayerKernel, sample: tuple[Layer, Tensor]) -> None:
        layer, x = sample[0].double(), sample[1].double()
        if isinstance(kernel, SIMD | Int8):
            assert "float32, not torch.float64" in str(kernel.refuses(workload_of(layer, x), torch.float64, CPU))
            return
        assert runs(kernel, layer, x)
        with torch.no_grad():
            assert_right(kernel.build(layer)(x), layer, x, 1e-13)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
    def test_half_precision(
        self, kernel: LayerKernel, sample: tuple[Layer, Tensor], dtype: torch.dtype, tolerance: float
    ) -> None:
        layer, x = sample[0].to(dtype), sample[1].to(dtype)
        work = workload_of(layer, x)
        reason = kernel.refuses(work, dtype, CPU)
        if reason is None:
            with torch.no_grad():
                assert_right(kernel.build(layer)(x), layer, x, tolerance)
        else:
            assert str(dtype) in reason


WORKLOADS = [
    Workload("linear", 1, 64, 64),
    Workload("linear", 40, 64, 96),
    Workload("conv2d", 1, 32, 64, (1, 1), (1, 1)),
    Workload("conv2d", 3, 32, 64, (14, 14), (14, 14), (3, 3), padding=(1, 1)),
    Workload("conv2d", 2, 64, 32, (8, 9), (8, 9)),
    Workload("conv2d", 1, 32, 32, (9, 9), (4, 4), (3, 3), (2, 2), groups=32),
    Workload("conv2d", 1, 32, 64, (9, 9), (4, 4), (3, 3), (2, 2), groups=4),
]


@every
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
class TestFeatures:
    def test_are_finite_and_not_negative(self, kernel: LayerKernel, work: Workload) -> None:
        sparsity = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
        living = torch.tensor([1.0, 0.5, 0.0])[:, None]
        left = expected_occupancy(Unstructured(), sparsity, work.weight_shape, living)
        for name, value in kernel.features(work, left).items():
            values = torch.as_tensor(value, dtype=torch.float64)
            possible = left.density <= 1.0 - kernel.granularity.sparsity if isinstance(kernel.granularity, NM) else True
            assert (torch.isfinite(values) | ~torch.as_tensor(possible)).all(), name
            assert (values >= 0).all(), name
        for name, value in kernel.coordinates(work, left).items():
            assert torch.isfinite(torch.as_tensor(value)).all(), name

    @pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1)], ids=repr)
    def test_of_many_are_those_of_each(self, kernel: LayerKernel, work: Workload, pattern: Granularity) -> None:
        sparsity = torch.linspace(0, 1, 12, dtype=torch.float64).view(2, 3, 2)
        living = torch.linspace(1, 0.2, 3, dtype=torch.float64)[:, None]
        left = expected_occupancy(pattern, sparsity, work.weight_shape, living)
        for terms in (kernel.features, kernel.coordinates):
            many = terms(work, left)
            for i, j, k in itertools.product(range(2), range(3), range(2)):
                one = terms(work, expected_occupancy(pattern, sparsity[i, j, k], work.weight_shape, living[j, 0]))
                assert one.keys() == many.keys()
                for name, value in one.items():
                    whole = torch.as_tensor(many[name], dtype=torch.float64).expand(sparsity.shape)
                    assert float(value) == pytest.approx(float(whole[i, j, k]), rel=1e-12), name

    def test_depend_on_sparsity_as_declared(self, kernel: LayerKernel, work: Workload) -> None:
        some, more = (
            kernel.features(work, expected_occupancy(kernel.granularity, torch.tensor(s), work.weight_shape))
            for s in (0.1, 0.9)
        )
        differ = {name for name in some if float(more[name]) != float(some[name])}
        assert kernel.uses_sparsity or not differ
        if kernel.refuses(work, torch.float32, CPU) is None:
            assert bool(differ) == kernel.uses_sparsity


def test_who_refuses_what() -> None:
    refused: dict[str, set[str]] = {}
    for kernel in KERNELS:
        refused[kernel.name] = {name for name in SAMPLES if (kernel, name) not in RUNNING}
    linear, grouped = {"linear", "one row", "sequence", "rows that fill vectors"}, {"depthwise", "grouped"}
    filling = {name for name in SAMPLES if "fill vectors" in name}
    assert refused == {
        "dense": set(),
        "dense-nhwc": linear,
        "dense-chwn": (set(SAMPLES) - filling) | linear,
        "simd": set() if kernels.native.unavailable() is None else set(SAMPLES),
        "simd-chwn": set(SAMPLES) - (filling if kernels.native.unavailable() is None else set()),
        "csr": grouped,
        **{f"bsr-{size}": grouped for size in (2, 4, 8, 16, 32)},
        "shrunk": {"grouped"},
        "shrunk-nhwc": {"grouped", *linear},
        "semi-structured": set(SAMPLES),
        "int8": set() if unavailable() is None else set(SAMPLES),
        "int8-nhwc": linear if unavailable() is None else set(SAMPLES),
    }


@every
def test_is_a_value_with_a_known_layout(kernel: LayerKernel) -> None:
    again = copy.deepcopy(kernel)
    assert again == kernel
    assert hash(again) == hash(kernel)
    assert kernel != kernel.name
    assert kernel.layout in LAYOUTS
    assert kernel.name in repr(kernel)
    assert pickle.loads(pickle.dumps(kernel)) == kernel


@every
def test_reasons_name_what_does_not_fit(kernel: LayerKernel) -> None:
    named = {
        Workload("linear", 9, 30, 34): ("30", "34", "linear", "of 9"),
        Workload("conv2d", 9, 34, 30, (4, 4), (4, 4)): ("34", "30", "conv2d", "of 9"),
        Workload("conv2d", 9, 36, 36, (4, 4), (4, 4), groups=3): ("3 groups", "36", "conv2d", "of 9"),
        Workload("conv2d", 9, 32, 32, (4, 4), (4, 4), groups=32): ("32 groups", "conv2d", "of 9"),
    }
    for work, values in named.items():
        for dtype in (torch.float32, torch.float16, torch.int8):
            for device in (CPU, torch.device("mps"), torch.device("meta")):
                reason = kernel.refuses(work, dtype, device)
                if reason is not None:
                    assert any(value in reason for value in (*values, str(dtype), device.type)), reason


def test_nobody_hears_what_torch_says_once() -> None:
    built = pickle.dumps([kernels.CSR().build(nn.Linear(8, 8)), kernels.Int8().build(nn.Conv2d(3, 8, 1))])
    code = """if True:
        import pickle, sys, warnings
        import torch
        warnings.resetwarnings()
        warnings.simplefilter("error")
        before = list(warnings.filters)
        matrix, integers = pickle.load(sys.stdin.buffer)
        assert warnings.filters == before, warnings.filters
        matrix(torch.ones(3, 8))
        from lightning_prune.kernels import BSR, Int8
        from lightning_prune.kernels.int8 import unavailable
        if unavailable() is None:
            integers(torch.ones(1, 3, 8, 8))
            Int8().build(torch.nn.Linear(8, 8))(torch.ones(3, 8))
        BSR(4).build(torch.nn.Linear(8, 8))(torch.ones(3, 8))
    """
    run = subprocess.run([sys.executable, "-c", code], input=built, capture_output=True, check=False)
    assert (run.returncode, run.stderr.decode()) == (0, "")
