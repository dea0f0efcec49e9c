"""The estimator: equal to plain loops over layers, kernels and layouts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import NM, Block, DeviceProfile, Filter, LatencyEstimator, Unstructured, layer_table
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import Dense, Occupancy, Workload, expected_occupancy
from lightning_prune.kernels.workload import runnable
from lightning_prune.latency import estimator as module
from lightning_prune.latency.curves import SPARSITY_KNOTS, filter_knots
from lightning_prune.latency.estimator import MARGIN
from lightning_prune.latency.fitted import FamilyFit, FittedCost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.roofline import PATTERNS, RooflineCost
from tests.latency.profiles import Counted, hand_made, mlp, record, residual

PER_LAYER = (Unstructured(), Block(4, 4), Unstructured(), Block(8, 8), Block(4, 4), Unstructured())


def analytic(**costs: RooflineCost) -> DeviceProfile:
    return DeviceProfile(Machine("analytic", "by hand", 1, "float32"), costs)


ANALYTIC = analytic(
    dense=RooflineCost("dense", 1e9, 1e10, 1e-6),
    skipping=RooflineCost("skipping", 1e9, 1e10, 5e-6, efficiency=0.7, skips="unstructured", stores="compressed"),
    blocks=RooflineCost("blocks", 1e9, 1e10, 3e-6, efficiency=0.9, skips="block4", index_bits=4),
)


def scalar(profile: DeviceProfile, table: Any, sparsity: Sequence[float], patterns: Sequence[Granularity]) -> float:
    """The documented sum, one number at a time."""
    works = runnable(table)
    network = profile.network(table)
    totals = []
    for layout in profile.layouts:
        total = 0.0
        for spec, s, pattern in zip(table, sparsity, patterns, strict=True):
            if spec.name not in works or (network is not None and spec.name not in network.layers):
                continue
            at_knots: dict[str, list[float]] = {}
            stairs = isinstance(pattern, Filter) and spec.kind == "conv2d"
            knots = filter_knots(spec.weight_shape[0]) if stairs else torch.tensor(SPARSITY_KNOTS).double()
            plain = [math.inf] * len(knots)
            for name, cost in profile.costs.items():
                fits = cost.layout is None or spec.kind == "linear" or cost.layout == layout
                if not fits or not cost.serves(pattern) or any(profile.refuses(cost, w) for w in works[spec.name]):
                    continue
                left = expected_occupancy(pattern, knots, spec.weight_shape)
                at_knots[name] = sum(cost.seconds(work, left) for work in works[spec.name]).tolist()  # type: ignore[union-attr]
                sparse = cost.kernel.uses_sparsity if isinstance(cost, FittedCost) else cost.skips != "nothing"
                if not sparse:
                    plain = [min(a, b) for a, b in zip(plain, at_knots[name], strict=True)]
            best = math.inf
            for times in at_knots.values():
                honest = [
                    max(t, dense) if math.isfinite(dense) and t > MARGIN * dense else t
                    for t, dense in zip(times, plain, strict=True)
                ]
                best = min(best, float(np.interp(s, knots.numpy(), honest)))
            total += best
        rest_s, share = (0.0, 0.0) if network is None else network.rest(layout)
        totals.append(rest_s + (1 + share) * total)
    return min(totals)


def profiles() -> list[tuple[str, Any, DeviceProfile]]:
    found = []
    for name, (model, example) in {"residual": residual(), "mlp": mlp()}.items():
        table, networks = record(model, example)
        found += [
            (f"{name}, analytic", table, ANALYTIC),
            (f"{name}, fitted", table, hand_made()),
            (f"{name}, calibrated", table, hand_made(networks)),
        ]
    return found


CASES = profiles()
each = pytest.mark.parametrize(("table", "profile"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 4), Filter(), "per layer"], ids=str)
def test_equals_plain_loops(table: Any, profile: DeviceProfile, dtype: torch.dtype, pattern: Any) -> None:
    if profile.networks and not isinstance(pattern, Unstructured | NM):
        return  # these silence whole filters, which has tests of its own
    if pattern == "per layer":
        pattern = PER_LAYER[: len(table)]
    patterns = (pattern,) * len(table) if isinstance(pattern, Granularity) else pattern
    sparsity = torch.rand(12, len(table), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    sparsity[0], sparsity[1], sparsity[2] = 0.0, 1.0, 0.99
    found = LatencyEstimator(table, profile).latency_s(sparsity, pattern)
    assert found.dtype == dtype
    for row, seconds in zip(sparsity.tolist(), found.tolist(), strict=True):
        assert seconds == pytest.approx(scalar(profile, table, row, patterns), rel=1e-6, abs=0)


@each
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Filter()], ids=str)
def test_best_kernels_make_up_the_latency(table: Any, profile: DeviceProfile, pattern: Granularity) -> None:
    estimator = LatencyEstimator(table, profile)
    sparsity = torch.rand(25, len(table), generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 0.3
    sparsity[0] = 0.0
    total = estimator.latency_s(sparsity, pattern)
    times = estimator.kernel_latency_s(sparsity, pattern)
    best = estimator.best_kernels(sparsity, pattern)
    assert times.shape == (25, len(table), len(estimator.kernels))
    assert best.shape == (25, len(table))
    for n in range(25):
        layout = estimator.best_layout(sparsity[n], pattern)
        chosen = [profile.costs[estimator.kernels[k]] for k in best[n].tolist()]
        kinds = [spec.kind for spec in table]
        assert {cost.layout for cost, kind in zip(chosen, kinds, strict=True) if kind == "conv2d"} <= {layout, None}
        layers_s = sum(float(times[n, row, k]) for row, k in enumerate(best[n].tolist()))
        assert float(total[n]) == pytest.approx(estimator.whole_s(layers_s, layout), rel=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = layer_table(*mlp())
    estimator = LatencyEstimator(table, hand_made())
    sparsity = torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert estimator.latency_s(sparsity).shape == shape
    assert estimator.kernel_latency_s(sparsity).shape == (*shape, 3, len(estimator.kernels))
    assert estimator.best_kernels(sparsity).shape == (*shape, 3)
    assert estimator.macs(sparsity).shape == estimator.nonzeros(sparsity).shape == shape
    assert estimator.weight_bytes(sparsity).shape == shape


def test_strided_and_chunked_candidates_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = residual()
    table, networks = record(model, example)
    sparsity = torch.rand(6, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64).t()
    whole = LatencyEstimator(table, hand_made(networks))
    results = [f(sparsity, Filter()) for f in (whole.latency_s, whole.kernel_latency_s, whole.best_kernels)]
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    few = LatencyEstimator(table, hand_made(networks))
    for result, f in zip(results, (few.latency_s, few.kernel_latency_s, few.best_kernels), strict=True):
        torch.testing.assert_close(f(sparsity, Filter()), result, rtol=1e-12, atol=0)
        torch.testing.assert_close(f(sparsity[7], Filter()), result[7], rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_candidates() -> None:
    code = """if True:
        import resource, torch
        from tests.latency.profiles import hand_made, mlp
        from lightning_prune import LatencyEstimator, layer_table
        torch.set_num_threads(1)
        estimator = LatencyEstimator(layer_table(*mlp()), hand_made())
        estimator.latency_s(torch.rand(5000, 3))
        sparsity = torch.rand(500_000, 3)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        estimator.latency_s(sparsity)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    kibibytes = int(ran.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 20_000  # the curves of all candidates at once would take 600 MB, the result takes 2


def test_refused_kernels_take_forever_and_other_layers_nothing() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 6), nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3)
    )
    table = layer_table(model, torch.ones(1, 6, 8, 8))
    estimator = LatencyEstimator(table, hand_made())
    times = dict(zip(estimator.kernels, estimator.kernel_latency_s(torch.full((3,), 0.5)).t(), strict=True))
    assert table.names == ("0.weight", "2.weight", "4.weight")
    assert times["bsr-4"][:2].isinf().all()  # 6 inputs, 6 outputs
    assert times["dense-nhwc"][0].isfinite()
    assert times["dense-nhwc"][1].isinf()
    assert times["csr"][:2].isfinite().all()
    assert all(column[2] == 0.0 for column in times.values())
    assert estimator.best_kernels(torch.zeros(3))[2] == -1
    assert estimator.break_even()[2].isnan()


def test_a_network_without_layers_for_kernels_is_its_fixed_part() -> None:
    table = layer_table(nn.Conv1d(2, 4, 3), torch.ones(1, 2, 8))
    estimator = LatencyEstimator(table, hand_made())
    assert estimator.latency_s(torch.zeros(5, 1)).tolist() == [0.0] * 5
    assert estimator.best_kernels(torch.zeros(5, 1)).tolist() == [[-1]] * 5
    assert estimator.best_layout(torch.zeros(1)) == "nchw"


class HalfOnly(Counted):
    """Runs layers of which half is gone, and no others."""

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        return {"calls": torch.where(left.density <= 0.5, 1.0, math.inf), "macs": work.macs / 2.0}


@pytest.mark.parametrize("calls", [0.0, 1e-7])
def test_times_that_a_kernel_does_not_have_do_not_leak(calls: float) -> None:
    table = layer_table(*mlp())
    base = hand_made()
    half = FittedCost(HalfOnly("half"), {"linear": FamilyFit({"calls": calls, "macs": 1e-12}, None)}, [])
    profile = replace(base, costs={**base.costs, "half": half})
    without, estimator = LatencyEstimator(table, base), LatencyEstimator(table, profile)
    low, high = torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.8])
    for s in (low, high):
        s = s[:, None].expand(-1, 3)
        assert estimator.latency_s(s).isfinite().all()
        wins = estimator.best_kernels(s) == estimator.kernels.index("half")
        assert bool(wins.all()) == (s is not low and bool((s >= 0.5).all()))
        if not wins.any():
            assert torch.equal(estimator.latency_s(s), without.latency_s(s))
    assert (
        float(half.seconds(Workload("linear", 1, 8, 8), expected_occupancy(Unstructured(), torch.zeros(()), (8, 8))))
        == math.inf
    )


def test_patterns_that_no_layout_serves_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    table = layer_table(model, torch.ones(1, 8, 8, 8))
    one = FittedCost(Dense(), {"pointwise": FamilyFit({"calls": 1e-6}, None)}, [])
    other = FittedCost(Dense("nhwc"), {"convolution": FamilyFit({"calls": 1e-6}, None)}, [])
    profile = replace(hand_made(), costs={cost.name: cost for cost in (one, other)})
    with pytest.raises(ValueError, match=r"in no memory layout kernels for all layers .*calibrate this network"):
        LatencyEstimator(table, profile).latency_s(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no kernel for 1\.weight \(conv2d 8->8 k3x3.*profile=\.\.\."):
        LatencyEstimator(table, replace(profile, costs={"dense": one}))


@each
def test_counts_are_those_of_the_table(table: Any, profile: DeviceProfile) -> None:
    estimator = LatencyEstimator(table, profile)
    sparsity = torch.rand(20, len(table), generator=torch.Generator().manual_seed(0))
    sparsity[0], sparsity[1] = 0.0, 1.0
    for row, macs, nonzeros, size in zip(
        sparsity, estimator.macs(sparsity), estimator.nonzeros(sparsity), estimator.weight_bytes(sparsity), strict=True
    ):
        plan = dict(zip(table.names, row.tolist(), strict=True))
        assert float(macs) == table.macs(plan)
        assert float(nonzeros) == table.nonzeros(plan)
        kept = [spec.nonzeros(s) for spec, s in zip(table, row.tolist(), strict=True)]
        assert float(size) == sum(min(8 * k, 4 * spec.params) for k, spec in zip(kept, table, strict=True))


def test_break_even_is_where_a_sparse_kernel_passes_dense() -> None:
    table = layer_table(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10)), torch.ones(100, 1000))
    profile = analytic(
        dense=RooflineCost("dense", 1e9, 1e15),
        sparse=RooflineCost("sparse", 1e9, 1e15, overhead_s=5e-3, efficiency=0.4, skips="unstructured"),
    )
    # 0.005 + 0.25 (1 - s) < 0.98 * 0.1 from 1 - s = 0.372; the second layer takes 1 ms dense, less than the overhead.
    first, second = LatencyEstimator(table, profile).break_even().tolist()
    assert first == pytest.approx(0.628, abs=0.002)
    assert second == math.inf


def test_a_kernel_may_be_faster_than_dense_without_a_zero() -> None:
    table = layer_table(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10)), torch.ones(100, 1000))
    dense = RooflineCost("dense", 1e9, 1e15)
    sparse = RooflineCost("sparse", 2e9, 1e15, overhead_s=1e-3, skips="unstructured")
    estimator = LatencyEstimator(table, analytic(dense=dense, sparse=sparse))
    # Dense 0.1 s and 1 ms; sparse 51 ms and 1.5 ms.
    assert estimator.dense_latency_s == pytest.approx(0.101)
    assert float(estimator.latency_s(torch.zeros(2))) == pytest.approx(0.052)
    assert estimator.break_even().tolist() == [0.0, math.inf]
    pruned, alone = estimator.pruned_alone_s(torch.tensor([0.0, 0.5]))
    assert alone.tolist() == pytest.approx([0.1, 0.001])
    assert pruned.flatten().tolist() == pytest.approx([0.051, 0.001, 0.026, 0.001])
    only = LatencyEstimator(table, analytic(sparse=sparse))
    assert only.dense_latency_s == pytest.approx(0.0525)


def test_more_sparsity_is_not_slower() -> None:
    for _, table, profile in CASES:
        estimator = LatencyEstimator(table, profile)
        grid = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None].expand(-1, len(table))
        for pattern in (Unstructured(), Block(4, 4), Filter()):
            times = estimator.latency_s(grid, pattern)
            assert (times.diff() <= 1e-6 * times[0]).all()  # products of curves are interpolated
            assert times[-1] < times[0]


class TestSilentFilters:
    """What whole filters that are gone mean for the layers after them."""

    model, example = residual()
    table, networks = record(model, example)
    # Rows and columns count alike, and nothing else.
    profile = DeviceProfile(
        Machine("analytic", "by hand", 1, "float32"),
        {"shrinking": RooflineCost("shrinking", 1e9, 1e15, skips="filter")},
        (),
        networks,
    )
    estimator = LatencyEstimator(table, profile)

    def shares(self, removed: dict[str, float], pattern: Any = None) -> dict[str, float]:
        """Time of each layer as a share of its dense time."""
        sparsity = torch.zeros(2, len(self.table), dtype=torch.float64)
        for name, value in removed.items():
            sparsity[1, self.table.names.index(f"{name}.weight")] = value
        times = self.estimator.kernel_latency_s(sparsity, pattern or Filter())[..., 0]
        return {
            name.removesuffix(".weight"): float(times[1, row] / times[0, row])
            for row, name in enumerate(self.table.names)
        }

    def test_shrink_the_layer_that_they_feed(self) -> None:
        shares = self.shares({"one": 0.5})
        assert shares["one"] == pytest.approx(0.5, rel=0.01)
        assert shares["two"] == pytest.approx(0.5, rel=0.05)
        assert shares["stem"] == shares["depthwise"] == shares["point"] == shares["fc"] == pytest.approx(1.0)

    def test_sums_are_silent_where_all_terms_are(self) -> None:
        assert self.shares({"stem": 0.5})["depthwise"] == pytest.approx(1.0)
        assert self.shares({"stem": 0.5})["one"] == pytest.approx(0.5, rel=0.05)
        assert self.shares({"two": 0.5})["depthwise"] == pytest.approx(1.0)
        both = self.shares({"stem": 0.5, "two": 0.5})
        assert both["point"] == pytest.approx(0.75, rel=0.05)
        assert self.shares({"stem": 1.0, "two": 1.0})["point"] < 0.2

    def test_depthwise_layers_pass_silence_on(self) -> None:
        shares = self.shares({"depthwise": 0.5})
        assert shares["point"] == pytest.approx(0.5, rel=0.05)
        together = self.shares({"stem": 0.5, "two": 0.5, "depthwise": 0.5})
        assert together["point"] == pytest.approx(0.5 * 0.75, rel=0.08)

    def test_zeros_anywhere_silence_nothing(self) -> None:
        shares = self.shares({"one": 0.9, "depthwise": 0.9}, Unstructured())
        assert shares["two"] == shares["point"] == pytest.approx(1.0)

    def test_patterns_of_other_layers_do_not_matter(self) -> None:
        patterns = [Filter() if name == "one.weight" else Unstructured() for name in self.table.names]
        shares = self.shares({"one": 0.5, "stem": 0.5}, patterns)
        assert shares["two"] == pytest.approx(0.5, rel=0.05)
        assert shares["one"] == pytest.approx(0.5, rel=0.01)


class TestErrors:
    estimator = LatencyEstimator(layer_table(*mlp()), ANALYTIC)

    @pytest.mark.parametrize("value", [math.nan, -0.01, 1.01, math.inf])
    def test_fractions_that_are_none(self, value: float) -> None:
        sparsity = torch.zeros(2, 3, 3)
        sparsity[1, 2, 1] = value
        for method in (
            self.estimator.latency_s,
            self.estimator.kernel_latency_s,
            self.estimator.best_kernels,
            self.estimator.macs,
            self.estimator.nonzeros,
            self.estimator.weight_bytes,
        ):
            with pytest.raises(
                ValueError, match=r"layer '2\.weight' is the fraction removed, in \[0, 1\], got"
            ) as error:
                method(sparsity)
            assert f"got {value} (candidate (1, 2))" in str(error.value)

    @pytest.mark.parametrize(
        "wrong",
        [
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.bool),
            torch.zeros(2),
            torch.zeros(3, 4),
            torch.zeros(()),
        ],
        ids=str,
    )
    def test_other_tensors(self, wrong: Tensor) -> None:
        with pytest.raises(ValueError, match=r"tensor \[\.\.\., 3\], a fraction for each layer") as error:
            self.estimator.latency_s(wrong)
        assert str(tuple(wrong.shape)) in str(error.value)
        assert str(wrong.dtype) in str(error.value)

    def test_other_numbers_of_patterns(self) -> None:
        with pytest.raises(ValueError, match="one for each of the 3 layers, got 2"):
            self.estimator.latency_s(torch.zeros(3), [Filter(), Unstructured()])


class TestRooflineCost:
    def test_is_the_slower_of_computing_and_moving(self) -> None:
        work = Workload("linear", 10, 100, 50)
        left = expected_occupancy(Unstructured(), torch.tensor([0.0, 0.9]).double(), work.weight_shape)
        computing = RooflineCost("a", 1e6, 1e15, 1e-3, efficiency=0.5, skips="unstructured")
        assert computing.seconds(work, left).tolist() == pytest.approx([0.101, 0.011])
        moving = RooflineCost("b", 1e15, 1e6, stores="compressed", bits=8, index_bits=8)
        # 5000 weights of 2 bytes, 1000 inputs and 500 outputs of 1 byte
        assert moving.seconds(work, left).tolist() == pytest.approx([0.0115, 0.0025])
        dense = RooflineCost("c", 1e15, 1e6, bits=8, index_bits=8)
        assert dense.seconds(work, left).tolist() == pytest.approx([0.0065, 0.0065])

    @pytest.mark.parametrize("skips", list(PATTERNS))
    def test_skips_what_its_pattern_leaves_out(self, skips: str) -> None:
        work, pattern = Workload("linear", 64, 64, 64), PATTERNS[skips]
        cost = RooflineCost("a", 1.0, 1e30, skips=skips)
        left = expected_occupancy(pattern, torch.tensor([0.0, 0.5]).double(), work.weight_shape)
        assert (cost.seconds(work, left) / work.macs).tolist() == pytest.approx([1.0, 0.5])
        assert cost.serves(pattern)
        assert cost.serves(Unstructured()) == (skips != "2:4")

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"macs_per_s": 0.0}, "macs_per_s is a positive rate, got 0.0"),
            ({"bandwidth_bytes_per_s": math.inf}, "bandwidth_bytes_per_s is a positive rate"),
            ({"bandwidth_bytes_per_s": math.nan}, "bandwidth_bytes_per_s is a positive rate"),
            ({"efficiency": 1.1}, r"efficiency is a share in \(0, 1\], got 1.1"),
            ({"overhead_s": -1.0}, "not negative"),
            ({"bits": 0}, "not negative"),
            ({"skips": "block"}, r"skips is 'nothing' or one of .*'block16'.*got 'block'"),
            ({"stores": "csr"}, "'dense' or 'compressed', got 'csr'"),
        ],
    )
    def test_refuses(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RooflineCost(**{"name": "a", "macs_per_s": 1.0, "bandwidth_bytes_per_s": 1.0, **wrong})
