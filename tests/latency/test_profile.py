"""The device profile: kept in a file, refused where it does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import DeviceProfile, Filter, LatencyEstimator, Unstructured
from lightning_prune.kernels import KERNELS, Workload
from lightning_prune.latency import profile as module
from lightning_prune.latency.fitted import HeldOutError, fitted_cost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.profile import SCHEMA, digest
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.layers import layer_table
from tests.latency.profiles import MACHINE, Counted, hand_made, mlp, record, residual, with_machine

WORKS = tuple(Workload("linear", 4, inputs, outputs) for inputs in (16, 48, 160) for outputs in (8, 32, 200))


def whole() -> tuple[Any, DeviceProfile]:
    """A profile with something of everything."""
    table, networks = record(*residual())
    networks = {
        key: replace(
            network,
            passes={"nchw": ((5e-4, 6e-4), (1e-4, 2.5e-4))},
            rectifiers_s={"nchw": {network.layers[0]: 1e-6}},
        )
        for key, network in networks.items()
    }
    counted = Counted()
    measured = tuple(counted.measured(WORKS, (0.0, 0.5, 0.9)))
    base = hand_made(networks)
    costs = {**base.costs, "counted": fitted_cost(counted, measured), "roof": RooflineCost("roof", 1e9, 1e9)}
    held_out = {"counted": HeldOutError(9, 0.02, 0.98)}
    return table, DeviceProfile(MACHINE, costs, measured, networks, held_out, 9, False)


def test_round_trip(tmp_path: Path) -> None:
    table, profile = whole()
    kernels = (*KERNELS, Counted())
    profile.save(tmp_path / "deep" / "profile.json")
    loaded = DeviceProfile.load(tmp_path / "deep" / "profile.json", kernels)
    assert loaded.machine == profile.machine
    assert loaded.networks == profile.networks
    assert loaded.held_out == profile.held_out
    assert (loaded.rounds, loaded.quiet) == (9, False)
    assert [(m.kernel, m.work, m.sparsity, m.living, m.source) for m in loaded.measurements] == [
        (m.kernel, m.work, m.sparsity, m.living, m.source) for m in profile.measurements
    ]
    sparsity = torch.rand(20, len(table), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for pattern in (Unstructured(), Filter()):
        before, after = (LatencyEstimator(table, p).kernel_latency_s(sparsity, pattern) for p in (profile, loaded))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=0)  # times have four digits in the file
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "deep" / "profile.json").read_bytes()
    again = DeviceProfile.load(tmp_path / "again.json", kernels)
    assert torch.equal(
        LatencyEstimator(table, again).latency_s(sparsity), LatencyEstimator(table, loaded).latency_s(sparsity)
    )


def test_unknown_kernels_are_named(tmp_path: Path) -> None:
    whole()[1].save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"p\.json: .*costs of kernel 'counted'.*kernels=\(\*ALL_KERNELS, yours\)"):
        DeviceProfile.load(tmp_path / "p.json")


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    hand_made().save(path)
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        whole()[1].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a whole device profile"),
        ("{", "not a whole device profile"),
        ("PK\x03\x04", "not a whole device profile"),
        ("3", "this file None"),
        ("[]", "this file None"),
        ("{}", "this file None"),
        ('{"schema": "lightning-prune/device-profile/999"}', r"device-profile/999'; calibrate again with this version"),
        (f'{{"schema": "{SCHEMA}"}}', "damaged device profile"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        DeviceProfile.load(tmp_path / "p.json")
    assert "p.json" in str(error.value)


def test_truncated_and_binary_files_are_refused(tmp_path: Path) -> None:
    whole()[1].save(tmp_path / "p.json")
    content = (tmp_path / "p.json").read_bytes()
    for size in range(0, len(content) - 2, max(len(content) // 40, 1)):
        (tmp_path / "p.json").write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a whole device profile"):
            DeviceProfile.load(tmp_path / "p.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00\x80" * 50)
    with pytest.raises(ValueError, match="not a whole device profile"):
        DeviceProfile.load(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError):
        DeviceProfile.load(tmp_path / "missing.json")


def first_network(data: dict[str, Any]) -> dict[str, Any]:
    network: dict[str, Any] = next(iter(data["networks"].values()))
    return network


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no measurements": lambda data: data.pop("measurements"),
    "a kind of layer": lambda data: data["measurements"][0]["work"].update(kind="conv9d"),
    "a field of a layer": lambda data: data["measurements"][0]["work"].update(wheels=4),
    "a negative time": lambda data: data["measurements"][0]["times"]["counted"][0].__setitem__(2, -1.0),
    "an infinite time": lambda data: data["measurements"][0]["times"]["counted"][0].__setitem__(2, float("inf")),
    "a number less": lambda data: data["measurements"][0]["times"]["counted"][0].pop(),
    "a word for a time": lambda data: data["measurements"][0]["times"]["counted"][0].__setitem__(2, "fast"),
    "a list for a map": lambda data: data.update(costs=[]),
    "a negative coefficient": lambda data: data["costs"]["dense"]["families"]["linear"]["coefficients"].update(
        calls=-1.0
    ),
    "no coefficient": lambda data: data["costs"]["dense"]["families"]["linear"]["coefficients"].update(
        calls=float("nan")
    ),
    "a rate of 0": lambda data: data["costs"]["roof"].update(macs_per_s=0.0),
    "a field of a rate": lambda data: data["costs"]["roof"].update(wheels=4),
    "threads": lambda data: data["machine"].update(threads=0),
    "a type of numbers": lambda data: data["machine"].update(dtype="float31"),
    "no fixed part": lambda data: first_network(data).pop("fixed_s"),
    "a fixed part that is none": lambda data: first_network(data)["fixed_s"].update(nchw=float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entries_are_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(json.dumps(whole()[1].as_dict()))
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"p\.json"):
        DeviceProfile.load(tmp_path / "p.json", (*KERNELS, Counted()))


class TestMachine:
    @pytest.mark.parametrize(
        ("changes", "both"),
        [
            ({"device": "another processor"}, ("'a processor'", "'another processor'")),
            ({"kind": "cuda"}, ("cpu 'a processor'", "cuda 'a processor'")),
            ({"threads": 4}, ("threads is 1", "here it is 4")),
            ({"dtype": "float64"}, ("dtype is float32", "here it is float64")),
            ({"versions": {"torch": "3.0.1"}}, ("torch is 2.9.0", "here it is 3.0.1")),
        ],
        ids=lambda value: str(value),
    )
    def test_others_are_refused_by_name(self, changes: dict[str, Any], both: tuple[str, str]) -> None:
        profile = hand_made()
        profile.require(MACHINE)
        with pytest.raises(ValueError, match=r"another machine or setting: .*calibrate on this one") as error:
            profile.require(replace(MACHINE, **changes))
        assert all(part in str(error.value) for part in both)
        with_machine(profile, **changes).require(replace(MACHINE, **changes))

    def test_builds_and_other_libraries_do_not_matter(self) -> None:
        hand_made().require(replace(MACHINE, versions={"torch": "2.9.0+cu130", "lightning-prune": "9"}))

    def test_here_is_here(self) -> None:
        here = Machine.here(torch.device("cpu"), torch.float64)
        assert (here.kind, here.threads, here.dtype) == ("cpu", torch.get_num_threads(), "float64")
        assert here.versions["torch"] == torch.__version__
        assert here.device
        assert here.torch_dtype == torch.float64
        assert not here.difference(Machine.here(torch.device("cpu"), torch.float64))

    @pytest.mark.parametrize("wrong", [{"threads": 0}, {"dtype": "float33"}, {"dtype": "nn"}])
    def test_refuses(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            replace(MACHINE, **wrong)


class TestNetworks:
    def test_are_known_by_their_shapes(self) -> None:
        table, networks = record(*residual())
        profile = hand_made(networks)
        model, example = residual()
        assert profile.network(layer_table(model, example)) is not None
        assert profile.network(layer_table(model, example[:1])) is None
        assert profile.network(layer_table(*mlp())) is None
        assert digest(table) == digest(layer_table(model, example)) != digest(layer_table(model, example[:1]))

    def test_others_have_a_fixed_part_in_proportion(self) -> None:
        table, networks = record(*residual(), fixed_s=2e-4)
        (network,) = networks.values()
        known, other = LatencyEstimator(table, hand_made(networks)), layer_table(*mlp())
        assert known.fixed_is_measured
        assert known.fixed_s("nchw") == 2e-4
        estimator = LatencyEstimator(other, hand_made(networks))
        assert not estimator.fixed_is_measured
        outputs = 4 * (96 + 32 + 8)
        assert estimator.fixed_s("nchw") == pytest.approx(2e-4 * outputs / network.output_elements)
        assert LatencyEstimator(other, hand_made()).fixed_s("nchw") == 0.0

    def test_the_rest_of_a_pass_is_a_line_through_those_that_were_timed(self) -> None:
        _, networks = record(*residual(), fixed_s=2e-4)
        (network,) = networks.values()
        assert list(network.rest("nchw")) == pytest.approx([2e-4, 0.0])
        # One of four passes was disturbed, and does not matter.
        layers_s = network.layers_s["nchw"]
        wholes = tuple((share * layers_s, 1e-4 + 1.2 * share * layers_s) for share in (0.6, 0.3, 0.1))
        found = replace(
            network,
            dense_s={"nchw": 1e-4 + 1.2 * layers_s},
            passes={"nchw": (*wholes, (0.2 * layers_s, 9 * layers_s))},
        )
        assert found.rest("nchw") == pytest.approx((1e-4, 0.2))

    def test_layers_that_overlap_take_less_than_they_add_up_to(self) -> None:
        _, networks = record(*residual())
        (network,) = networks.values()
        found = replace(network, dense_s={"nchw": 5e-4}, layers_s={"nchw": 1e-3}, passes={"nchw": ((8e-4, 4.5e-4),)})
        rest_s, share = found.rest("nchw")
        assert rest_s == 0.0
        assert (1 + share) * 1e-3 == pytest.approx(5e-4)

    def test_a_schema_is_a_promise(self) -> None:
        assert module.SCHEMA == "lightning-prune/device-profile/1"
