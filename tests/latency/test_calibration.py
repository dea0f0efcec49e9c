"""Calibration of tiny networks: complete, resumable, and of this machine alone."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import DeviceProfile, LatencyEstimator, Unstructured, calibrate, layer_table
from lightning_prune.kernels import CSR, KERNELS, Dense, Int8, LayerKernel, Shrunk, Workload
from lightning_prune.kernels.workload import runnable
from lightning_prune.latency import session as module
from lightning_prune.latency.calibration import NoisyMachineWarning
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.passes import measure_kernel
from lightning_prune.latency.profile import digest
from tests import support
from tests.latency.profiles import Counted, with_machine

FEW: tuple[LayerKernel, ...] = (CSR(), Shrunk())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread on a machine that seems to do nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "thread_time", time.perf_counter)
    monkeypatch.setattr(module, "_SLOW_S", math.inf)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which kernels are measured, in which passes."""
    found = []
    whole = measure_kernel

    def spy(kernel: LayerKernel, *args: Any, **options: Any) -> Any:
        passes = whole(kernel, *args, **options)
        if passes.measurements:
            found.append((kernel.name, options["source"]))
        return passes

    monkeypatch.setattr(module, "measure_kernel", spy)
    return found


def cnn() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model(torch.randn(4, 3, 6, 6))
    return model, torch.randn(2, 3, 6, 6)


class Rest(nn.Module):
    """Time of a pass that is spent in no layer, and that no noise hides."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x


def quick(model: nn.Module, example: Any, **options: Any) -> DeviceProfile:
    return calibrate(model, example, **{"rounds": 1, "spread": 0, "progress": False, "kernels": FEW, **options})


def test_measures_every_layer_with_every_kernel_that_runs_it() -> None:
    model, example = cnn()
    table = layer_table(model, example)
    profile = quick(model, example, spread=3, rounds=2)
    found = Counter((m.kernel, m.work) for m in profile.measurements if m.source == digest(table))
    kernels = {kernel.name: kernel for kernel in (Dense(), Dense("nhwc"), *FEW)}
    expected = {
        (name, work)
        for name, kernel in kernels.items()
        for works in runnable(table).values()
        for work in works
        if kernel.refuses(work, torch.float32, torch.device("cpu")) is None
    }
    assert set(found) == expected
    assert max(found.values()) <= 5
    assert set(profile.costs) == set(kernels)
    spread = {m.work for m in profile.measurements if m.source == "spread"}
    assert len(spread) >= 3
    assert not spread & {work for works in runnable(table).values() for work in works}
    network = profile.network(table)
    assert network is not None
    assert network.layers == table.names
    assert set(network.rectifiers_s) == {"nchw", "nhwc"}
    for found_s in network.rectifiers_s.values():  # the only ReLU is behind the first layer
        assert list(found_s) == ["0.weight"]
        assert 0 < found_s["0.weight"] < 1
    assert profile.rounds == 2
    assert profile.quiet


def test_faster_passes_say_what_a_pass_takes_beside_its_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1024), Rest(), nn.Linear(1024, 10))
    network = quick(model, torch.randn(64, 256), kernels=(Shrunk(),), rounds=4).network(
        layer_table(model, torch.randn(64, 256))
    )
    assert network is not None
    pairs = network.passes["nchw"]
    assert 0 < len(pairs) <= 5
    assert all(0 < layers_s < network.layers_s["nchw"] for layers_s, _ in pairs)
    rest_s, share = network.rest("nchw")
    assert 0 <= rest_s < network.dense_s["nchw"]
    assert 0 <= share < 1


def test_the_estimate_of_the_dense_network_is_its_time() -> None:
    layers, example = cnn()
    model = nn.Sequential(layers, Rest())
    table = layer_table(model, example)
    profile = quick(model, example, kernels=(), rounds=9)
    network = profile.network(table)
    assert network is not None
    estimator = LatencyEstimator(table, profile)
    dense = float(estimator.latency_s(torch.zeros(3, dtype=torch.float64)))
    assert dense == pytest.approx(min(network.dense_s.values()), rel=0.02)
    assert min(network.fixed_s.values()) > 0.001


@pytest.mark.parametrize(
    ("pass_s", "rounds", "expected"),
    [(0.1, 9, 9), (1 / 61, 9, 10), (1e-3, 9, 72), (0.0, 9, 72), (0.01, 1, 8), (1.0, 1, 1)],
)
def test_short_passes_are_timed_more_often(
    monkeypatch: pytest.MonkeyPatch, pass_s: float, rounds: int, expected: int
) -> None:
    monkeypatch.setattr(module.Session, "_whole_s", lambda session, run, rounds: pass_s)
    session = module.Session(Machine.here(torch.device("cpu"), torch.float32), FEW, rounds, None, None)
    assert session._rounds_of(lambda: None) == expected


def test_leaves_the_model_and_the_random_numbers_alone() -> None:
    model, example = cnn()
    model.train()
    model[2].register_forward_hook(lambda *_: None)  # type: ignore[index]
    state, hooks = copy.deepcopy(model.state_dict()), [dict(m._forward_hooks) for m in model.modules()]
    modules, inputs, random = list(model.modules()), example.clone(), torch.get_rng_state()
    quick(model, example, spread=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(example, inputs)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.add_(1.0))
        return y


def test_examples_are_not_written_to() -> None:
    example = torch.zeros(2, 8)
    quick(Overwriting(), example)
    assert not example.any()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.fc(self.fc(x)[:2]))
        return y


def test_layers_that_are_called_twice_cost_twice() -> None:
    model, example = Twice(), torch.ones(5, 8)
    table = layer_table(model, example)
    profile = quick(model, example)
    works = {m.work for m in profile.measurements if m.kernel == "dense"}
    assert works == {Workload("linear", 5, 8, 8), Workload("linear", 2, 8, 8), Workload("linear", 2, 8, 2)}
    estimator = LatencyEstimator(table, profile)
    times = estimator.kernel_latency_s(torch.zeros(2))[0, estimator.kernels.index("dense")]
    single = [m.seconds for m in profile.measurements if m.kernel == "dense" and m.work.outputs == 8]
    assert float(times) == pytest.approx(sum(single), rel=1e-4)


class Subclassed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Strange(nn.Module):
    """One layer for kernels among many that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.subclassed = Subclassed(8, 8)
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.functional = nn.Linear(8, 8)
        self.named = nn.Linear(8, 8)
        self.asked = nn.Linear(8, 8)
        self.shared = self.again = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.hooked(self.parametrized(self.subclassed(x)))
        x = self.named(input=nn.functional.linear(x, self.functional.weight))
        x = self.shared(self.again(x)).to(self.asked.weight.dtype)
        x = self.asked(x)
        y: Tensor = self.plain(x)
        return y


def test_other_layers_are_in_the_fixed_part() -> None:
    model, tokens = Strange(), torch.randint(0, 5, (3, 7))
    table = layer_table(model, tokens)
    profile = quick(model, tokens)
    network = profile.network(table)
    assert network is not None
    assert network.layers == ("plain.weight",)
    estimator = LatencyEstimator(table, profile)
    times = estimator.kernel_latency_s(torch.full((len(table),), 0.5))
    assert [name for name, row in zip(table.names, times, strict=True) if row.any()] == ["plain.weight"]


def test_a_module_of_a_trainer(tmp_path: Path) -> None:
    model = support.Tiny()
    trainer = support.trainer([], tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, support.loader(), support.loader())
    profile = quick(model, torch.ones(2, 8))
    assert profile.network(layer_table(model, torch.ones(2, 8))) is not None
    assert model.trainer is trainer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: (nn.Sequential(nn.Conv1d(2, 2, 1)), torch.ones(1, 2, 4)),
            "no layer to calibrate.*no kernel runs conv1d",
        ),
        (lambda: (nn.Sequential(nn.Linear(4, 4)), torch.ones(0, 4)), r"0\.weight: called with an empty input"),
        (lambda: (nn.Sequential(Subclassed(4, 4)), torch.ones(1, 4)), r"0\.weight: not called as a plain module"),
        (lambda: (nn.Linear(4, 4), torch.ones(1, 4)), r"weight: not called as a plain module"),
        (lambda: (nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 5)), "did not run on the example inputs"),
        (
            lambda: (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()), torch.ones(1, 4)),
            "one type on one device",
        ),
        (lambda: (nn.ReLU(), torch.ones(1, 4)), "one type on one device, ReLU has"),
    ],
)
def test_models_that_cannot_be_calibrated(make: Callable[[], tuple[nn.Module, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(*make())


@pytest.mark.parametrize("options", [{"rounds": 0}, {"spread": -1}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        calibrate(*cnn(), progress=False, **options)


class Interrupted(Counted):
    """Somebody presses Ctrl-C when its third module is built."""

    built = 0

    def build(self, layer: Any) -> nn.Module:
        self.built += 1
        if self.built == 3:
            raise KeyboardInterrupt
        return super().build(layer)


@pytest.mark.parametrize("spread", [0, 2])
def test_goes_on_where_it_was_interrupted(tmp_path: Path, measured: list[tuple[str, str]], spread: int) -> None:
    model, example = cnn()
    source, path = digest(layer_table(model, example)), tmp_path / "profile.json"
    kernels = (CSR(), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        quick(model, example, profile=path, kernels=kernels, spread=spread)
    before = list(measured)
    assert ("csr", source) in before
    assert not {name for name, _ in before} & {"counted"}
    part = DeviceProfile.load(path)
    kept = {(m.kernel, m.source) for m in part.measurements}
    assert kept == set(before)

    measured.clear()
    whole = quick(model, example, profile=path, kernels=(CSR(), Counted()), spread=spread)
    assert not set(before) & set(measured)
    assert ("counted", source) in measured
    assert set(whole.costs) == {"dense", "dense-nhwc", "csr", "counted"}
    times = [(m.kernel, m.work, m.sparsity, m.source) for m in whole.measurements]
    assert len(times) == len(set(times))
    same = {(m.kernel, m.work, m.sparsity, m.source): m.seconds for m in whole.measurements}
    assert all(same[m.kernel, m.work, m.sparsity, m.source] == m.seconds for m in part.measurements)
    assert torch.isfinite(LatencyEstimator(layer_table(model, example), whole).latency_s(torch.zeros(3)))

    measured.clear()
    again = quick(model, example, profile=path, kernels=(CSR(), Counted()), spread=spread)
    assert not measured
    assert again.measurements == DeviceProfile.load(path, (*KERNELS, Counted())).measurements


def test_a_kernel_that_needs_no_zeros_may_be_much_faster() -> None:
    model, example = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)), torch.randn(64, 1024)
    network = quick(model, example, kernels=(Int8(), Shrunk()), rounds=2).network(layer_table(model, example))
    assert network is not None
    # Linear layers know no layout, and neither kernel is for batches that lie last.
    assert set(network.passes) == set(network.dense_s) == {"nchw"}
    assert network.passes["nchw"] != ()


def test_an_interrupt_loses_no_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example, path = (
        nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)),
        torch.randn(64, 512),
        tmp_path / "p",
    )
    with pytest.raises(KeyboardInterrupt):
        quick(model, example, profile=path, kernels=(Shrunk(), Interrupted()), rounds=2)
    part = DeviceProfile.load(path).network(layer_table(model, example))
    whole = quick(model, example, profile=path, kernels=(Shrunk(),), rounds=2).network(layer_table(model, example))
    assert part is not None
    assert whole is not None
    assert len(part.passes["nchw"]) > 0
    assert whole.passes["nchw"] == part.passes["nchw"]


def test_interrupted_before_anything_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = cnn()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure_kernel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick(model, example, profile=tmp_path / "p.json")
    monkeypatch.undo()
    monkeypatch.setattr(time, "thread_time", time.perf_counter)
    assert quick(model, example, profile=tmp_path / "p.json").costs


def test_is_reused_across_networks(measured: list[tuple[str, str]]) -> None:
    model, example = cnn()
    first = quick(model, example, spread=2)
    other, rows = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.ones(3, 8)
    measured.clear()
    both = quick(other, rows, profile=first)
    assert {source for _, source in measured} == {digest(layer_table(other, rows))}
    assert both.network(layer_table(model, example)) == first.network(layer_table(model, example))
    assert set(first.measurements) < set(both.measurements)
    sparsity = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    before, after = (LatencyEstimator(layer_table(model, example), p).latency_s(sparsity) for p in (first, both))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=0)


def test_other_machines_are_refused_before_any_work(tmp_path: Path, measured: list[tuple[str, str]]) -> None:
    model, example = cnn()
    profile = quick(model, example)
    measured.clear()
    for changes, message in (
        ({"device": "another"}, "its device is cpu 'another'"),
        ({"threads": 3}, "its threads is 3, here it is 1"),
        ({"dtype": "float64"}, "its dtype is float64"),
    ):
        other = with_machine(profile, **changes)
        other.save(tmp_path / "p.json")
        for given in (other, tmp_path / "p.json", str(tmp_path / "p.json")):
            with pytest.raises(ValueError, match=message):
                quick(model, example, profile=given)
    assert not measured


def test_a_busy_machine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 0.5 * time.perf_counter())
    with pytest.warns(NoisyMachineWarning, match="busy during calibration"):
        profile = quick(*cnn(), kernels=())
    assert not profile.quiet
    torch.set_num_threads(2)  # the time of one thread says nothing about two
    assert quick(*cnn(), kernels=()).quiet


def test_a_slowed_processor_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_S", 0.0)
    monkeypatch.setattr(Pace, "counts", lambda pace, seconds, full: counted(pace, seconds))

    def counted(pace: Pace, seconds: float) -> bool:
        pace.spent_s += seconds
        pace.slow_s += share * seconds
        return True

    for share in (0.2, 0.3):
        with pytest.warns(NoisyMachineWarning, match="neighbours slowed") if share > 0.25 else nullcontext():
            profile = quick(*cnn(), kernels=())
        assert profile.quiet is (share < 0.25)


def test_a_kernel_without_its_library_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        profile = quick(*cnn())
    assert set(profile.costs) == {"dense", "dense-nhwc", "shrunk"}
    assert any("csr" in r.getMessage() and "MKL" in r.getMessage() for r in caplog.records)
    estimator = LatencyEstimator(layer_table(*cnn()), profile)
    assert torch.isfinite(estimator.latency_s(torch.full((3,), 0.5), Unstructured()))


def test_double_precision() -> None:
    model, example = nn.Sequential(nn.Linear(8, 8)).double(), torch.ones(2, 8, dtype=torch.float64)
    profile = quick(model, example)
    assert profile.machine.dtype == "float64"
    with pytest.raises(ValueError, match="dtype is float64, here it is float32"):
        quick(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8), profile=profile)


def test_progress_is_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quick(*cnn(), kernels=())
    assert capsys.readouterr().out == ""
    quick(*cnn(), kernels=(), progress=True)
    assert "Calibrating Sequential" in capsys.readouterr().out


def test_what_runs_in_one_pass_is_of_one_kind_and_alike_in_size() -> None:
    linear = [Workload("linear", 1, 2 * inputs, 10) for inputs in range(1, 41)]
    convolutions = [Workload("conv2d", 1, inputs, 8, (8, 8), (8, 8)) for inputs in range(1, 6)]
    shapes = [*linear[::2], *convolutions, *linear[1::2]]
    parts = module._parts(shapes)
    assert [len(part) for part in parts] == [5, 30, 10]
    assert parts[0] == convolutions
    assert [work for part in parts[1:] for work in part] == linear
