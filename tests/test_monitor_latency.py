"""What SparsityMonitor logs of latency when it has a device profile, judged by the files that loggers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune import DeviceProfile, Epochs, Filter, LatencyEstimator, OneShot, Pruning, SparsityMonitor
from lightning_prune import layer_table as table_of
from lightning_prune.callbacks._latency import TAGS
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.roofline import RooflineCost
from tests.latency.profiles import with_machine
from tests.support import BATCHES, EPOCHS, Tiny
from tests.test_cli import ON_CPU, build, configs
from tests.test_monitor import END, events, hparams, pruning, run, scalars

ACCELERATOR = Path(__file__).parents[1] / "configs" / "devices" / "zero_skipping_accelerator.json"
BOUND = {"macs_per_s": 1e6, "bandwidth_bytes_per_s": 1e15}


def device(*costs: RooflineCost) -> DeviceProfile:
    return DeviceProfile(Machine("analytic", "a thing far away", 1, "float32"), {cost.name: cost for cost in costs})


SKIPPING = device(RooflineCost("skipping", skips="unstructured", **BOUND))  # type: ignore[arg-type]


def logged(folder: Path) -> tuple[EventAccumulator, list[list[tuple[int, float]]]]:
    read = events(folder)
    return read, [scalars(read, tag) for tag in TAGS]


def test_latency_follows_the_zeros(tmp_path: Path) -> None:
    model = Tiny()
    trainer = run(tmp_path, [pruning(), SparsityMonitor(profile=SKIPPING)], model)
    read, (estimated, dense, speedup) = logged(tmp_path)
    sparsity = scalars(read, "sparsity/global")
    assert [step for step, _ in estimated] == [step for step, _ in sparsity]
    assert {step for step, _ in estimated} >= {BATCHES * epoch for epoch in range(EPOCHS + 1)}
    # 192 multiplications for one example, and each kept weight makes one.
    assert all(value == pytest.approx(0.192) for _, value in dense)
    for (_, now), (_, share), (_, ratio) in zip(estimated, sparsity, speedup, strict=True):
        assert now == pytest.approx(0.192 * (1 - share), rel=1e-3)
        assert ratio == pytest.approx(0.192 / now)
    assert (estimated[0][0], estimated[-1][0]) == (0, END)
    assert estimated[-1][1] == pytest.approx(0.192 / 4)
    assert float(trainer.callback_metrics["latency/estimated_ms"]) == pytest.approx(0.192 / 4)
    (text,) = read.Tensors("summary/text_summary")
    line = text.tensor_proto.string_val[0].decode().splitlines()[-1]
    assert line.startswith("estimated latency on a thing far away (1 thread(s), float32, first input 1x8): 0.048 ms")
    params, shown = hparams(read)
    assert params["latency/device"] == "a thing far away"
    assert params["latency/kind"] == "analytic"
    assert set(TAGS) <= set(shown)


def test_the_estimate_is_what_the_estimator_says_of_the_masks(tmp_path: Path) -> None:
    model = Tiny()
    whole = RooflineCost("whole", skips="filter", **BOUND)  # type: ignore[arg-type]
    profile = device(whole)
    callbacks: list[Any] = [
        Pruning({"net.0.weight": 0.5}, OneShot(), granularity=Filter(), begin=Epochs(1), end=Epochs(2)),
        Pruning({"net.2.weight": 0.5}, OneShot(), begin=Epochs(1), end=Epochs(2)),
        SparsityMonitor(profile=profile, example_inputs=torch.zeros(6, 8)),
    ]
    run(tmp_path, callbacks, model)
    _, (estimated, dense, _) = logged(tmp_path)
    # A kernel that skips filters and channels gains from the first layer; in the second, one input in 2^4 is silent.
    assert dense[-1][1] == pytest.approx(6 * 0.192)
    assert estimated[-1][1] == pytest.approx(6 * (0.064 + 0.064 * 15 / 16), rel=1e-3)
    table = table_of(model, torch.zeros(6, 8))
    own = LatencyEstimator(table, profile).latency_s(torch.tensor([0.5, 0.5]), [Filter(), callbacks[1].granularity])
    assert estimated[-1][1] == pytest.approx(float(own) * 1e3)


def test_without_pruning_and_from_the_first_batch(tmp_path: Path) -> None:
    model = Tiny()
    with torch.no_grad():
        model.net[0].weight[:4] = 0
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="latency/estimated_ms", mode="min")
    options = {"enable_checkpointing": True, "max_epochs": 1}
    run(tmp_path, [SparsityMonitor(profile=str(ACCELERATOR)), checkpoint], model, **options)
    read, (estimated, _, speedup) = logged(tmp_path)
    assert estimated[0][0] == 0
    assert speedup[0][1] > 1
    assert checkpoint.best_model_score is not None
    assert hparams(read)[0]["latency/device"] == DeviceProfile.load(ACCELERATOR).machine.device


def test_another_machine_is_welcome(tmp_path: Path) -> None:
    measured = with_machine(SKIPPING, kind="cpu", device="another CPU", threads=64)
    run(tmp_path, [SparsityMonitor(profile=measured)], max_epochs=1)
    assert hparams(events(tmp_path))[0]["latency/threads"] == 64


def test_without_a_profile_nothing_is_logged(tmp_path: Path) -> None:
    run(tmp_path, [SparsityMonitor()], max_epochs=1)
    assert not set(TAGS) & set(events(tmp_path).Tags()["scalars"])


def test_what_cannot_be_estimated_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no device profile at 'none\.json'; write one with"):
        SparsityMonitor(profile="none.json")
    (tmp_path / "old.json").write_text('{"schema": "lightning-prune/device-profile/0"}')
    with pytest.raises(ValueError, match="device-profile/0"):
        SparsityMonitor(profile=tmp_path / "old.json")

    class Watched(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("training has begun")

    model = Watched()
    model.example_input_array = torch.zeros(2, 8)
    half = RooflineCost("2:4", skips="2:4", **BOUND)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no kernel for net\.0\.weight"):
        run(tmp_path, [SparsityMonitor(profile=device(half))], model)
    with pytest.raises(ValueError, match=r"cannot estimate latency\.(?s:.*)give SparsityMonitor"):
        run(tmp_path, [SparsityMonitor(profile=SKIPPING, example_inputs=torch.zeros(2, 9))], Watched())


def test_a_configuration_names_the_profile(tmp_path: Path) -> None:
    monitor = {"class_path": "SparsityMonitor", "init_args": {"profile": str(ACCELERATOR)}}
    path = tmp_path / "monitor.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [monitor]}}))
    cli = build(*configs("digits"), f"--config={path}", *ON_CPU)
    [found] = [each for each in vars(cli.trainer)["callbacks"] if isinstance(each, SparsityMonitor)]
    assert found.profile == DeviceProfile.load(ACCELERATOR)
    saved = yaml.safe_load(cli.parser.dump(cli.config))["trainer"]["callbacks"]
    [options] = [each["init_args"] for each in saved if each["class_path"].endswith("SparsityMonitor")]
    assert options["profile"] == str(ACCELERATOR)
