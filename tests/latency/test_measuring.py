"""Clocks, variants and shapes: what calibration is made of."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import Block, Filter, Unstructured
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import BSR, CSR, KERNELS, Dense, LayerKernel, Shrunk, Workload, measured_occupancy
from lightning_prune.latency.context import Sequenced, TimedLayer, timed_passes
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.passes import replaced
from lightning_prune.latency.spread import around
from lightning_prune.latency.timing import Timing, interleaved, repeated
from lightning_prune.latency.variants import points, pruned
from tests.latency.profiles import workload_of

CPU = torch.device("cpu")
CONV = Workload("conv2d", 2, 16, 32, (14, 14), (14, 14), (3, 3), padding=(1, 1))
DEPTHWISE = Workload("conv2d", 2, 16, 16, (14, 14), (7, 7), (3, 3), (2, 2), (1, 1), groups=16)
LINEAR = Workload("linear", 4, 64, 32)


class TestTiming:
    def test_alternatives_run_in_turn(self) -> None:
        ran: list[str] = []
        found = interleaved(
            {"a": lambda: ran.append("a"), "b": lambda: ran.append("b"), "slow": lambda: ran.append("slow")},
            3,
            setup={"b": lambda: ran.append("before b")},
            fewer_rounds={"slow": 1},
        )
        turn = ["a", "before b", "b"]
        assert ran == [*turn, *turn, "slow", *turn, *turn]
        assert {name: len(timing.wall_s) for name, timing in found.items()} == {"a": 3, "b": 3, "slow": 1}

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"no alternative is called \['c'\]; there are \['a'\]"):
            interleaved({"a": lambda: None}, 1, setup={"c": lambda: None})
        with pytest.raises(ValueError, match="rounds >= 1, got 0"):
            interleaved({"a": lambda: None}, 0)

    def test_untimed_runs_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1000))
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
        monkeypatch.setattr(time, "thread_time", lambda: 0.0)
        ran = []
        assert repeated(lambda: ran.append(1), 3, untimed=2) == Timing((1.0,) * 3, (0.0,) * 3)
        assert len(ran) == 5

    def test_says_whether_the_process_had_its_core(self) -> None:
        assert Timing((1.0, 2.0), (0.99, 1.0)).agrees
        assert not Timing((1.0, 1.2), (0.9, 1.2)).agrees
        both = Timing((3.0,), (3.0,)) + Timing((2.0,), (1.0,))
        assert (both.best_s, both.best_thread_s) == (2.0, 1.0)


class Clock:
    """Stands still, but for what is said to take time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def perf_counter(self) -> float:
        return self.now_s

    thread_time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("lightning_prune.latency.context.time", made)
    return made


class TestTimedLayers:
    def test_every_variant_of_every_call_is_timed(self) -> None:
        layer, other = (TimedLayer([nn.Identity() for _ in range(count)], CPU) for count in (3, 2))

        def run() -> None:
            x = torch.ones(1)
            layer(layer(x))
            other(x)

        passes = list(timed_passes([layer, other], run, rounds=4))
        assert [len(calls) for calls in layer.seconds] == [2, 2, 2]
        assert [len(calls) for calls in other.seconds] == [1, 1]
        assert min(len(times) for calls in (*layer.seconds, *other.seconds) for times in calls) >= 4
        assert sum(len(times) for times in other.seconds[0] + other.seconds[1]) == len(passes)
        assert all(seconds > 0 for calls in layer.seconds for times in calls for seconds in times)
        assert {one.number for one in passes} == {0, 1, 2}
        assert all(0 < one.layers_s <= one.whole.wall_s[0] for one in passes)

    @pytest.mark.parametrize(("alike", "rounds"), [(True, [7, 2, 9]), (False, [9, 7, 9])])
    def test_variants_that_are_hopelessly_slow_in_all_layers_are_timed_less(
        self, alike: bool, rounds: list[int], clock: Clock
    ) -> None:
        quick, slow = nn.Identity(), nn.Identity()
        quick.register_forward_hook(lambda *_: clock.passes(0.002))
        slow.register_forward_hook(lambda *_: clock.passes(0.02))
        layer, other = TimedLayer([quick, slow, quick], CPU), TimedLayer([quick, slow if alike else quick], CPU)

        class Busy(Pace):
            """Has something else to do when the slow variant runs first."""

            def counts(self, seconds: float, *, full: bool) -> bool:
                first = layer.active == 1 and not self.lost_s
                self.lost_s += first
                return not first

        passes = list(timed_passes([layer, other], lambda: other(layer(torch.ones(1))), 9, Busy(CPU)))
        # Its first turn comes later, all the same: layers of fewer variants may run one of theirs in this turn alone.
        # In some turns one layer runs its first variant, so that only the other one's counts.
        assert [len(calls[0]) for calls in layer.seconds] == rounds
        assert sum(len(calls[0]) for calls in other.seconds) == len(passes) == sum(rounds)
        assert min(len(calls[0]) for calls in other.seconds) >= 3

    def test_one_slow_pass_by_chance_makes_no_variant_hopeless(self, clock: Clock) -> None:
        quick, stalled, naps = nn.Identity(), nn.Identity(), iter([0.001, 0.05])
        quick.register_forward_hook(lambda *_: clock.passes(0.001))
        stalled.register_forward_hook(lambda *_: clock.passes(next(naps, 0.001)))
        layer = TimedLayer([quick, stalled], CPU)
        assert len(list(timed_passes([layer], lambda: layer(torch.ones(1)), 6))) == 12
        assert [len(calls[0]) for calls in layer.seconds] == [6, 6]

    def test_give_what_their_variants_give(self) -> None:
        layer = TimedLayer([nn.Hardtanh(), nn.ReLU()], CPU)
        x = torch.tensor([-3.0, 3.0])
        for number, expected in ((0, [-1.0, 1.0]), (1, [0.0, 3.0]), (2, [-1.0, 1.0])):
            layer.begin(number)
            assert layer(input=x).tolist() == expected

    def test_layers_are_put_back_whatever_happens(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
        before: Any = list(model.modules())

        def interrupted() -> None:
            with replaced(model, {"0.0": nn.Identity(), "1": nn.Identity()}):
                assert isinstance(model.get_submodule("0.0"), nn.Identity)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(model.modules()) == before

    def test_sequences_write_each_input_anew(self) -> None:
        seen: list[Tensor] = []

        class Note(nn.Module):
            def forward(self, x: Tensor) -> None:
                seen.append(x)

        inputs = [torch.tensor([-1.0, 1.0]), torch.tensor([2.0])]
        Sequenced([Note(), Note()], inputs)()
        assert [x.tolist() for x in seen] == [[0.0, 1.0], [2.0]]
        assert all(x is not y for x, y in zip(seen, inputs, strict=True))


class TestVariants:
    @pytest.mark.parametrize("work", [CONV, DEPTHWISE, LINEAR], ids=str)
    @pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
    def test_at_most_five_that_differ(self, kernel: LayerKernel, work: Workload) -> None:
        if work is DEPTHWISE and not isinstance(kernel, Dense | CSR | Shrunk):
            return  # its patterns do not fit
        found = points(kernel, work)
        assert 1 <= len(found) <= 5
        assert len(set(found)) == len(found)
        assert all(0 <= s < 1 and 0 < living <= 1 for s, living in found)

    @pytest.mark.parametrize("work", [CONV, DEPTHWISE, LINEAR], ids=str)
    @pytest.mark.parametrize("kernel", [CSR(), BSR(8), Shrunk()], ids=lambda kernel: kernel.name)
    def test_have_the_zeros_they_say(self, kernel: LayerKernel, work: Workload) -> None:
        if kernel.refuses(work, torch.float32, CPU):
            return
        layer = work.layer().requires_grad_(False)
        layer.weight[0] = 0.0  # zeros of the model's own do not count
        before = layer.weight.clone()
        for place in points(kernel, work):
            copied = pruned(layer, kernel.granularity, place, torch.Generator().manual_seed(0))
            left = measured_occupancy(copied.weight)
            groups = kernel.granularity.groups(copied.weight.shape).numel()
            removed = round(place[0] * groups)
            if place[1] == 1.0:
                assert float(left.density) == pytest.approx(1 - removed / groups, abs=1e-9)
            else:
                assert float(left.columns) == pytest.approx(place[1], abs=1e-9)
            assert workload_of(copied, torch.zeros(work.input_shape())) == work
        assert torch.equal(layer.weight, before)

    @pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Filter()], ids=str)
    def test_are_the_same_every_time(self, pattern: Granularity) -> None:
        layer = LINEAR.layer()
        first, second = (pruned(layer, pattern, (0.5, 0.5), torch.Generator().manual_seed(1)).weight for _ in range(2))
        assert torch.equal(first, second)


class TestSpread:
    @settings(max_examples=30)
    @given(count=st.integers(0, 40), seed=st.integers(0, 1000))
    def test_shapes_are_new_and_near(self, count: int, seed: int) -> None:
        works = (CONV, DEPTHWISE, LINEAR)
        found = around(works, count, seed)
        assert len(found) <= count
        assert len(set(found)) == len(found)
        assert not set(found) & set(works)
        assert found == around(works, count, seed)
        for work in found:
            assert work.macs <= 4 * max(w.macs for w in works)
            assert work.batch == 2 or work.kind == "linear"
            assert work.groups in (1, work.inputs)
            if work.kind == "conv2d":
                layer = work.layer()
                assert workload_of(layer, torch.zeros(work.input_shape())) == work

    def test_of_nothing_is_nothing(self) -> None:
        assert around((), 10) == ()
        assert around((LINEAR,), 0) == ()

    def test_reaches_its_count_for_usual_networks(self) -> None:
        assert len(around((CONV, DEPTHWISE, LINEAR), 60)) == 60


def test_dense_has_one_variant() -> None:
    assert points(Dense(), CONV) == ((0.0, 1.0),)
