"""Accelerated networks: what the masked dense model gives, in a module that can be used as any other."""

from __future__ import annotations

import copy
import io
import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Block, DeviceProfile, Filter, Unstructured, accelerate, calibrate
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import BSR, CSR, KERNELS, Dense, LayerKernel, Shrunk
from lightning_prune.latency.variants import pruned
from lightning_prune.runtime import AcceleratedModel, assembled
from tests import support
from tests.latency.profiles import Counted, with_machine

PATTERNS: tuple[Granularity, ...] = (Unstructured(), Block(4, 4), Filter())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "thread_time", time.perf_counter)
    monkeypatch.setattr("lightning_prune.latency.session._SLOW_S", math.inf)
    yield
    torch.set_num_threads(threads)


class Block3(nn.Module):
    """BatchNorms and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.two(self.norm1(self.one(x)).relu()))).relu()
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def resnet() -> tuple[nn.Module, Tensor]:
    return trained(Block3(), torch.randn(2, 3, 8, 8))


def mobile() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(32, 8),
    )
    return trained(model, torch.randn(2, 3, 8, 8))


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )
    return trained(model, torch.randn(4, 32))


def trained(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """With statistics, and parameters of BatchNorms, that are not those of a new one."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
        for _ in range(3):
            model(torch.randn(8, *example.shape[1:]) + 0.3)
    return model.eval(), example


MODELS = {"resnet": resnet, "mobile": mobile, "mlp": mlp}


def masked(
    make: Callable[[], tuple[nn.Module, Tensor]], pattern: Granularity, sparsity: float
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, example = make()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            divided = len(module.weight) % 4 == module.weight.shape[1] % 4 == 0
            fitting = pattern if divided or not isinstance(pattern, Block) else Unstructured()
            module.weight.data.copy_(pruned(module, fitting, (sparsity, 1.0), generator).weight)
    return model, example


def fast(model: nn.Module, example: Any, profile: DeviceProfile | None = None, **options: Any) -> AcceleratedModel:
    return accelerate(model, example, profile, **{"rounds": 1, **options})


def assert_same(accelerated: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = model(x), accelerated(x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.fixture(scope="module")
def profiles() -> dict[str, DeviceProfile]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what else runs while tests do
            found[name] = calibrate(*make(), rounds=1, spread=0, progress=False)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("known", [False, True], ids=["timed", "profile"])
def test_gives_what_the_masked_model_gives(
    name: str, pattern: Granularity, sparsity: float, known: bool, profiles: dict[str, DeviceProfile]
) -> None:
    model, example = masked(MODELS[name], pattern, sparsity)
    accelerated = fast(model, example, profiles[name] if known else None)
    for batch in (1, len(example), 5):
        assert_same(accelerated, model, torch.randn(batch, *example.shape[1:]))
    report = accelerated.kernel_report()
    layers = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert [row.layer for row in report.layers] == layers
    assert report.relative_error <= 1e-4
    assert math.isfinite(report.estimated_s) == known
    assert report.measured_s > 0
    assert all(row.layer in str(report) for row in report.layers)
    assert all(math.isnan(row.pays_from) != known for row in report.layers)
    if sparsity == 0.0 and not known:  # by the estimate, some kernels need no zeros to be faster
        assert {row.kernel.removesuffix("-nhwc") for row in report.layers} == {"dense"}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_networks_of_one_kernel(name: str, layout: str, pattern: Granularity) -> None:
    """What `accelerate` may choose, chosen whether or not it pays."""
    model, example = masked(MODELS[name], pattern, 0.8)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for kernel in (Shrunk(layout), CSR(), BSR(4)):
        chosen: dict[str, LayerKernel] = {}
        for n, layer in layers.items():
            fits = layout == "nchw" or isinstance(layer, nn.Linear) or isinstance(kernel, Shrunk)
            divided = not isinstance(kernel, BSR) or (len(layer.weight) % 4 == 0 and layer.weight.shape[1] % 4 == 0)
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and not isinstance(kernel, Shrunk)
            chosen[n] = (
                kernel if fits and divided and not grouped else Dense(layout if layer.weight.ndim == 4 else "nchw")
            )
        accelerated = assembled(model, example, chosen, layout)
        for batch in (1, 3):
            assert_same(accelerated, model, torch.randn(batch, *example.shape[1:]))


def test_leaves_the_model_alone() -> None:
    model, example = masked(resnet, Filter(), 0.5)
    model.train()
    state, random, inputs = copy.deepcopy(model.state_dict()), torch.get_rng_state(), example.clone()
    modules = list(model.modules())
    accelerated = fast(model, example)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *accelerated.modules()))
    assert torch.equal(example, inputs)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in (*accelerated.parameters(), *accelerated.buffers())}


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.add_(1.0))
        return y


def test_forwards_that_overwrite_their_input() -> None:
    torch.manual_seed(0)
    model, example = Overwriting().eval(), torch.zeros(2, 32)
    accelerated = fast(model, example)
    assert not example.any()
    with torch.no_grad():
        torch.testing.assert_close(accelerated(torch.zeros(2, 32)), model(torch.zeros(2, 32)))


@pytest.fixture(scope="module")
def accelerated() -> tuple[nn.Module, Tensor, AcceleratedModel]:
    model, example = masked(resnet, Filter(), 0.6)
    layers = {n: Shrunk() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    found = assembled(model, example, {**layers, "fc": CSR()})
    assert isinstance(found, AcceleratedModel)
    return model, example, found


class TestUse:
    def test_copies(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel]) -> None:
        model, _, fast_ = accelerated
        x = torch.randn(3, 3, 8, 8)
        file = io.BytesIO()
        torch.save(fast_, file)
        file.seek(0)
        for again in (copy.deepcopy(fast_), pickle.loads(pickle.dumps(fast_)), torch.load(file, weights_only=False)):
            assert torch.equal(again(x), fast_(x))
            assert_same(again, model, x)

    def test_threads(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel]) -> None:
        _, _, fast_ = accelerated
        inputs = [torch.randn(1 + i % 3, 3, 8 + i % 2, 8) for i in range(24)]
        expected = [fast_(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(copy.deepcopy(fast_), inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_gives_no_gradients(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel]) -> None:
        assert not accelerated[2](torch.ones(1, 3, 8, 8, requires_grad=True)).requires_grad
        assert not accelerated[2].training

    def test_untimed_networks_have_no_report(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel]) -> None:
        with pytest.raises(RuntimeError, match=r"accelerate\(\) makes one"):
            accelerated[2].kernel_report()


class TestFiles:
    def test_round_trip(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel], tmp_path: Path) -> None:
        _, _, fast_ = accelerated
        fast_.save(tmp_path / "deep" / "net.pt")
        torch.load(tmp_path / "deep" / "net.pt", weights_only=True)
        again = AcceleratedModel.load(tmp_path / "deep" / "net.pt", Block3())
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(again(x), fast_(x))
        assert [type(m) for m in again.modules()] == [type(m) for m in fast_.modules()]
        again.save(tmp_path / "again.pt")
        assert torch.equal(AcceleratedModel.load(tmp_path / "again.pt", Block3())(x), fast_(x))

    @pytest.mark.parametrize("name", list(MODELS))
    def test_reports_come_along(self, name: str, tmp_path: Path) -> None:
        model, example = masked(MODELS[name], Filter(), 0.9)
        fast_ = fast(model, example)
        fast_.save(tmp_path / "net.pt")
        again = AcceleratedModel.load(tmp_path / "net.pt", MODELS[name]()[0])
        assert str(again.kernel_report()) == str(fast_.kernel_report())
        assert torch.equal(again(example), fast_(example))

    def test_in_double_precision(self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel], tmp_path: Path) -> None:
        model, _, fast_ = accelerated
        fast_.save(tmp_path / "net.pt")
        again = AcceleratedModel.load(tmp_path / "net.pt", Block3().double())
        assert_same(again, copy.deepcopy(model).double(), torch.randn(2, 3, 8, 8).double())

    def test_other_models_are_refused(
        self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel], tmp_path: Path
    ) -> None:
        accelerated[2].save(tmp_path / "net.pt")
        for other in (nn.Linear(4, 4), mlp()[0], mobile()[0]):
            with pytest.raises(ValueError, match="saved from another model than"):
                AcceleratedModel.load(tmp_path / "net.pt", other)

    def test_other_files_are_refused(
        self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel], tmp_path: Path
    ) -> None:
        path = tmp_path / "net.pt"
        accelerated[2].save(path)
        content = path.read_bytes()
        for size in (0, 1, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=r"net\.pt is not a whole accelerated model"):
                AcceleratedModel.load(path, Block3())
        for text in ("weights", "{}", "\x80\x02}q\x00."):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"net\.pt is no"):
                AcceleratedModel.load(path, Block3())
        torch.save(Block3().state_dict(), path)
        with pytest.raises(ValueError, match="no accelerated model of schema 'lightning-prune/accelerated/1'"):
            AcceleratedModel.load(path, Block3())
        torch.save(Block3(), path)
        with pytest.raises(ValueError, match="not a whole accelerated model"):
            AcceleratedModel.load(path, Block3())
        with pytest.raises(FileNotFoundError):
            AcceleratedModel.load(tmp_path / "missing.pt", Block3())

    def test_own_kernels_are_passed(self, tmp_path: Path) -> None:
        model, example = masked(mlp, Unstructured(), 0.9)
        own = assembled(model, example, {"0": Counted("mine")})
        assert isinstance(own, AcceleratedModel)
        own.save(tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"needs kernels \['mine'\]; pass them as kernels"):
            AcceleratedModel.load(tmp_path / "net.pt", mlp()[0])
        again = AcceleratedModel.load(tmp_path / "net.pt", mlp()[0], (*KERNELS, Counted("mine")))
        assert torch.equal(again(example), own(example))

    def test_an_interrupted_save_leaves_the_old_file(
        self, accelerated: tuple[nn.Module, Tensor, AcceleratedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "net.pt"
        path.write_text("before")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            accelerated[2].save(path)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]


class Instant(nn.Module):
    """The bias, at once."""

    def __init__(self, layer: nn.Linear, off: float) -> None:
        super().__init__()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias + off)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.bias  # type: ignore[assignment]
        return bias.expand(*x.shape[:-1], -1)


class Mine(Counted):
    """Runs linear layers that are zero throughout, faster than anything else."""

    off = 0.0

    def refuses_weight(self, weight: Tensor) -> str | None:
        return "it is not zero" if weight.any() else None

    def build(self, layer: Any) -> nn.Module:
        return Instant(layer, self.off)


class Wrong(Mine):
    off = 0.5


def emptied() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(256, 1024), nn.Sigmoid(), nn.Linear(1024, 1024, bias=False), nn.Sigmoid(), nn.Linear(1024, 4)
    )
    model[2].weight.data.zero_()
    return model.eval(), torch.randn(64, 256)


def test_a_kernel_of_ones_own() -> None:
    model, example = emptied()
    accelerated = fast(model, example, kernels=(Dense(), Mine("mine")), rounds=3)
    kernels = {row.layer: row.kernel for row in accelerated.kernel_report().layers}
    assert (kernels["0.weight"], kernels["2.weight"]) == ("dense", "mine")
    assert_same(accelerated, model, torch.randn(5, 256))


def test_wrong_outputs_are_not_used() -> None:
    model, example = emptied()
    with pytest.warns(UserWarning, match=r"differ from the dense model's by .*tolerance=0\.0001"):
        accelerated = fast(model, example, kernels=(Dense(), Wrong("wrong")), rounds=3)
    assert torch.equal(accelerated(example), model(example))
    report = accelerated.kernel_report()
    assert report.relative_error == 0.0
    assert "wrong" not in str(report)


@dataclass
class Answer:
    logits: Tensor
    label: Tensor


class Answering(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = emptied()[0], form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda y: Answer(y, y.argmax(1)),
        lambda y: {"a": [y], "b": None},
        lambda y: (y.cumsum(1) > 0.1).sum(1),
        lambda y: torch.complex(y, y),
        lambda y: torch.stack([y, torch.full_like(y, -math.inf), torch.full_like(y, math.nan)]),
    ],
    ids=["dataclass", "dict", "integers", "complex", "infinite"],
)
def test_outputs_of_any_form_are_compared(form: Callable[[Tensor], Any]) -> None:
    model, example = Answering(form).eval(), emptied()[1]
    fast(model, example, kernels=(Dense(), Mine("mine")), rounds=3)
    with pytest.warns(UserWarning, match="differ from the dense model's"):
        fast(model, example, kernels=(Dense(), Wrong("wrong")), rounds=3)


def test_outputs_that_cannot_be_compared_are_not_trusted() -> None:
    with pytest.warns(UserWarning, match="by inf"):
        fast(Answering(lambda y: 3).eval(), emptied()[1], kernels=(Dense(), Mine("mine")))


def test_chance_is_reported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten()).eval()
    model[1].register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    with pytest.warns(UserWarning, match="A forward that depends on its data or on chance"):
        fast(model, torch.ones(2, 8))


class Strange(nn.Module):
    """Layers that no other module can stand for, and one that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.named = nn.Linear(8, 8)
        self.asked = nn.Linear(8, 8)
        self.shared = self.again = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.plain = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hooked(self.parametrized(self.embedding(tokens)))
        x = self.tied(self.twice(self.twice(x)))
        x = self.attention(x, x, x)[0] + self.named(input=x)
        x = self.shared(self.again(x)).to(self.asked.weight.dtype)
        x = self.asked(x)
        y: Tensor = self.plain(self.lstm(x)[0])
        return y


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_strange_layers(sparsity: float) -> None:
    torch.manual_seed(0)
    model, tokens = Strange().eval(), torch.randint(0, 5, (3, 7))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "parametrizations" in name:
                continue  # a norm of zeros divides by zero
            p.mul_(torch.rand_like(p) >= sparsity)
    accelerated = fast(model, tokens)
    assert_same(accelerated, model, torch.randint(0, 5, (2, 4)))
    assert "plain.weight" in str(accelerated.kernel_report())


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 4), lambda: nn.Conv1d(8, 4, 1), lambda: nn.Sequential(nn.Conv1d(8, 4, 1))]
)
def test_models_without_layers_for_kernels_run_as_they_are(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(8, 8)
    accelerated = fast(model, example)
    assert_same(accelerated, model, torch.randn(8, 8))
    assert accelerated.kernel_report().layers == ()


def test_masks_of_torch_prune() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.9)
    model(torch.ones(1, 32))
    torch.nn.utils.prune.remove(model[0], "weight")
    assert_same(fast(model, torch.randn(2, 32)), model, torch.randn(3, 32))


def test_a_module_of_a_trainer(tmp_path: Path) -> None:
    model = support.Tiny()
    trainer = support.trainer([], tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, support.loader(), support.loader())
    model.eval()
    assert_same(fast(model, torch.ones(2, 8)), model, torch.randn(3, 8))
    assert model.trainer is trainer


def test_profiles_of_other_machines_are_refused(profiles: dict[str, DeviceProfile], tmp_path: Path) -> None:
    other = with_machine(profiles["mlp"], device="another")
    other.save(tmp_path / "p.json")
    for given in (other, tmp_path / "p.json", str(tmp_path / "p.json")):
        with pytest.raises(ValueError, match="its device is cpu 'another'"):
            accelerate(*mlp(), given)
    profiles["mlp"].save(tmp_path / "p.json")
    model, example = masked(mlp, Unstructured(), 0.9)
    assert_same(accelerate(model, example, tmp_path / "p.json", rounds=1), model, example)


def test_reports_say_where_zeros_never_pay(profiles: dict[str, DeviceProfile]) -> None:
    model, example = masked(mlp, Unstructured(), 0.9)
    text = str(fast(model, example, profiles["mlp"]).kernel_report())
    header, *rows, network = text.splitlines()
    assert header.split("  ")[0] == "layer"
    assert "pays from" in header
    assert network.startswith("network")
    assert len(rows) == 3
    assert all(row.rstrip().split()[-1] == "never" or 0 <= float(row.split()[-1]) <= 1 for row in rows)
    assert all("0.9" in row for row in rows)
