"""Workloads, what is left of weights, and what single kernels promise beside the contracts."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import NM, Block, Channel, Filter, Kernel, Unstructured, Vector, layer_table
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import (
    BSR,
    CSR,
    Dense,
    SemiStructured,
    Shrunk,
    Workload,
    expected_occupancy,
    measured_occupancy,
    workloads,
)
from lightning_prune.kernels.kernel import LayerKernel
from lightning_prune.kernels.matrix import MatrixConv2d, MatrixLinear
from lightning_prune.kernels.shrunk import ShrunkLayer
from lightning_prune.masks import Part, masks
from tests.latency.profiles import workload_of


class TestWorkload:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"kind": "conv1d"}, "a workload is 'linear' or 'conv2d', got kind='conv1d'"),
            ({"batch": 0}, "batch=0"),
            ({"inputs": -4}, "inputs=-4"),
            ({"outputs": 1.5}, "outputs=1.5"),
            ({"groups": True}, "groups=True"),
            ({"window": (0, 3)}, r"at least 1 \(padding 0\), got .*window=\(0, 3\)"),
            ({"padding": (0, -1)}, r"padding=\(0, -1\)"),
            ({"stride": (0, 1)}, r"stride=\(0, 1\)"),
            ({"dilation": 2}, "pairs of height and width, got .*dilation=2"),
            ({"input_size": (4, 4, 4)}, r"pairs of height and width, got .*input_size=\(4, 4, 4\)"),
            ({"groups": 3}, "3 groups do not divide both 6 inputs and 8 outputs"),
            ({"kind": "linear"}, "linear layers have batch, inputs and outputs alone, got .*input_size"),
        ],
    )
    def test_shapes_that_no_layer_has(self, changes: dict[str, Any], message: str) -> None:
        fields: dict[str, Any] = {"kind": "conv2d", "batch": 1, "inputs": 6, "outputs": 8, "input_size": (4, 4)}
        Workload(**fields)
        with pytest.raises(ValueError, match=message):
            Workload(**{**fields, **changes})

    @given(data=st.data())
    def test_names_are_unique(self, data: st.DataObject) -> None:
        one, other = data.draw(small_workloads()), data.draw(small_workloads())
        assert (str(one) == str(other)) == (one == other)

    @given(data=st.data())
    def test_survives_json(self, data: st.DataObject) -> None:
        work = data.draw(small_workloads())
        again = Workload.from_dict(json.loads(json.dumps(work.as_dict())))
        assert again == work
        assert hash(again) == hash(work)

    def test_json_holds_what_is_not_usual(self) -> None:
        assert Workload("linear", 2, 3, 4).as_dict() == {"kind": "linear", "batch": 2, "inputs": 3, "outputs": 4}

    @pytest.mark.parametrize(
        "data",
        [{"kind": "linear"}, {"kind": "linear", "batch": 1, "inputs": 2, "outputs": 3, "colour": 4}, {"batch": "1"}],
    )
    def test_json_of_something_else(self, data: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"not a layer call: {re.escape(repr(data))}"):
            Workload.from_dict(data)

    @settings(max_examples=50)
    @given(data=st.data())
    def test_counts_are_those_of_the_layer(self, data: st.DataObject) -> None:
        work = data.draw(real_workloads())
        layer = work.layer()
        x = torch.zeros(work.input_shape())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = layer(x)
        assert counter.get_total_flops() == 2 * work.macs
        assert tuple(layer.weight.shape) == work.weight_shape
        assert (layer.weight.numel(), x.numel(), y.numel()) == (work.weights, work.input_elements, work.output_elements)
        assert work.positions == y.numel() // work.outputs
        (spec,) = layer_table(layer, x)
        assert workloads(spec) == (work,)
        assert workload_of(layer, x) == work
        assert spec.macs == work.macs

    def test_pointwise_convolutions_are_products_as_they_lie(self) -> None:
        def pointwise(**options: Any) -> bool:
            return Workload("conv2d", 1, 4, 4, (5, 5), (5, 5), **options).pointwise

        assert pointwise()
        assert not pointwise(window=(1, 2))
        assert not pointwise(stride=(2, 1))
        assert not pointwise(padding=(0, 1))

    @pytest.mark.parametrize(
        ("model", "shape", "works"),
        [
            (nn.Linear(4, 3), (4,), [Workload("linear", 1, 4, 3)]),
            (nn.Linear(4, 3), (2, 5, 4), [Workload("linear", 10, 4, 3)]),
            (nn.Conv2d(2, 4, 3), (2, 5, 6), [Workload("conv2d", 1, 2, 4, (5, 6), (3, 4), (3, 3))]),
            (
                nn.Conv2d(2, 4, 3, padding="same", dilation=2),
                (1, 2, 5, 6),
                [Workload("conv2d", 1, 2, 4, (5, 6), (5, 6), (3, 3), padding=(2, 2), dilation=(2, 2))],
            ),
            (
                nn.Conv2d(2, 4, 3, padding="valid", stride=(1, 2)),
                (1, 2, 5, 6),
                [Workload("conv2d", 1, 2, 4, (5, 6), (3, 2), (3, 3), (1, 2))],
            ),
        ],
        ids=str,
    )
    def test_of_calls(self, model: nn.Module, shape: tuple[int, ...], works: list[Workload]) -> None:
        (spec,) = layer_table(model, torch.zeros(shape))
        assert list(workloads(spec)) == works

    def test_of_a_layer_called_twice(self) -> None:
        layer = nn.Linear(4, 4)
        (spec,) = layer_table(nn.Sequential(layer, nn.Flatten(0, 1), layer), torch.zeros(2, 3, 4))
        assert workloads(spec) == (Workload("linear", 6, 4, 4),) * 2

    @pytest.mark.parametrize(
        ("model", "x", "message"),
        [
            (nn.Conv1d(2, 4, 3), torch.zeros(1, 2, 9), "weight: no kernel runs conv1d layers"),
            (nn.ConvTranspose2d(2, 4, 3), torch.zeros(1, 2, 9, 9), "no kernel runs conv_transpose2d layers"),
            (nn.Embedding(5, 4), torch.zeros(3, dtype=torch.int64), "no kernel runs embedding layers"),
            (nn.Linear(4, 3), torch.zeros(0, 4), r"weight: called with an empty input of shape \(0, 4\); give a batch"),
            (nn.Conv2d(2, 4, 3), torch.zeros(0, 2, 9, 9), r"empty input of shape \(0, 2, 9, 9\)"),
        ],
        ids=str,
    )
    def test_of_calls_without_kernels(self, model: nn.Module, x: Tensor, message: str) -> None:
        (spec,) = layer_table(model, x)
        with pytest.raises(ValueError, match=message):
            workloads(spec)


def small_workloads() -> st.SearchStrategy[Workload]:
    """From so few that two are often nearly the same."""
    few = st.integers(1, 2)
    pairs = st.tuples(few, few)
    linear = st.builds(Workload, st.just("linear"), few, few, few)
    padding = st.tuples(st.integers(0, 1), st.integers(0, 1))

    def convolution(groups: int, batch: int, inputs: int, outputs: int, sizes: Any) -> Workload:
        fields: tuple[Any, ...] = ("conv2d", batch, inputs * groups, outputs * groups, *sizes, groups)
        return Workload(*fields)

    sizes = st.tuples(pairs, pairs, pairs, pairs, padding, pairs)
    return st.one_of(linear, st.builds(convolution, few, few, few, few, sizes))


@st.composite
def real_workloads(draw: Any) -> Workload:
    """Whose output size follows from the rest."""
    batch, inputs, outputs, groups = (draw(st.integers(1, 4)) for _ in range(4))
    if draw(st.booleans()):
        return Workload("linear", batch, inputs, outputs)
    window, stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(3))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size = draw(st.tuples(st.integers(7, 9), st.integers(7, 9)))
    output = [
        (s + 2 * p - d * (w - 1) - 1) // step + 1
        for s, p, d, w, step in zip(size, padding, dilation, window, stride, strict=True)
    ]
    return Workload(
        "conv2d",
        batch,
        inputs * groups,
        outputs * groups,
        size,
        (output[0], output[1]),
        window,
        stride,
        padding,
        dilation,
        groups,
    )


class TestMeasuredOccupancy:
    @settings(max_examples=60)
    @given(data=st.data())
    def test_counts(self, data: st.DataObject) -> None:
        groups, out, inputs = (data.draw(st.integers(1, high)) for high in (3, 4, 5))
        window = data.draw(st.sampled_from([(), (2, 3), (1, 1)]))
        if not window:
            groups = 1
        generator = np.random.default_rng(data.draw(st.integers(0, 999)))
        weight = generator.normal(size=(out * groups, inputs, *window))
        weight *= generator.random(weight.shape) < data.draw(st.sampled_from([0.0, 0.2, 1.0]))
        living = generator.random(inputs * groups) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
        if data.draw(st.booleans()):
            living[:] = True
        rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))

        kept = set()
        for index in itertools.product(*map(range, weight.shape)):
            group = index[0] // out
            if weight[index] != 0 and living[group * inputs + index[1]]:
                kept.add(index)
        blocks = {(o // rows, i // cols, *rest) for o, i, *rest in kept}
        whole = {(o // rows, i // cols, *rest) for o, i, *rest in itertools.product(*map(range, weight.shape))}

        given_living = None if living.all() else torch.from_numpy(living)
        left = measured_occupancy(torch.from_numpy(weight), given_living)
        assert left.density.item() == pytest.approx(len(kept) / weight.size)
        assert left.rows.item() == pytest.approx(len({index[0] for index in kept}) / len(weight))
        assert left.columns.item() == pytest.approx(len({index[1] for index in kept}) / inputs)
        assert left.blocks(rows, cols).item() == pytest.approx(len(blocks) / len(whole))

    def test_living_inputs_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"a weight of shape \(8, 4, 3, 3\) cannot have 6 living_inputs"):
            measured_occupancy(torch.ones(8, 4, 3, 3), torch.ones(6, dtype=torch.bool))

    def test_reads_the_numbers_alone(self) -> None:
        weight = nn.Parameter(torch.tensor([[-0.0, 1.0], [0.0, -2.0]]).t())
        assert measured_occupancy(weight).density == 0.5
        assert weight.grad is None


BLOCKS = [(1, 1), (2, 2), (4, 4), (8, 8), (3, 5), (16, 1)]
PATTERNS: list[tuple[Granularity, tuple[int, ...]]] = [
    (Unstructured(), (8, 12)),
    (Unstructured(), (8, 12, 3, 2)),
    (Unstructured(), (24, 1, 3, 3)),
    (Unstructured(), (6, 1, 3, 3)),
    (Block(4, 4), (16, 24)),
    (Block(4, 2), (8, 12, 3, 2)),
    (Block(2, 1), (24, 1, 3, 3)),
    (Block(3, 6), (12, 12, 1, 1)),
    (Filter(), (12, 8, 3, 3)),
    (Filter(), (24, 1, 3, 3)),
    (Channel(), (12, 8, 3, 3)),
    (Channel(), (12, 8)),
    (Kernel(), (8, 12, 3, 3)),
    (Kernel(), (24, 1, 3, 3)),
    (Vector(0), (8, 12, 2, 3)),
    (Vector(0), (24, 1, 3, 3)),
    (Vector(1), (8, 12, 2, 3)),
    (Vector(2), (8, 12, 2, 3)),
    (Vector(3), (8, 12, 2, 3)),
    (Vector(3), (24, 1, 3, 3)),
]


class TestExpectedOccupancy:
    @pytest.mark.parametrize(("pattern", "shape"), PATTERNS, ids=str)
    @pytest.mark.parametrize(("sparsity", "living"), [(0.5, 1.0), (0.9, 1.0), (0.0, 0.3), (0.8, 0.5)])
    def test_is_the_mean_of_random_masks(
        self, pattern: Granularity, shape: tuple[int, ...], sparsity: float, living: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            groups = torch.rand(pattern.groups(torch.Size(shape)), generator=generator) >= sparsity
            return pattern.expand(groups, torch.Size(shape))

        self.compare(pattern, shape, sparsity, living, draw, generator)

    @pytest.mark.parametrize("shape", [(8, 12), (4, 8, 3, 3)], ids=str)
    @pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2)], ids=repr)
    @pytest.mark.parametrize(("share", "living"), [(0.0, 0.6), (0.5, 1.0), (1.0, 1.0), (1.0, 0.5), (0.6, 0.5)])
    def test_of_nm(self, pattern: NM, shape: tuple[int, ...], share: float, living: float) -> None:
        """On the way to its sparsity, random ones of the unprotected weights are gone."""
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            protected = pattern.protected(torch.rand(shape, generator=generator))
            return protected | (torch.rand(shape, generator=generator) >= share)

        self.compare(pattern, shape, share * pattern.sparsity, living, draw, generator)

    @staticmethod
    def compare(
        pattern: Granularity,
        shape: tuple[int, ...],
        sparsity: float,
        living: float,
        draw: Callable[[], Tensor],
        generator: torch.Generator,
        trials: int = 250,
        bias: float = 0.008,
    ) -> None:
        def parts(left: Any) -> list[float]:
            return [float(x) for x in (left.density, left.rows, left.columns, *(left.blocks(*b) for b in BLOCKS))]

        inputs = shape[0] if shape[1] == 1 else shape[1]
        seen = np.array(
            [
                parts(measured_occupancy(draw().double(), torch.rand(inputs, generator=generator) < living))
                for _ in range(trials)
            ]
        )
        expected = parts(expected_occupancy(pattern, torch.tensor(sparsity), shape, torch.tensor(living)))
        error = 4.5 * seen.std(0) / math.sqrt(trials) + bias
        names = ["density", "rows", "columns", *BLOCKS]
        wrong = {
            name: (e, s)
            for name, e, s, limit in zip(names, expected, seen.mean(0), error, strict=True)
            if abs(e - s) > limit
        }
        assert not wrong

    @pytest.mark.parametrize(
        "pattern", [Unstructured(), Block(4, 4), Filter(), Channel(), Kernel(), Vector(2), NM(2, 4)], ids=repr
    )
    @pytest.mark.parametrize("sparsity", [0.5, 0.875])
    def test_is_near_the_packages_masks_of_random_scores(self, pattern: Granularity, sparsity: float) -> None:
        """Those remove exact counts, which leaves a little less to chance."""
        shape = torch.Size((64, 64, 3, 3))
        sparsity = 0.5 if isinstance(pattern, NM) else sparsity
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            scores = {"w": torch.rand(shape, generator=generator)}
            return masks(scores, {"w": sparsity}, parts={"w": Part(shape, pattern)})["w"]

        self.compare(pattern, tuple(shape), sparsity, 1.0, draw, generator, trials=12, bias=0.025)

    @pytest.mark.parametrize(
        "pattern", [Unstructured(), Block(4, 4), Filter(), Channel(), Kernel(), Vector(2), NM(2, 4)], ids=repr
    )
    def test_falls_from_one_to_none_with_sparsity_and_with_dead_inputs(self, pattern: Granularity) -> None:
        steps = torch.linspace(0, 1, 41, dtype=torch.float64)
        for left in (
            expected_occupancy(pattern, steps, (8, 16, 3, 3)),
            expected_occupancy(pattern, torch.tensor(0.0), (8, 16, 3, 3), 1.0 - steps),
        ):
            for values in (left.density, left.rows, left.columns, *(left.blocks(*block) for block in BLOCKS)):
                assert values.shape == steps.shape
                assert values[[0, -1]].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
                assert ((values >= 0) & (values <= 1)).all()
                assert (values.diff() <= 1e-12).all()

    def test_shapes_broadcast(self) -> None:
        left = expected_occupancy(Unstructured(), torch.rand(5, 1, 2), (8, 8), torch.rand(3, 1))
        for values in (left.density, left.rows, left.columns, left.blocks(4, 4)):
            assert values.shape == (5, 3, 2)


class TestKernels:
    @pytest.mark.parametrize("build", [lambda: Dense("nwhc"), lambda: Shrunk("nwhc")])
    def test_layouts_that_are_none(self, build: Callable[[], LayerKernel]) -> None:
        with pytest.raises(ValueError, match=r"a layout is one of \('nchw', 'nhwc'.*\), got 'nwhc'"):
            build()

    def test_blocks_that_are_none(self) -> None:
        with pytest.raises(ValueError, match=r"at least 2 x 2, got size=1; single weights are CSR\(\)"):
            BSR(1)

    def test_values_compare_by_what_they_are(self) -> None:
        assert Dense() == Dense("nchw") != Dense("nhwc")
        assert BSR(4) == BSR(4) != BSR(8)
        assert len({CSR(), CSR(), Shrunk(), Shrunk()}) == 2

    @pytest.mark.parametrize("kernel", [CSR(), BSR(4)], ids=lambda kernel: kernel.name)
    @pytest.mark.parametrize("layer", [nn.Linear(32, 16), nn.Conv2d(16, 32, 3)], ids=str)
    def test_stores_what_the_features_say(self, kernel: LayerKernel, layer: Any) -> None:
        layer, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < 0.1)
        inputs = layer.weight.shape[1]
        x = torch.zeros(2, inputs, *[5] * (layer.weight.ndim - 2))
        built = kernel.build(layer)
        assert isinstance(built, MatrixLinear | MatrixConv2d)
        stored = kernel.features(workload_of(layer, x), measured_occupancy(layer.weight))["stored"]
        assert built.matrix.values.numel() == pytest.approx(float(stored))

    @pytest.mark.parametrize(
        "layer",
        [nn.Linear(32, 16), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(32, 32, 3, groups=32)],
        ids=str,
    )
    @pytest.mark.parametrize("kernel", [Shrunk("nchw"), Shrunk("nhwc")], ids=lambda kernel: kernel.name)
    def test_shrinks_to_what_the_features_say(self, kernel: Shrunk, layer: Any) -> None:
        layer, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
        out, inputs = len(layer.weight), layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        with torch.no_grad():
            layer.weight.mul_((torch.rand(out, generator=generator) < 0.5).view(-1, *[1] * (layer.weight.ndim - 1)))
        x = torch.zeros(2, inputs, *[5] * (layer.weight.ndim - 2))
        work = workload_of(layer, x)
        if kernel.refuses(work, torch.float32, x.device):
            return
        for share in (1.0, 0.5):
            with torch.no_grad():
                columns = torch.rand(layer.weight.shape[1], generator=generator) < share
                layer.weight.mul_(columns.view(1, -1, *[1] * (layer.weight.ndim - 2)))
            built = kernel.build(layer)
            assert isinstance(built, ShrunkLayer)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                built(x)
            terms = kernel.features(work, measured_occupancy(layer.weight))
            macs = sum(float(terms.get(name, 0.0)) for name in ("macs", "native_macs", "onednn_macs"))
            spare = counter.get_total_flops() / 2 - macs  # one output may be added, on which the others fall back
            assert -1e-6 <= spare <= work.macs / work.outputs + 1e-6

    def test_copies_of_layers_leave_their_gradients(self) -> None:
        layer = nn.Linear(4, 4)
        layer(torch.ones(1, 4)).sum().backward()
        assert all(parameter.grad is None for parameter in Dense().build(layer).parameters())

    @pytest.mark.parametrize("kernel", [Dense("nhwc"), Shrunk("nhwc")], ids=lambda kernel: kernel.name)
    def test_keeps_activations_in_its_layout(self, kernel: LayerKernel) -> None:
        layer = nn.Conv2d(8, 16, 3)
        with torch.no_grad():
            layer.weight[::2] = 0.0
            y = kernel.build(layer)(torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("kernel", [CSR(), BSR(4)], ids=lambda kernel: kernel.name)
    def test_warnings_stay_as_they_are_in_other_threads(self, kernel: LayerKernel, recwarn: Any) -> None:
        built = []
        thread = threading.Thread(target=lambda: built.append(kernel.build(nn.Linear(8, 8))(torch.ones(2, 8))))
        thread.start()
        thread.join()
        assert len(built) == 1
        assert not recwarn.list

    def test_what_runs_on_one_system_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = Workload("linear", 1, 64, 64)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert "without MKL" in str(CSR().refuses(work, torch.float32, torch.device("cpu")))
        assert CSR().refuses(work, torch.float16, torch.device("cuda")) is None
        assert "mps" in str(BSR(4).refuses(work, torch.float32, torch.device("mps")))


class TestSemiStructured:
    @pytest.mark.parametrize(
        ("work", "dtype", "device", "reason"),
        [
            (Workload("linear", 8, 64, 64), torch.float16, "cpu", "not on cpu"),
            (Workload("linear", 8, 64, 64), torch.float32, "cuda", r"not torch\.float32; call model\.half\(\)"),
            (Workload("conv2d", 8, 64, 64), torch.float16, "cuda", "not for conv2d"),
            (Workload("linear", 8, 96, 64), torch.float16, "cuda", "32 outputs and 64 inputs, not 64 and 96"),
            (Workload("linear", 8, 64, 48), torch.bfloat16, "cuda", "not 48 and 64"),
        ],
    )
    def test_refuses(
        self, monkeypatch: pytest.MonkeyPatch, work: Workload, dtype: torch.dtype, device: str, reason: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert re.search(reason, SemiStructured().refuses(work, dtype, torch.device(device)) or "")
        fits = Workload("linear", 8, 64, 64)
        assert SemiStructured().refuses(fits, torch.float16, torch.device("cuda")) is None

    def test_refuses_machines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work, gpu = Workload("linear", 8, 64, 64), torch.device("cuda", 1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "none for cuda:1" in str(SemiStructured().refuses(work, torch.float16, gpu))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "cuda:1 has 7.5" in str(SemiStructured().refuses(work, torch.float16, gpu))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.Linear(64, 32), r"the weight of shape \(32, 64\) has more than 2 nonzeros .* prune it with NM\(2, 4\)"),
            (nn.Linear(6, 32), r"shape \(32, 6\)"),
            (nn.Conv2d(4, 4, 1), "not for Conv2d"),
        ],
        ids=str,
    )
    def test_weights_that_are_not_two_of_four(self, layer: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SemiStructured().build(layer)

    @pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0",
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(8,), (1,), (3, 5), (128,)], ids=str)
    def test_result_is_the_layers(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(128, 64)
        with torch.no_grad():
            layer.weight.mul_(NM(2, 4).protected(layer.weight.abs()))
        layer = layer.to("cuda", dtype)
        x = torch.randn(*shape, 128, device="cuda", dtype=dtype)
        work = workload_of(layer, x)
        assert SemiStructured().refuses(work, dtype, x.device) is None
        with torch.no_grad():
            y = SemiStructured().build(layer)(x)
            expected = copy.deepcopy(layer).double()(x.double())
        assert (y.double() - expected).abs().max() <= 1e-2 * expected.abs().max()
