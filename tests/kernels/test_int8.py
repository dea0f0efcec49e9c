"""The 8-bit kernels against sums of whole numbers, against twins, and where they stay out of the way."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import accelerate, calibrate, quantize
from lightning_prune.kernels import ALL_KERNELS, KERNELS, QUANTIZED_KERNELS, Int8, Steps, int8
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.layers import layer_table
from lightning_prune.quantization.execution import INT8, steps_of
from lightning_prune.quantization.twin import quantized_layers, quantized_twin
from lightning_prune.runtime import AcceleratedModel, assembled
from tests.latency.profiles import HAND_MADE, hand_made, mlp, record, workload_of

if reason := int8.unavailable():
    pytest.skip(reason, allow_module_level=True)

CPU = torch.device("cpu")


@st.composite
def whole(draw: Any) -> tuple[nn.Linear | nn.Conv2d, Tensor, int, str]:
    """A layer of whole weights of 7 bits, inputs of 8, the integer of 0, and a layout."""
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    inputs, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    batch, zero = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 100, 255]))
    layer: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]
    if draw(st.booleans()):
        layer, shape = nn.Linear(inputs, outputs, draw(st.booleans())), (batch, inputs)
    else:
        groups = draw(st.sampled_from([1, 1, 2, inputs]))
        inputs, outputs = -(-inputs // groups) * groups, -(-outputs // groups) * groups
        pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
        layer = nn.Conv2d(inputs, outputs, draw(pair), draw(pair), draw(pair), 1, groups, draw(st.booleans()))
        shape = (batch, inputs, draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    extreme = draw(st.sampled_from([None, (63, 255), (-64, 255), (63, 0)]))
    weight = generator.integers(-64, 64, layer.weight.shape)
    x = generator.integers(0, 256, shape)
    if extreme is not None:  # all pairs of products are as great as can be
        weight[:], x[:] = extreme
    layer.requires_grad_(False).weight.copy_(torch.from_numpy(weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.from_numpy(generator.integers(-9, 9, outputs)))
    return layer, torch.from_numpy(x - zero).float(), zero, draw(st.sampled_from(["nchw", "nhwc"]))


@settings(max_examples=150)
@given(case=whole())
def test_sums_are_those_of_whole_numbers(case: tuple[nn.Linear | nn.Conv2d, Tensor, int, str]) -> None:
    layer, x, zero, layout = case
    expected = copy.deepcopy(layer).double()(x.double())
    kernel = Int8("nchw" if isinstance(layer, nn.Linear) else layout).quantized(Steps(1.0, zero, (1.0,)))
    assert kernel.refuses_weight(layer.weight) is None
    y = kernel.build(layer)(x)
    # Below 2^24 float32 holds every whole number.
    assert y.dtype == torch.float32
    assert (y.double() - expected).abs().max() <= 2.0**-23 * expected.abs().max()


@settings(max_examples=40)
@given(case=whole(), step=st.sampled_from([0.5, 0.03]))
def test_steps_scale_the_sums(case: tuple[nn.Linear | nn.Conv2d, Tensor, int, str], step: float) -> None:
    layer, x, zero, layout = case
    apart = torch.linspace(0.1, 2.0, len(layer.weight))
    scaled = copy.deepcopy(layer)
    scaled.weight.mul_(apart.view(-1, *[1] * (x.ndim - 1)))
    built = Int8(layout).quantized(Steps(step, zero, tuple(apart.tolist()))).build(scaled)
    expected = copy.deepcopy(scaled).double()(x.double() * step)
    magnitude = copy.deepcopy(scaled).double()
    magnitude.weight.abs_()
    if magnitude.bias is not None:
        magnitude.bias.abs_()
    most = magnitude(x.double().abs() * step).abs().max() + 1e-30
    assert (built(x * step).double() - expected).abs().max() <= 1e-6 * most


def test_inputs_beyond_the_range_are_clamped() -> None:
    layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    built = Int8().quantized(Steps(0.5, 10, (1.0,))).build(layer)
    x = torch.tensor([[-100.0], [-5.0], [0.2], [0.26], [122.5], [1e9]])
    assert built(x).flatten().tolist() == [-5.0, -5.0, 0.0, 0.5, 122.5, 122.5]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_rectifies_on_demand(layout: str) -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = [
        (nn.Linear(5, 7), torch.randn(3, 5)),
        (nn.Conv2d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 6)),
    ]
    for layer, x in cases:
        layer.requires_grad_(False)
        built, plain = Int8(layout).build(layer), Int8(layout).build(layer)
        built.relu = True  # type: ignore[assignment]
        assert torch.equal(built(x), plain(x).relu())
        assert built(x).rectified
        assert not hasattr(plain(x), "rectified")
        assert built(x[:0]).rectified


def test_results_of_convolutions_lie_in_the_layout() -> None:
    layer, x = nn.Conv2d(4, 8, 3).requires_grad_(False), torch.randn(2, 4, 9, 9)
    for given_x in (x, x.to(memory_format=torch.channels_last)):
        assert Int8("nchw").build(layer)(given_x).is_contiguous()
        assert Int8("nhwc").build(layer)(given_x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_that_could_overflow_are_refused(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": not saturates})
    assert int8.saturates() is saturates
    weight = torch.tensor([[-64.0, 63.0], [1.0, 0.0]])
    kernel = Int8().quantized(Steps(1.0, 0, (1.0,)))
    assert kernel.refuses_weight(weight) is None
    assert Int8().refuses_weight(2 * weight) is None  # of which it makes steps
    for wide in (weight * 64 / 63, weight - 1.0):
        reason = kernel.refuses_weight(wide)
        assert (reason is not None) == saturates
        if reason is not None:
            assert f"from {int(wide.min())} to {int(wide.max())} overflow 16 bits" in reason
            assert "quantise them to 7 bits" in reason


def test_processors_that_are_said_not_to_overflow_do_not() -> None:
    if int8.saturates():
        pytest.skip("this processor has no VNNI")
    for layer, x in (
        (nn.Linear(64, 8), torch.full((3, 64), 255.0)),
        (nn.Conv2d(16, 8, 3), torch.full((1, 16, 5, 5), 255.0)),
    ):
        layer.requires_grad_(False).weight.fill_(127.0)
        built = Int8().quantized(Steps(1.0, 0, (1.0,))).build(layer)
        torch.testing.assert_close(built(x), layer(x))


class TestRefused:
    @pytest.mark.parametrize(
        ("step", "zero", "steps", "message"),
        [
            (0.0, 0, (1.0,), "steps are positive and finite, got 0.0"),
            (math.inf, 0, (1.0,), "steps are positive and finite, got inf"),
            (1.0, 0, (1.0, math.nan), "steps are positive and finite"),
            (1.0, 0, (), "steps are positive and finite"),
            (1.0, 256, (1.0,), "one of 0 to 255, got 256"),
            (1.0, -1, (1.0,), "one of 0 to 255, got -1"),
        ],
    )
    def test_steps_that_are_none(self, step: float, zero: int, steps: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Steps(step, zero, steps)

    def test_inputs_without_a_range(self) -> None:
        built = Int8().build(nn.Linear(2, 2).requires_grad_(False))
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="have no finite range; look for what makes them"):
                built(torch.tensor([[1.0, value]]))

    def test_layouts_that_are_none(self) -> None:
        with pytest.raises(ValueError, match=r"a layout is one of .*, got 'nwhc'"):
            Int8("nwhc")

    def test_builds_of_torch_that_lack_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = workload_of(nn.Linear(2, 2), torch.ones(1, 2))
        lacking = [
            (torch.backends.quantized, "supported_engines", ["none"], "this PyTorch has no FBGEMM"),
            (torch.backends.mkldnn, "is_available", lambda: False, "this PyTorch has no oneDNN"),
            (int8, "_linear", lambda: SimpleNamespace().gone, "this PyTorch lacks an operator"),
        ]
        for owner, name, value, message in lacking:
            with monkeypatch.context() as patch:
                if name == "supported_engines":
                    patch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=value))
                else:
                    patch.setattr(owner, name, value)
                int8.unavailable.cache_clear()
                said = Int8().refuses(work, torch.float32, CPU)
            assert said is not None
            assert message in said
            assert "or go on without 8-bit kernels" in said
        int8.unavailable.cache_clear()
        assert Int8().refuses(work, torch.float32, CPU) is None


def test_constant_inputs_have_a_step() -> None:
    assert int8.input_steps(torch.zeros(3)) == (1.0, 0)
    layer = nn.Linear(3, 2).requires_grad_(False)
    assert torch.equal(Int8().build(layer)(torch.zeros(2, 3)), layer.bias.expand(2, 2))


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    model[1].running_mean.normal_()  # type: ignore[operator]
    return model.eval().requires_grad_(False), torch.randn(16, 3, 12, 12)


def twin_of(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    given = {"bits": 7, "activation_bits": 8, "weight_scheme": "symmetric", **options}
    return quantize(model, [x], **given)


@pytest.mark.parametrize("options", [{}, {"scheme": "symmetric"}, {"per_channel": False}, {"bits": 4}], ids=str)
def test_layers_of_twins_are_run_as_they_are(options: dict[str, Any]) -> None:
    model, x = network()
    layers = quantized_layers(twin_of(model, x, **options))
    assert list(layers) == ["0", "3", "7", "9"]
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        inner: Any = layer.layer
        shape = (5, inner.weight.shape[1], *([7, 7] if inner.weight.ndim == 4 else []))
        # Inputs that are rounded already do not lie between two steps.
        inputs = layer.quantizers.input(torch.randn(shape, generator=generator) * 2)
        steps = steps_of(layer)
        assert isinstance(steps, Steps)
        y, expected = Int8().quantized(steps).build(inner)(inputs), layer(inputs)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": True}, "its results are quantised too"),
        ({"activation_bits": 16}, "its inputs have 16 bits, and kernels take 8"),
        ({"bits": 16}, "its weights have 16 bits"),
        ({"weight_scheme": "asymmetric"}, "its weights are asymmetric"),
    ],
)
def test_other_twins_have_no_kernel(options: dict[str, Any], message: str) -> None:
    model, x = network()
    twin = twin_of(model, x, **options)
    for layer in quantized_layers(twin).values():
        assert message in str(steps_of(layer))
    assert not assembled(twin, x, {})._saved["steps"]  # type: ignore[index]
    report = accelerate(twin, x, kernels=QUANTIZED_KERNELS, rounds=1).kernel_report()
    assert {layer.kernel for layer in report.layers} <= {"dense", "dense-nhwc"}
    assert 1e-6 < report.relative_error < 0.05  # inputs are not rounded there


def test_other_layers_have_no_kernel() -> None:
    torch.manual_seed(0)
    twin = twin_of(nn.Sequential(nn.Conv1d(2, 4, 3)), torch.randn(3, 2, 8))
    [layer] = quantized_layers(twin).values()
    assert steps_of(layer) == "Conv1d layers have no 8-bit kernel"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_whole_twin_in_integers(layout: str, tmp_path: Path) -> None:
    model, x = network()
    twin = twin_of(model, x)
    kernels: dict[str, Any] = {name: Int8(layout if name in ("0", "3") else "nchw") for name in ("0", "3", "7", "9")}
    fast = assembled(twin, x, kernels, layout)
    integer = [module for module in fast.modules() if isinstance(module, int8.IntegerLayer)]
    assert [len(module.input_steps) for module in integer] == [2] * 4
    expected, scale = twin(x), float(twin(x).abs().max())
    moved = float((expected - model(x)).abs().max()) / scale
    # One input in a hundred thousand lies between two steps and may go either way.
    assert float((fast(x) - expected).abs().max()) / scale < min(4e-3, moved / 2)
    path = tmp_path / "fast.pt"
    fast.save(path)  # type: ignore[operator]
    for like in (twin, twin_of(model, torch.randn_like(x))):
        assert torch.equal(AcceleratedModel.load(path, like)(x), fast(x))


def test_of_a_twin_the_faster_kernels_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 8)).requires_grad_(False)
    x = torch.randn(16, 2048)
    twin = twin_of(model, x)
    fast = accelerate(twin, x, kernels=ALL_KERNELS, rounds=5)
    report = fast.kernel_report()
    assert report.layers[0].kernel == "int8"  # measured to take a third of the dense time
    assert report.relative_error < 0.05
    assert float((fast(x) - twin(x)).abs().max()) <= report.relative_error * float(twin(x).abs().max()) + 1e-6


def test_without_a_twin_nothing_is_rounded() -> None:
    model, x = network()
    fast = accelerate(model, x, kernels=ALL_KERNELS, rounds=1)
    assert not {layer.kernel for layer in fast.kernel_report().layers} & {"int8", "int8-nhwc"}
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert not set(QUANTIZED_KERNELS) & set(KERNELS)


def test_estimates_count_them_where_asked_alone() -> None:
    model, example = mlp()
    table, networks = record(model, example)
    with_int8 = hand_made(networks)
    costs = dict(with_int8.costs)
    fit: Any = copy.copy(costs["dense"])
    fit.kernel = Int8()
    fit.fits = {name: type(f)({"calls": 1e-7}, None) for name, f in fit.fits.items()}  # next to nothing
    profile = DeviceProfile(with_int8.machine, {**costs, "int8": fit}, (), networks)
    plain, default, asked = (
        LatencyEstimator(table, with_int8),
        LatencyEstimator(table, profile),
        LatencyEstimator(table, profile, quantized=True),
    )
    sparsity = torch.linspace(0, 0.9, 10, dtype=torch.float64)[:, None].expand(-1, len(table))
    assert default.kernels == plain.kernels == tuple(kernel.name for kernel in HAND_MADE)
    assert torch.equal(default.latency_s(sparsity), plain.latency_s(sparsity))
    assert asked.kernels == (*plain.kernels, "int8")
    assert (asked.latency_s(sparsity) < plain.latency_s(sparsity)).all()
    assert {asked.kernels[index] for index in asked.best_kernels(sparsity[0]).tolist()} == {"int8"}


@pytest.mark.filterwarnings("ignore::lightning_prune.latency.calibration.NoisyMachineWarning")
def test_calibration_times_them_where_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).requires_grad_(False)
    x, path = torch.randn(64, 512), tmp_path / "device.json"
    calibrate(model, x, profile=path, kernels=(), rounds=3, spread=0, progress=False)
    profile = calibrate(model, x, profile=path, kernels=QUANTIZED_KERNELS, rounds=3, spread=0, progress=False)
    times = {name: {m.work: m.seconds for m in profile.measurements if m.kernel == name} for name in ("dense", "int8")}
    assert times["dense"].keys() == times["int8"].keys()
    assert all(times["int8"][work] < 0.9 * seconds for work, seconds in times["dense"].items())
    loaded = DeviceProfile.load(path)
    assert {"dense", "int8"} <= loaded.costs.keys()
    table = layer_table(model, x)
    dense = torch.zeros(len(table), dtype=torch.float64)
    plain, asked = LatencyEstimator(table, loaded), LatencyEstimator(table, loaded, quantized=True)
    assert asked.latency_s(dense) < plain.latency_s(dense)


def test_what_the_search_calls_int8_runs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "saturates", lambda: True)
    model, x = network()
    for layer in quantized_layers(quantized_twin(model, [x], INT8)).values():
        steps = steps_of(layer)
        assert isinstance(steps, Steps)
        assert Int8().quantized(steps).refuses_weight(layer.layer.weight) is None  # type: ignore[arg-type]
