"""The layer table against PyTorch's own FLOP counter, hand-made formulas and published counts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lightning_prune.layers import LayerCall, LayerSpec, LayerTable, layer_table

aten = torch.ops.aten
COUNTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def flops(model: nn.Module, *inputs: Any) -> dict[str, Mapping[Any, int]]:
    """What the FLOP counter sees, module by module, of the products with weights (attention's own are not)."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    with_weights = (aten.convolution, aten.addmm, aten.mm)
    return {
        module: {operator: count for operator, count in counts.items() if operator in with_weights}
        for module, counts in counter.get_flop_counts().items()
    }


def assert_agrees_with_flop_counter(model: nn.Module, table: LayerTable, *inputs: Any) -> None:
    counts = flops(model, *inputs)
    assert 2 * table.total_macs == sum(counts["Global"].values())
    compared = 0
    root = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, COUNTED_LAYERS) and (own := counts.get(f"{root}.{name}")):
            assert 2 * table[f"{name}.weight"].macs == sum(own.values()), name
            compared += 1
    assert compared > 0


class MetaFactories(TorchFunctionMode):
    """Puts the parameters of a model on the meta device while its constructor may still compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {"device": "meta"} if func in (torch.empty, torch.zeros, torch.ones) else {}
        return func(*args, **{**(kwargs or {}), **on_meta})


def on_meta(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # RegNets compute their widths with tensors, which takes numbers.
    with MetaFactories() if name.startswith("regnet") else torch.device("meta"):
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_agrees_with_flop_counter_on_every_torchvision_classifier(name: str) -> None:
    model = on_meta(name)
    size = 299 if name == "inception_v3" else 224
    image = torch.empty(1, 3, size, size, device="meta")
    assert_agrees_with_flop_counter(model, layer_table(model, image), image)


@pytest.mark.parametrize("name", models.list_models(module=models.segmentation))
def test_builds_for_every_torchvision_segmentation_model(name: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None, weights_backbone=None)
    image = torch.empty(1, 3, 64, 64, device="meta")
    assert_agrees_with_flop_counter(model, layer_table(model, image), image)


@pytest.mark.parametrize("name", models.list_models(module=models.detection))
def test_builds_for_every_torchvision_detection_model(name: str) -> None:
    """Their shapes depend on the boxes found; the model itself must come out without a trace."""
    few = {"rpn_post_nms_top_n_test": 9, "box_detections_per_img": 3} if "rcnn" in name else {}
    model = models.get_model(name, weights=None, weights_backbone=None, **few)
    if not name.startswith("ssd"):
        model.transform.min_size, model.transform.max_size = (64,), 64
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = fingerprint(model)
    table = layer_table(model, [image])
    assert fingerprint(model) == before
    convolutions = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {spec.name for spec in table if spec.kind == "conv2d"} == convolutions
    assert 2 * table.total_macs == sum(flops(model, [image])["Global"].values())


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that building a table could change: attributes by identity, tensors by version and bytes."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        for key, value in sorted(module.__dict__.items()):
            entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            seen.append((name, key, id(value), [(inner, id(item)) for inner, item in entries]))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = None if tensor.is_meta else tensor.detach().view(-1).view(torch.uint8).sum(dtype=torch.int64).item()
        seen.append((name, data, tensor.requires_grad, id(tensor.grad)))
    return seen


def test_resnet50_has_the_published_counts() -> None:
    table = layer_table(on_meta("resnet50"), torch.empty(1, 3, 224, 224))
    assert (table.total_macs, table.total_params, len(table)) == (4_089_184_256, 25_502_912, 54)
    assert (table[0].name, table[-1].name) == ("conv1.weight", "fc.weight")
    assert table["conv1.weight"].output_shape == (1, 64, 112, 112)
    assert (table["fc.weight"].bias_params, table["conv1.weight"].bias_params) == (1000, 0)
    assert layer_table(on_meta("resnet50"), torch.empty(3, 3, 224, 224)).total_macs == 3 * 4_089_184_256


def test_two_layer_example_of_degirum() -> None:
    model = nn.Sequential(
        nn.Conv2d(64, 256, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(256, 256, 3, stride=2, padding=1, bias=False),
    )
    table = layer_table(model, torch.empty(1, 64, 56, 56))
    assert [spec.params for spec in table] == [147_456, 589_824]
    assert [spec.macs for spec in table] == [115_605_504, 115_605_504]
    for layer in ("0.weight", "1.weight"):
        assert table.total_macs - table.macs({layer: 0.5}) == 57_802_752
    assert table.nonzeros({"0.weight": 0.5}) == 73_728 + 589_824


@pytest.mark.parametrize(
    ("layer", "image", "geometry"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9), ((1,), (1,), (1,), 2)),
        (nn.Conv2d(4, 8, (3, 5), stride=(2, 1), dilation=2), (2, 4, 12, 13), ((2, 1), (0, 0), (2, 2), 1)),
        (nn.Conv2d(4, 8, 4, padding="same"), (1, 4, 7, 7), ((1, 1), "same", (1, 1), 1)),
        (nn.Conv2d(4, 8, 3, padding="valid"), (1, 4, 7, 7), ((1, 1), (0, 0), (1, 1), 1)),
        (nn.Conv2d(4, 8, 3), (4, 7, 7), ((1, 1), (0, 0), (1, 1), 1)),
        (nn.Conv3d(2, 3, 3, padding=(0, 1, 2)), (1, 2, 5, 5, 5), ((1, 1, 1), (0, 1, 2), (1, 1, 1), 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_convolutions(layer: Any, image: tuple[int, ...], geometry: tuple[Any, ...]) -> None:
    (spec,) = layer_table(layer, torch.zeros(image))
    output = layer(torch.zeros(image)).shape
    # The definition: every element of the output is a sum over its group's inputs and the kernel.
    macs = math.prod(output) * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    assert spec.calls == (LayerCall(image, tuple(output), macs),)
    assert (spec.stride, spec.padding, spec.dilation, spec.groups) == geometry
    assert spec.kind == type(layer).__name__.lower()
    assert not spec.transposed
    assert (spec.weight_shape, spec.bias_params) == (tuple(layer.weight.shape), layer.out_channels)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions(dimensions: int) -> None:
    constructor: Callable[..., Any] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    layer = constructor(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    image = (2, 4, *(5, 6, 7)[:dimensions])
    (spec,) = layer_table(layer, torch.zeros(image))
    # Every element of the input is spread over its group's outputs and the kernel.
    assert spec.macs == math.prod(image) * 6 // 2 * 3**dimensions
    assert (spec.kind, spec.transposed, spec.groups) == (f"conv_transpose{dimensions}d", True, 2)
    assert spec.output_shape == tuple(layer(torch.zeros(image)).shape)
    assert spec.weight_shape == (4, 3, *[3] * dimensions)


def test_attention_projections_packed() -> None:
    table = layer_table(nn.MultiheadAttention(8, 2), (torch.zeros(5, 3, 8),) * 3)
    assert [(spec.name, spec.macs, spec.bias_params) for spec in table] == [
        ("in_proj_weight", 15 * 24 * 8, 24),
        ("out_proj.weight", 15 * 8 * 8, 8),
    ]


def test_attention_projections_between_two_sequences_are_calls_of_one_weight() -> None:
    query, memory = torch.zeros(5, 3, 8), torch.zeros(7, 3, 8)
    table = layer_table(nn.MultiheadAttention(8, 2), {"query": query, "key": memory, "value": memory})
    packed = table["in_proj_weight"]
    assert packed.macs == 15 * 8 * 8 + 21 * 16 * 8
    assert len(packed.calls) > 1
    assert (packed.weight_shape, packed.bias_params) == ((24, 8), 24)


def test_attention_projections_apart() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    table = layer_table(attention, (torch.zeros(5, 3, 8), torch.zeros(7, 3, 6), torch.zeros(7, 3, 4)))
    assert {spec.name: spec.macs for spec in table} == {
        "q_proj_weight": 15 * 8 * 8,
        "k_proj_weight": 21 * 6 * 8,
        "v_proj_weight": 21 * 4 * 8,
        "out_proj.weight": 15 * 8 * 8,
    }


@pytest.mark.parametrize("enabled", [True, False])
def test_transformer_encoder_is_seen_through_the_fast_path(enabled: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        table = layer_table(layer, torch.zeros(2, 5, 8))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert [(spec.name, spec.macs) for spec in table] == [
        ("self_attn.in_proj_weight", 10 * 24 * 8),
        ("self_attn.out_proj.weight", 10 * 8 * 8),
        ("linear1.weight", 10 * 16 * 8),
        ("linear2.weight", 10 * 8 * 16),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_over_steps_layers_directions_and_projections(batch_first: bool, device: str) -> None:
    batch, steps, inputs, hidden, projected = 2, 7, 8, 5, 3
    lstm = nn.LSTM(inputs, hidden, 2, bidirectional=True, proj_size=projected, batch_first=batch_first, device=device)
    shape = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
    table = layer_table(lstm, torch.zeros(shape))
    rows = 4 * hidden
    expected = {}
    for direction in ("", "_reverse"):
        for layer, width in enumerate((inputs, 2 * projected)):
            expected[f"weight_ih_l{layer}{direction}"] = batch * steps * rows * width
            expected[f"weight_hh_l{layer}{direction}"] = batch * steps * rows * projected
            expected[f"weight_hr_l{layer}{direction}"] = batch * steps * projected * hidden
    assert {spec.name: spec.macs for spec in table} == expected
    assert {spec.kind for spec in table} == {"lstm"}
    assert [table[f"weight_{part}_l0"].bias_params for part in ("ih", "hh", "hr")] == [rows, rows, 0]
    assert table["weight_ih_l1"].input_shape == (*shape[:2], 2 * projected)
    assert table["weight_ih_l1"].output_shape == (*shape[:2], rows)


@pytest.mark.parametrize(("constructor", "kind", "gates"), [(nn.GRU, "gru", 3), (nn.RNN, "rnn", 1)])
def test_other_recurrent_layers(constructor: Any, kind: str, gates: int) -> None:
    table = layer_table(constructor(8, 5, num_layers=2, bias=False), torch.zeros(7, 2, 8))
    assert [(spec.name, spec.kind, spec.macs, spec.bias_params) for spec in table] == [
        ("weight_ih_l0", kind, 14 * gates * 5 * 8, 0),
        ("weight_hh_l0", kind, 14 * gates * 5 * 5, 0),
        ("weight_ih_l1", kind, 14 * gates * 5 * 5, 0),
        ("weight_hh_l1", kind, 14 * gates * 5 * 5, 0),
    ]


def test_packed_sequences_count_their_valid_steps() -> None:
    table = layer_table(nn.GRU(8, 5), pack_sequence([torch.zeros(4, 8), torch.zeros(2, 8)]))
    assert [spec.macs for spec in table] == [6 * 15 * 8, 6 * 15 * 5]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.mix(self.embed(tokens))))  # type: ignore[no-any-return]


def test_tied_weights_and_repeated_modules_have_one_entry_with_several_calls() -> None:
    table = layer_table(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert table.names == ("embed.weight", "mix.weight")
    embed, mix = table
    assert embed.kind == "embedding"
    assert embed.calls == (LayerCall((2, 3), (2, 3, 4), 0), LayerCall((2, 3, 4), (2, 3, 10), 6 * 4 * 10))
    assert mix.calls == (LayerCall((2, 3, 4), (2, 3, 4), 6 * 16),) * 2
    assert (mix.macs, mix.params, mix.bias_params, table.total_params) == (2 * 6 * 16, 16, 4, 56)


class Functional(nn.Module):
    """Every way here must be recognised as a use of the weight, its views and its copies."""

    frozen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))
        self.experts = nn.Parameter(torch.zeros(5, 8, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("frozen", torch.zeros(4, 8))

    def forward(self, x: Tensor, way: str) -> Tensor:
        ways: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: F.linear(x, self.weight),
            "matmul": lambda: x @ self.weight.t(),
            "left": lambda: self.weight @ x.t(),
            "slice": lambda: F.linear(x, self.weight[2:]),
            "cast": lambda: F.linear(x.double(), self.weight.double()),
            "masked": lambda: F.linear(x, self.weight * (self.frozen > 0) / self.weight.norm()),
            "einsum": lambda: torch.einsum("bi,eio->ebo", x, self.experts),
            "conv": lambda: F.conv1d(x[:, :, None], self.weight[:, :, None]),
            "addmm": lambda: torch.addmm(self.scale, x, self.weight.t()),
        }
        return ways[way]()


@pytest.mark.parametrize(
    ("way", "name", "kind", "macs"),
    [
        ("linear", "weight", "linear", 3 * 4 * 8),
        ("matmul", "weight", "linear", 3 * 4 * 8),
        ("left", "weight", "linear", 3 * 4 * 8),
        ("slice", "weight", "linear", 3 * 2 * 8),
        ("cast", "weight", "linear", 3 * 4 * 8),
        ("masked", "weight", "linear", 3 * 4 * 8),
        ("einsum", "experts", "linear", 3 * 5 * 8 * 4),
        ("conv", "weight", "conv1d", 3 * 4 * 8),
        ("addmm", "weight", "linear", 3 * 4 * 8),
    ],
)
def test_functional_use(way: str, name: str, kind: str, macs: int) -> None:
    (spec,) = layer_table(Functional(), (torch.zeros(3, 8), way))
    assert (spec.name, spec.kind, spec.macs) == (name, kind, macs)
    assert spec.bias_params == (4 if way == "addmm" else 0)


def test_parameters_that_share_memory_are_told_apart() -> None:
    """As those of recurrent layers on a GPU, or of a flattened optimizer."""
    memory = torch.zeros(2 * 32)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4))
    for index, part in ((0, memory[:32].view(4, 8)), (1, memory[32:].view(8, 4))):
        model[index].weight = nn.Parameter(part)
    model[2].weight = nn.Parameter(memory[:32].view(4, 8))  # tied to the first by its memory alone
    table = layer_table(model, torch.zeros(3, 8))
    assert [(spec.name, len(spec.calls)) for spec in table] == [("0.weight", 2), ("1.weight", 1)]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_return_to_their_mode() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.Dropout()))
    assert layer_table(model, torch.zeros(3, 8)).total_macs == 96
    assert [module.training for module in model.modules()] == [True] * 3


def test_swin_projections_are_listed() -> None:
    table = layer_table(on_meta("swin_t"), torch.empty(1, 3, 224, 224))
    assert table["features.1.0.attn.qkv.weight"].macs == 56 * 56 * 96 * 288


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_reparametrised_weights_are_those_they_are_computed_from(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layer = wrap(nn.Linear(8, 4))
    (spec,) = layer_table(layer, torch.zeros(3, 8))
    assert spec.weight_shape == (4, 8)
    assert spec.macs == 3 * 4 * 8


def test_compiled_modules_keep_plain_names() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    model[1] = torch.compile(model[1])  # type: ignore[assignment]
    assert layer_table(torch.compile(model), torch.zeros(3, 8)).names == ("0.weight", "1.weight")  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_works_in_the_callers_contexts(context: Callable[[], Any]) -> None:
    with context():
        assert layer_table(nn.Linear(8, 4), torch.zeros(3, 8)).total_macs == 96


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: list[Tensor], *, scale: float = 1.0) -> Tensor:
        return self.layer(left + sum(right) * scale)  # type: ignore[no-any-return]


def test_example_inputs_by_position_and_by_name() -> None:
    x = torch.zeros(3, 4)
    assert layer_table(Sum(), (x, [x, x])).total_macs == 24
    assert layer_table(Sum(), {"left": x, "right": [x], "scale": 2.0}).total_macs == 24
    assert layer_table(Sum().layer, x).total_macs == 24


class DataDependent(nn.Module):
    """Runs only on real numbers, writes to buffers and attributes, draws random numbers."""

    calls: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(2)
        self.never = nn.Linear(3, 3)
        self.cache: dict[str, Tensor] = {}
        self.latest: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise AssertionError("the table is built in eval mode")
        self.calls += 1
        self.cache["last"] = self.latest = self.newest = x
        x += torch.rand(())
        y = self.norm(self.layer(F.dropout(x)))
        return y[y[:, 0] > y.mean().item()]  # type: ignore[no-any-return]


class Static(DataDependent):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["last"] = self.latest = self.newest = x
        return self.norm(self.layer(F.dropout(x)))  # type: ignore[no-any-return]


class Failing(DataDependent):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("after the work")


@pytest.mark.parametrize("constructor", [Static, DataDependent, Failing])
def test_the_model_is_left_as_it_was(constructor: type[DataDependent]) -> None:
    model = constructor()
    model.norm.eval()  # its own flag, unlike that of its parent
    model.layer.weight.grad = torch.ones(2, 4)
    fired: list[str] = []
    model.layer.register_forward_hook(lambda *_: fired.append("hook"))
    x = torch.zeros(3, 4)
    before, state = fingerprint(model), torch.get_rng_state()
    outcome = pytest.raises(ValueError, match="after the work") if constructor is Failing else contextlib.nullcontext()
    with outcome:
        table = layer_table(model, x)
        assert table.names == ("layer.weight",)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training, model.layer.training, model.norm.training] == [True, True, False]
    assert torch.equal(model.layer.weight.grad, torch.ones(2, 4))
    assert not hasattr(model, "newest")
    assert model.latest is None
    assert model.cache == {}
    assert model.calls.item() == 0
    assert torch.equal(x, torch.zeros(3, 4))
    assert fired  # the hooks were there, and still are
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def allocated_bytes(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or [])


@pytest.mark.parametrize("constructor", [Static, DataDependent])
def test_memory_is_not_needed_twice(constructor: type[DataDependent]) -> None:
    model, x = constructor(width=100_000), torch.zeros(1, 100_000)
    weights = 4 * model.layer.weight.numel()
    limit = 0 if constructor is Static else 4 * 4 * x.numel()  # a copy of the input, and what is computed
    model.layer = nn.Linear(100_000, 20)
    model.norm = nn.BatchNorm1d(20)
    assert allocated_bytes(lambda: model.layer.weight.clone()) >= 10 * weights  # the measure measures
    assert allocated_bytes(lambda: layer_table(model, x)) <= limit + 10_000 < 10 * weights


def test_a_model_larger_than_any_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6, dtype=torch.bfloat16)
    assert layer_table(model, torch.zeros(1, 10**6, dtype=torch.bfloat16)).total_macs == 10**12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert layer_table(nn.Conv2d(2, 3, 3, dtype=dtype), torch.zeros(1, 2, 5, 5, dtype=dtype)).total_macs == 486


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    table = layer_table(nn.LSTM(8, 5, device="cuda"), torch.zeros(7, 2, 8))
    assert [(spec.name, spec.macs) for spec in table] == [
        ("weight_ih_l0", 14 * 20 * 8),
        ("weight_hh_l0", 14 * 20 * 5),
    ]
    model, state = DataDependent().cuda(), torch.cuda.get_rng_state()
    before = fingerprint(model)
    assert layer_table(model, torch.zeros(3, 4)).total_macs == 24
    assert fingerprint(model) == before
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.fixture
def table() -> LayerTable:
    return layer_table(nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 5)), torch.zeros(2, 7))


def test_plans(table: LayerTable) -> None:
    assert (table.macs({}), table.nonzeros({})) == (72, 36) == (table.total_macs, table.total_params)
    assert table.nonzeros({"0.weight": 0.5}) == 21 - 10 + 15  # round(10.5) is 10
    assert table.macs({"0.weight": 0.5, "1.weight": 1.0}) == 22
    assert (table.macs({"0.weight": 1.0, "1.weight": 1}), table.nonzeros({"0.weight": 1, "1.weight": 1})) == (0, 0)


def test_large_counts_stay_exact() -> None:
    spec = LayerSpec("w", "linear", (10**5, 10**5), (LayerCall((1,), (1,), 3 * 10**15),))
    assert spec.kept_macs(0.0) == 3 * 10**15
    assert spec.kept_macs(1e-10) == (10**10 - 1) * 3 * 10**5


def test_unknown_names_list_the_closest(table: LayerTable) -> None:
    for attempt in (
        lambda: table["0.wieght"],
        lambda: table.macs({"0.wieght": 0.5}),
        lambda: table.nonzeros({"0.wieght": 0.5}),
    ):
        with pytest.raises(KeyError, match=r"0\.wieght.*closest are '0\.weight'"):
            attempt()


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_sparsities_outside_the_unit_interval(table: LayerTable, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"1\.weight: sparsity is the fraction removed.*got"):
        table.macs({"1.weight": sparsity})


def test_the_table_is_a_frozen_sequence(table: LayerTable) -> None:
    assert [spec.name for spec in table] == list(table.names) == ["0.weight", "1.weight"]
    assert table[-1] == table["1.weight"] == table[1:][0]
    assert table == layer_table(nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 5)), torch.zeros(2, 7))
    assert len({table, table}) == 1
    with pytest.raises(AttributeError):
        table.layers = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "a name"),
        ({"weight_shape": (0, 3)}, "needs weights"),
        ({"calls": ()}, "called at least once"),
        ({"groups": 0}, "at least one group"),
        ({"bias_params": -1}, "bias_params is a count, got -1"),
    ],
)
def test_specs_are_validated(changes: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {
        "name": "w",
        "kind": "linear",
        "weight_shape": (2, 3),
        "calls": (LayerCall((3,), (2,), 6),),
    }
    assert LayerSpec(**valid).macs == 6
    with pytest.raises(ValueError, match=message):
        LayerSpec(**{**valid, **changes})


def test_values_refuse_negative_counts_and_double_names(table: LayerTable) -> None:
    with pytest.raises(ValueError, match="macs is a count, got -1"):
        LayerCall((1,), (1,), -1)
    with pytest.raises(ValueError, match=r"several of \['0.weight'\]"):
        LayerTable((table[0], table[0]))


def test_models_without_used_weights() -> None:
    for model in (nn.ReLU(), nn.BatchNorm1d(4)):
        with pytest.raises(ValueError, match=r"used no weight.*pass a model that has such layers"):
            layer_table(model, torch.zeros(2, 4))


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"Linear did not run.*\(3, 9\).*float32") as caught:
        layer_table(nn.Linear(8, 4), torch.zeros(3, 9))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="A tuple holds several positional arguments"):
        layer_table(Sum(), torch.zeros(3, 4))


def test_data_dependent_models_on_meta_are_told_to_take_memory() -> None:
    with torch.device("meta"):
        model = DataDependent()
    with pytest.raises(ValueError, match="to_empty"):
        layer_table(model, torch.zeros(3, 4))


def test_lazy_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"0\.weight.*run it once"):
        layer_table(nn.Sequential(nn.LazyLinear(3)), torch.zeros(2, 4))


def test_never_called_layers_are_left_out() -> None:
    model: Any = on_meta("googlenet")
    names = layer_table(model, torch.empty(1, 3, 224, 224)).names
    assert hasattr(model, "aux1")
    assert not any(name.startswith("aux") for name in names)


def test_errors_are_not_logged_besides(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="did not run"):
        layer_table(nn.AvgPool3d(7), torch.zeros(1, 1, 2, 3, 3))
    assert caplog.records == []
