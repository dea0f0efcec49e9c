"""The twin: what is in it, that nothing else is touched, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.quantization import (
    AveragedMinMax,
    MeanSquaredError,
    MinMax,
    Percentile,
    QuantizationSettings,
    quantize,
    quantized_layers,
)
from lightning_prune.quantization.schemes import WIDTHS
from tests import support
from tests.quantization import reference
from tests.test_folding import trained


class Residual(nn.Module):
    """BatchNorm, a shortcut, dropout and a branch on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        if x.mean() > -1.0:
            x = (x + self.norm2(self.body(x))).relu()
        y: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return y


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    trained(model)
    return model


def images(count: int = 2, batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 3, 6, 6, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_layer_is_what_numpy_says(bits: int, scheme: Any, per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    layer = nn.Linear(6, 5)
    layer.weight.data.normal_(generator=generator)[2] = 0.0
    layer.weight.data[3, :3] = 0.0
    x = torch.randn(7, 6, generator=generator) + 0.5
    twin = quantize(layer, [x], bits, scheme, per_channel)
    (quantized,) = quantized_layers(twin).values()
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    rows = [w[i] for i in range(5)] if per_channel else [w]
    parameters = [reference.parameters(row.min(), row.max(), bits, scheme) for row in rows]
    q = np.stack([reference.integers(w[i], *parameters[i % len(rows)], bits, scheme) for i in range(5)])
    assert quantized.integer_weight().dtype == torch.int32
    assert quantized.integer_weight().tolist() == q.tolist()
    back = np.stack([reference.real(q[i], *parameters[i % len(rows)]) for i in range(5)])
    assert quantized.weight.numpy().tobytes() == back.tobytes()
    assert (back[w == 0] == 0).all()
    of_input = reference.parameters(x.min().item(), x.max().item(), bits, scheme)
    kept = quantized.quantizers.input.quantizer
    assert (kept.scale.item(), kept.zero_point.item()) == (float(of_input[0]), float(of_input[1]))
    for i in range(5):
        unit = np.float64(of_input[0]) * np.float64(parameters[i % len(rows)][0])
        if np.any(w[i]):
            assert quantized.bias[i].item() == np.float32(np.rint(unit * np.float64(b[i])) / unit)
        else:
            assert quantized.bias[i].item() == b[i]
    xq = reference.real(reference.integers(x.numpy(), *of_input, bits, scheme), *of_input)
    expected = nn.functional.linear(torch.from_numpy(xq), torch.from_numpy(back), quantized.bias)
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (5, 3, 4)),
        (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), groups=2, stride=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...], per_channel: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    with torch.no_grad():
        dense = layer(x)
    twin = quantize(layer, [x], 16, per_channel=per_channel, outputs=True)
    assert (twin(x) - dense).abs().max() < 1e-3 * dense.abs().max()
    coarse = quantize(layer, [x], 2, activation_bits=16, per_channel=per_channel)
    (quantized,) = quantized_layers(coarse).values()
    assert quantized.integer_weight().shape == layer.weight.shape
    groups: Any = getattr(layer, "groups", 1)
    scale = quantized.quantizers.weight.quantizer.scale
    assert len(scale) == (6 if per_channel else 1)
    if per_channel:  # the range of each output, found without `Layout`
        weight: Any = layer.get_parameter("weight").detach()
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        for out in range(6):
            group, place = divmod(out, 6 // groups)
            own = weight[group * (4 // groups) : (group + 1) * (4 // groups), place] if transposed else weight[out]
            low, high = own.min().clamp(max=0), own.max().clamp(min=0)
            assert scale[out].item() == pytest.approx((3 / (high - low)).item(), rel=1e-6)


@settings(max_examples=25)
@given(
    bits=st.sampled_from(WIDTHS),
    scheme=st.sampled_from(["asymmetric", "symmetric"]),
    per_channel=st.booleans(),
    ranges=st.sampled_from([MinMax(), AveragedMinMax(), Percentile(0.8), MeanSquaredError(10)]),
    seed=st.integers(0, 1000),
)
def test_masks_survive(bits: int, scheme: Any, per_channel: bool, ranges: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    trained(model)
    mask = [torch.rand(model[i].weight.shape) < 0.5 for i in (0, 4)]
    with torch.no_grad():
        for i, m in zip((0, 4), mask, strict=True):
            model[i].weight[m] = 0.0
    twin = quantize(model, [torch.randn(4, 2, 4, 4)], bits, scheme, per_channel, weight_ranges=ranges)
    for m, layer in zip(mask, quantized_layers(twin).values(), strict=True):
        weight = layer.layer.get_parameter("weight")
        assert (weight[m] == 0).all()
        assert not torch.signbit(weight[m]).any()


def test_the_training_goes_on_as_if_nothing_had_been(residual: Residual) -> None:
    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            noise = torch.randn(()) + random.random() + np.random.rand()  # noqa: NPY002
            return torch.full((3, 6, 6), float(index)) + noise, index

    model = residual.train()
    model.norm.eval()
    optimizer = torch.optim.Adam(model.parameters())
    model(images()[0]).sum().backward()
    optimizer.step()
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=own)

    def everything() -> list[bytes]:
        state = [model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()]
        flags = [(m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        chance = [torch.get_rng_state().tolist(), own.get_state().tolist(), random.getstate()]
        return [pickle.dumps(x) for x in (state, flags, chance, np.random.get_state())]  # noqa: NPY002

    before, tensors = everything(), [p.data_ptr() for p in model.parameters()]
    twin = quantize(model, loader)
    assert everything() == before
    assert tensors == [p.data_ptr() for p in model.parameters()]
    shared = set(tensors) | {b.data_ptr() for b in model.buffers()}
    assert shared.isdisjoint(t.data_ptr() for t in [*twin.parameters(), *twin.buffers()])
    assert not any(p.requires_grad for p in twin.parameters())
    assert not any(m.training for m in twin.modules())
    assert torch.is_grad_enabled()
    kept = copy.deepcopy(model.state_dict())
    twin(images()[0])
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_batch_norm_is_folded_and_its_statistics_are_the_models(residual: Residual) -> None:
    twin: Any = quantize(residual, images(), 16)
    assert isinstance(twin, Residual)
    assert isinstance(twin.norm, nn.Identity)
    assert isinstance(twin.norm2, nn.Identity)
    assert isinstance(residual.norm, nn.BatchNorm2d)
    residual.train()
    again = quantize(residual, images(), 16)
    residual.eval()
    x = images()[0]
    with torch.no_grad():
        assert (twin(x) - residual(x)).abs().max() < 1e-3
    assert torch.equal(again(x), twin(x))


@pytest.mark.parametrize("outputs", [False, True])
def test_each_batch_is_run_once_and_ranges_are_of_what_layers_take_in(residual: Residual, outputs: bool) -> None:
    """Folding needs a pass; where what layers give counts too, which it changes, that is one more."""
    taken: dict[str, list[Tensor]] = {"stem": [], "body": [], "fc": []}

    def run(model: Any, batch: Any) -> Any:
        sizes.append(batch.shape[0])
        return model(batch)

    sizes: list[int] = []
    seen = [images(1, 4)[0], 2 * images(1, 3)[0], 0.5 * images(1, 2)[0]]
    handles = [
        getattr(residual, name).register_forward_pre_hook(lambda _, args, name=name: taken[name].append(args[0]))
        for name in taken
    ]
    with torch.no_grad():
        for batch in seen:
            residual(batch)
    for handle in handles:
        handle.remove()
    twin = quantize(residual, seen, outputs=outputs, forward=run)
    assert sizes == [4] * outputs + [4, 3, 2]
    for name, layer in quantized_layers(twin).items():
        low, high = (torch.cat([x.flatten() for x in taken[name]]).numpy() for _ in range(2))
        scale, _ = reference.parameters(low.min(), high.max(), 8, "asymmetric")
        assert layer.quantizers.input.quantizer.scale.item() == pytest.approx(float(scale), rel=1e-5)


def test_fewer_bits_err_more(residual: Residual) -> None:
    x = images(8, 16)
    with torch.no_grad():
        dense = residual(x[0])
    errors = [(quantize(residual, x, bits)(x[0]) - dense).square().mean().item() for bits in (16, 8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-7
    assert errors[1] < 1e-3 < errors[-1]


def test_clipping_reaches_activations_and_weights_separately() -> None:
    layer = nn.Linear(1000, 1, bias=False)
    layer.weight.data = torch.linspace(-1, 1, 1000)[None].clone()
    x = torch.linspace(0, 1, 1000)[None].clone()

    def spans(**options: Any) -> tuple[float, float]:
        (quantized,) = quantized_layers(quantize(layer, [x], **options)).values()
        parts = quantized.quantizers
        return 255 / parts.input.quantizer.scale.item(), 255 / parts.weight.quantizer.scale.item()

    assert spans() == pytest.approx((1.0, 2.0))
    assert spans(ranges=Percentile(0.5)) == pytest.approx((0.75, 2.0), abs=0.01)
    assert spans(weight_ranges=Percentile(0.5)) == pytest.approx((1.0, 1.0), abs=0.01)


def test_outputs_are_quantised_where_asked_for(residual: Residual) -> None:
    twin: Any = quantize(residual, images(), 4, outputs=True)
    values = twin.stem(images()[0])
    assert len(values.unique()) <= 16
    assert len(quantize(residual, images(), 4).stem(images()[0]).unique()) > 16  # type: ignore[operator]


def widths(twin: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (layer.quantizers.weight.quantizer.grid.bits, layer.quantizers.input.quantizer.grid.bits)
        for name, layer in quantized_layers(twin).items()
    }


def test_widths_and_exclusion(residual: Residual) -> None:
    def of(**options: Any) -> dict[str, tuple[int, int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return widths(quantize(residual, images(), **options))

    assert of() == {"stem": (8, 8), "body": (8, 8), "fc": (8, 8)}
    assert of(bits=4, activation_bits=8) == {"stem": (4, 8), "body": (4, 8), "fc": (4, 8)}
    assert of(bits=4, first_bits=8, last_bits=16) == {"stem": (8, 8), "body": (4, 4), "fc": (16, 16)}
    assert of(exclude="stem", first_bits=3) == {"body": (3, 3), "fc": (8, 8)}
    assert of(exclude=["s*", "fc"]) == {"body": (8, 8)}
    assert of(bits={"*": 4, "*o*": 5, "body": 6, "b*": 7}) == {"stem": (4, 4), "body": (6, 6), "fc": (4, 4)}
    assert of(bits={"fc": 6}) == {"fc": (6, 6)}


def test_first_and_last_are_those_that_run_first_and_last() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x))

    assert widths(quantize(Crossed(), [torch.ones(1, 4)], first_bits=3, last_bits=5)) == {
        "last": (5, 5),
        "first": (3, 3),
    }


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (torch.ones(2, 4), None),
        ((torch.ones(2, 4), torch.zeros(2)), None),
        ([torch.ones(2, 4), torch.zeros(2)], None),
        ({"x": torch.ones(2, 4)}, None),
        ((torch.zeros(2), torch.ones(2, 4)), lambda model, batch: model(batch[1])),
    ],
)
def test_batches(batch: Any, forward: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.fc(input=x)

    (layer,) = quantized_layers(quantize(Net(), [batch], forward=forward)).values()
    assert layer.quantizers.input.quantizer.scale.item() == 255.0


def test_a_loader_and_a_generator_are_calibration_too() -> None:
    x = torch.randn(32, 8)
    model = nn.Sequential(nn.Linear(8, 4))
    twins = [
        quantize(model, DataLoader(TensorDataset(x), batch_size=8)),
        quantize(model, (batch for batch in x.split(8))),
        quantize(model, [x]),
    ]
    assert torch.equal(twins[0](x), twins[2](x))
    assert torch.equal(twins[1](x), twins[2](x))


def test_a_layer_of_two_names_and_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.one = nn.Linear(4, 4)
            self.two = self.one
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Any:
            return self.head(self.two(self.one(self.embedding(x))))

    model = Tied()
    x = torch.arange(10)
    twin: Any = quantize(model, [x], 3)
    assert twin.one is twin.two
    assert torch.equal(twin.embedding.weight, model.embedding.weight)
    assert len(twin.head.weight[0].unique()) <= 8
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert twin.one.in_features == 4
    with pytest.raises(AttributeError, match="nothing"):
        twin.one.nothing  # noqa: B018


def test_a_lightning_module_stays_one() -> None:
    model = support.fit([], max_epochs=1)
    twin: Any = quantize(model, support.loader())
    assert isinstance(twin, support.Tiny)
    assert list(quantized_layers(twin)) == ["net.0", "net.2"]
    logged: dict[str, Any] = {}
    twin.__dict__["log"] = lambda name, value, **kwargs: logged.update({name: value})
    twin.validation_step(next(iter(support.loader())), 0)
    assert set(logged) == {"val_loss", "val_acc"}
    assert model._trainer is not None


def test_copies_and_pickles(residual: Residual) -> None:
    twin = quantize(residual, images())
    x = images()[0]
    assert torch.equal(copy.deepcopy(twin)(x), twin(x))
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))


def test_under_mixed_precision_the_twin_is_the_same(residual: Residual) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantize(residual, images())
    x = images()[0]
    assert torch.equal(inside(x), quantize(residual, images())(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(inside(x)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)
    y = quantize(model, [x])(x)
    assert y.dtype == dtype
    assert (y - model(x)).abs().max() < 0.05


def test_a_transformer_layer_does_not_go_around_its_quantisers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(4, 5, 8)
    with pytest.warns(UserWarning, match=r"stay in floating point: self_attn, self_attn.out_proj. They did not run"):
        twin: Any = quantize(model, [x], 2)
    with torch.no_grad():
        y = twin(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = twin(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(y, expected, atol=1e-5)


def test_layers_that_do_not_run_stay_as_they_are_with_a_warning() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)
            self.odd = parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Any:
            y = self.odd(self.fc(x))
            return (y, self.aux(x)) if self.training else y

    with pytest.warns(UserWarning, match=r"stay in floating point: aux, odd. They did not run in calibration"):
        twin = quantize(Aux(), [torch.ones(1, 4)])
    assert list(quantized_layers(twin)) == ["fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(Aux(), [torch.ones(1, 4)], {"fc": 8})


ANY = [torch.ones(2, 4)]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"bits is a width of 2 to 8, or 16, got bits=9"),
        ({"bits": 1}, r"got bits=1"),
        ({"bits": {"0": 32}}, r"bits\['0'\] is a width of 2 to 8, or 16, got bits\['0'\]=32"),
        ({"bits": {}}, r"got an empty map; say \{\"\*\": 8\} for all"),
        ({"activation_bits": 1}, r"got activation_bits=1"),
        ({"first_bits": 64}, r"got first_bits=64"),
        ({"last_bits": True}, r"got last_bits=True"),
        ({"scheme": "affine"}, r"scheme is one of 'asymmetric', 'symmetric', got 'affine'"),
        ({"ranges": "minmax"}, r"ranges is an object such as MinMax\(\) or Percentile\(\), got 'minmax'"),
        ({"weight_ranges": 3}, r"weight_ranges is an object"),
        ({"exclude": [3]}, r"exclude holds names or patterns of layers, got \[3\]"),
        ({"exclude": "net.*"}, r"exclude names 'net.\*', which matches none of the 2 layers .*; closest: '"),
        ({"exclude": ["0", "1"]}, r"exclude names '1', which matches none of the 2 layers .*; closest: '"),
        ({"bits": {"*": 8, "3": 4}}, r"bits names '3', which matches none of the 2 layers"),
        ({"exclude": "*"}, r"nothing is left to quantise"),
        ({"calibration": []}, r"calibration has no batch"),
        ({"calibration": DataLoader(TensorDataset(torch.ones(0, 4)))}, r"calibration has no batch"),
        ({"calibration": torch.ones(2, 4)}, r"an iterable of batches, such as a DataLoader, got Tensor; put a single"),
        ({"calibration": {"x": 1}}, r"got dict"),
        ({"calibration": 3}, r"got int"),
        ({"calibration": [torch.full((1, 4), torch.nan)]}, r"layer '0' took in values from nan to nan"),
        ({"calibration": [torch.ones(1, 4), torch.full((1, 4), torch.inf)]}, r"layer '0' took in values from inf to"),
        ({"calibration": [torch.full((1, 4), 1e38)]}, r"layer '0': a range needs finite bounds"),
        ({"model": nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4))}, r"Sequential has no linear or convolution layer"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(**{"model": linear(), "calibration": ANY, **options})


def test_the_layer_whose_activations_are_endless_is_named() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"layer '1' took in values .* no finite range during calibration; look for"):
        quantize(model, ANY)
    with pytest.raises(ValueError, match=r"layer '0' gave values .* no finite range"):
        quantize(model, ANY, outputs=True)
    model[0].bias.data[1] = 0.0
    model[1].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer '1': a weight that is NaN or infinite has no range"):
        quantize(model, ANY)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_constant_activations(value: float, scheme: Any) -> None:
    model = nn.Linear(4, 2)
    x = torch.full((3, 4), value)
    twin = quantize(model, [x], 8, scheme)
    assert (twin(x) - model(x)).abs().max() < 0.05


def test_errors_leave_generators_alone() -> None:
    def failing() -> Any:
        yield torch.ones(1, 4)
        torch.rand(3), random.random()
        raise KeyError("lost")

    model = linear()
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyError, match="lost"):
        quantize(model, failing())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_settings_are_frozen_and_comparable() -> None:
    assert QuantizationSettings(exclude="fc") == QuantizationSettings(exclude=("fc",))
    with pytest.raises(AttributeError):
        QuantizationSettings().bits = 4  # type: ignore[misc]


def test_every_way_of_calling_is_watched() -> None:
    calls: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: m(x),
        lambda m, x: m(input=x),
        lambda m, x: m(x, output_size=[7, 7]),
    ]
    layer = nn.ConvTranspose2d(1, 1, 2, stride=2)
    x = torch.randn(1, 1, 3, 3)
    for run in calls:
        twin = quantize(layer, [x], 16, forward=run)
        assert torch.allclose(run(twin, x), run(layer, x), atol=1e-3)
