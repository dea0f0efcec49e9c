"""Sparsity plans: whom a name means, thresholds, and files that are whole or refused."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune import NM, Block, Filter, SparsityPlan, Std, Unstructured, Vector, granularities
from lightning_prune.plan import PlanEntry
from tests.contracts.tables import GRANULARITIES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 3)


class Tied(nn.Module):
    """A decoder that shares the weight of an embedding, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 6)
        self.decoder.weight = self.embedding.weight


class TestPatterns:
    def test_an_exact_name_beats_patterns_before_and_after_it(self) -> None:
        plan = SparsityPlan({"conv*": 0.1, "conv1.weight": 0.2, "*": 0.3})
        assert dict(plan.resolve(Net())) == {"conv1.weight": 0.2, "conv2.weight": 0.3, "fc.weight": 0.3}

    def test_the_last_pattern_wins(self) -> None:
        assert SparsityPlan({"*": 0.3, "conv*": 0.1}).resolve(Net())["conv2.weight"] == 0.1
        assert SparsityPlan({"conv*": 0.1, "*": 0.3}).resolve(Net())["conv2.weight"] == 0.3

    def test_a_pattern_means_conv_and_linear_weights_where_it_can(self) -> None:
        assert list(SparsityPlan({"*": 0.5}).resolve(Net())) == ["conv1.weight", "conv2.weight", "fc.weight"]
        assert list(SparsityPlan({"conv1.*": 0.5}).resolve(Net())) == ["conv1.weight"]

    def test_other_parameters_are_meant_where_nothing_else_matches(self) -> None:
        biases = ["conv1.bias", "norm.bias", "conv2.bias", "fc.bias"]
        assert list(SparsityPlan({"*.bias": 0.5}).resolve(Net())) == biases
        assert list(SparsityPlan({"norm.*": 0.5}).resolve(Net())) == ["norm.weight", "norm.bias"]
        assert list(SparsityPlan({"norm.weight": 0.5}).resolve(Net())) == ["norm.weight"]

    def test_shell_globs(self) -> None:
        assert list(SparsityPlan({"conv[12].weight": 0.5}).resolve(Net())) == ["conv1.weight", "conv2.weight"]
        assert list(SparsityPlan({"conv?.weight": 0.5}).resolve(Net())) == ["conv1.weight", "conv2.weight"]
        with pytest.raises(ValueError, match=r"'CONV\*', which matches no parameter"):
            SparsityPlan({"CONV*": 0.5}).resolve(Net())

    def test_match_names_the_entry_in_the_models_order(self) -> None:
        plan = SparsityPlan({"fc.weight": 0.9, "*": 0.5, "conv2*": 0.7})
        matched = plan.match(Net())
        assert list(matched.items()) == [("conv1.weight", "*"), ("conv2.weight", "conv2*"), ("fc.weight", "fc.weight")]
        assert list(plan.resolve(Net())) == list(matched)

    def test_resolving_keeps_granularities_and_is_stable(self) -> None:
        plan = SparsityPlan({"*": 0.5, "conv*": (0.25, Filter())}).resolve(Net())
        assert plan.granularity("conv1.weight") == Filter()
        assert plan.granularity("fc.weight") is None
        assert plan.resolve(Net()) == plan

    def test_a_pattern_whose_parameters_all_have_names_of_their_own_may_stay(self) -> None:
        assert SparsityPlan({"fc*": 0.5, "fc.weight": 0.9}).resolve(Net())["fc.weight"] == 0.9

    def test_the_empty_plan(self) -> None:
        assert len(SparsityPlan({}).resolve(Net())) == 0

    def test_tied_weights_have_one_entry_under_their_first_name(self) -> None:
        for name in ("decoder.weight", "embedding.weight", "decoder.*", "embedding*"):
            assert dict(SparsityPlan({name: 0.5}).resolve(Tied())) == {"embedding.weight": 0.5}
        assert list(SparsityPlan({"*": 0.5}).resolve(Tied())) == ["embedding.weight", "hidden.weight"]

    def test_a_name_of_a_tied_weight_beats_patterns_on_its_other_name(self) -> None:
        assert SparsityPlan({"decoder.weight": 0.9, "embed*": 0.5}).resolve(Tied())["embedding.weight"] == 0.9

    def test_compiled_modules_have_plain_names(self) -> None:
        model = Net()
        model.conv1 = torch.compile(model.conv1, backend="eager")  # type: ignore[assignment]
        plan = SparsityPlan({"conv1.weight": 0.5, "f*": 0.25})
        assert plan.resolve(model) == plan.resolve(Net())
        assert plan.resolve(torch.compile(Net(), backend="eager")) == plan.resolve(Net())  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "closest"),
        [("conv1.wieght", "conv1.weight"), ("layer.fc.weight", "fc.weight"), ("norm.bais", "norm.")],
    )
    def test_a_wrong_name_lists_the_closest(self, name: str, closest: str) -> None:
        with pytest.raises(ValueError, match=f"'{name}', which matches no parameter of Net; closest: '{closest}"):
            SparsityPlan({"*": 0.5, name: 0.5}).match(Net())
        with pytest.raises(ValueError, match=name):
            SparsityPlan.from_threshold(Net(), {name: 0.1})

    def test_a_model_without_parameters_has_no_closest_names(self) -> None:
        with pytest.raises(ValueError, match="closest: none: the model has no parameters"):
            SparsityPlan({"*": 0.5}).resolve(nn.ReLU())


class TestValue:
    def test_asking_for_an_entry_that_is_not_there(self) -> None:
        plan = SparsityPlan({"conv1.weight": 0.5})
        assert "conv1.weight" in plan
        assert "conv2.weight" not in plan
        assert plan.get("conv2.weight", 0.1) == 0.1
        for ask in (plan.__getitem__, plan.granularity, plan.entry):
            with pytest.raises(KeyError, match=r"no entry 'conv2\.weight'; closest: 'conv1\.weight'.*plan\.resolve"):
                ask("conv2.weight")

    def test_entries_may_be_given_in_several_ways(self) -> None:
        ways: list[Any] = [
            PlanEntry(0.5, NM(2, 4)),
            (0.5, NM(2, 4)),
            {"sparsity": 0.5, "granularity": NM(2, 4)},
            {"sparsity": 0.5, "granularity": {"class_path": "NM", "init_args": {"n": 2, "m": 4}}},
            {
                "sparsity": 0.5,
                "granularity": {"class_path": "lightning_prune.granularities.NM", "init_args": {"n": 2, "m": 4}},
            },
        ]
        assert len({SparsityPlan({"w": way}) for way in ways}) == 1
        open_ways: list[Any] = [0.5, PlanEntry(0.5), (0.5,), (0.5, None), {"sparsity": 0.5}, np.float64(0.5)]
        assert len({SparsityPlan({"w": way}) for way in open_ways}) == 1
        assert type(SparsityPlan({"w": np.float32(0.5)})["w"]) is float

    def test_equal_plans_hash_alike(self) -> None:
        one, two = SparsityPlan({"a": 0.5, "b": (1, Filter())}), SparsityPlan({"a": 0.5, "b": (1.0, Filter())})
        assert one == two
        assert hash(one) == hash(two)
        assert len({one, two}) == 1
        assert one != SparsityPlan({"a": 0.5, "b": 1.0})
        assert one != SparsityPlan({"a": 0.5})
        assert one != {"a": 0.5, "b": 1.0}

    def test_it_is_frozen(self) -> None:
        given = {"a": 0.5}
        plan = SparsityPlan(given)
        given["a"] = 0.9
        assert plan["a"] == 0.5
        with pytest.raises(TypeError, match="does not support item assignment"):
            plan["a"] = 0.1  # type: ignore[index]
        with pytest.raises(AttributeError):
            plan.entry("a").sparsity = 0.1  # type: ignore[misc]

    def test_repr_builds_the_same_plan(self) -> None:
        plan = SparsityPlan({"a": 0.5, "b": (0.25, Block(2, 4)), "c": (0.5, NM(2, 4))})
        assert eval(repr(plan)) == plan

    @pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.0, np.float32(0.25)])
    def test_the_ends_are_shares_too(self, share: float) -> None:
        assert SparsityPlan({"w": share})["w"] == float(share)

    @pytest.mark.parametrize(
        "share",
        [1.0000001, -1e-9, 90, 70.0, math.nan, math.inf, True, False, "0.5", "50%", None, [0.5], 0.5 + 0j],
        ids=repr,
    )
    def test_what_is_no_share_is_refused_with_its_name(self, share: Any) -> None:
        with pytest.raises(ValueError, match=r"entry 'fc\.weight': sparsity is the fraction removed, in \[0, 1\], got"):
            SparsityPlan({"conv": 0.5, "fc.weight": share})

    @pytest.mark.parametrize("granularity", ["Filter", "filter", Filter, 4, NM, "NM(2, 4)", ["Filter"]], ids=repr)
    def test_what_is_no_granularity_is_refused_with_its_name(self, granularity: Any) -> None:
        for value in ((0.5, granularity), {"sparsity": 0.5, "granularity": granularity}):
            with pytest.raises(ValueError, match=r"entry 'fc': granularity is an object such as Filter\(\).*got"):
                SparsityPlan({"fc": value})  # type: ignore[dict-item]

    @pytest.mark.parametrize("value", [(), (0.5, None, 1), {"granularity": None}, {"sparsity": 0.5, "block": 4}])
    def test_malformed_entries_are_refused_with_their_name(self, value: Any) -> None:
        with pytest.raises(ValueError, match="entry 'fc': "):
            SparsityPlan({"fc": value})

    @pytest.mark.parametrize("mapping", [0.5, "fc", None, [("fc", 0.5)]], ids=repr)
    def test_a_plan_is_a_map(self, mapping: Any) -> None:
        with pytest.raises(ValueError, match="a sparsity plan is a map of names to fractions, got"):
            SparsityPlan(mapping)

    def test_names_are_words(self) -> None:
        with pytest.raises(ValueError, match="entry 0: names and patterns are words"):
            SparsityPlan({0: 0.5})  # type: ignore[dict-item]


def numpys_share(weight: torch.Tensor, threshold: float | Std) -> float:
    values = weight.detach().numpy()
    if isinstance(threshold, Std):
        centred = values.astype(np.float64) - values.astype(np.float64).mean()
        threshold = threshold.k * math.sqrt(np.mean(centred**2))
    return float(np.count_nonzero(np.abs(values) < threshold)) / values.size


class TestThreshold:
    @pytest.mark.parametrize(
        "threshold", [0.0, 0.05, 0.1, 10.0, Std(0), Std(0.25), Std(0.7), Std(1), Std(2), Std(9)], ids=repr
    )
    def test_counts_as_numpy_does(self, threshold: Any) -> None:
        torch.manual_seed(0)
        model = Net()
        plan = SparsityPlan.from_threshold(model, {"*": threshold})
        assert list(plan) == ["conv1.weight", "conv2.weight", "fc.weight"]
        for name, share in plan.items():
            weight = model.get_parameter(name)
            assert share == numpys_share(weight, threshold)

    def test_the_deviation_is_the_populations(self) -> None:
        # Population: std = 1, sample: std = sqrt(4 / 3). 1.1 lies between the two.
        model = nn.Linear(4, 1)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-1.0, -1.0, 1.0, 1.0]]))
        assert SparsityPlan.from_threshold(model, {"weight": Std(1.0)})["weight"] == 0.0
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-1.1, -0.9, 0.9, 1.1]]))
        assert SparsityPlan.from_threshold(model, {"weight": Std(1.0)})["weight"] == 0.5

    def test_a_weight_at_the_threshold_stays(self) -> None:
        model = nn.Linear(4, 1)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.25, -0.5, 0.5, 1.0]]))
        assert SparsityPlan.from_threshold(model, {"weight": 0.5})["weight"] == 0.25

    def test_of_nothing_nothing_is_removed(self) -> None:
        model = nn.ParameterDict({"empty": torch.empty(0, 3)})
        assert SparsityPlan.from_threshold(model, {"empty": 0.5})["empty"] == 0.0

    def test_names_and_patterns_mean_what_they_mean_in_plans(self) -> None:
        torch.manual_seed(0)
        model = Net()
        thresholds: Mapping[str, float | Std] = {"fc.weight": Std(1), "*": 0.0, "conv2*": 99.0}
        plan = SparsityPlan.from_threshold(model, thresholds)
        assert plan["conv1.weight"] == 0.0
        assert plan["conv2.weight"] == 1.0
        assert plan["fc.weight"] == numpys_share(model.fc.weight, Std(1))

    @pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, "0.1", True, None], ids=repr)
    def test_what_is_no_magnitude_is_refused_with_its_name(self, threshold: Any) -> None:
        with pytest.raises(ValueError, match=r"threshold of 'fc\.weight' needs a finite magnitude >= 0, got"):
            SparsityPlan.from_threshold(Net(), {"*": 0.1, "fc.weight": threshold})

    @pytest.mark.parametrize("k", [-0.1, math.nan, math.inf])
    def test_std_refuses_what_is_no_threshold(self, k: float) -> None:
        with pytest.raises(ValueError, match=rf"Std needs a finite k >= 0, got k={k}"):
            Std(k)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
ENTRIES = st.builds(PlanEntry, st.floats(0, 1), st.sampled_from([None, *GRANULARITIES]))


class TestFiles:
    @pytest.mark.parametrize("granularity", [None, *GRANULARITIES], ids=repr)
    def test_round_trip(self, granularity: Any, tmp_path: Path) -> None:
        plan = SparsityPlan({"conv*": (0.3, granularity), "fc.weight": 1 / 3, "*.bias": 0})
        path = tmp_path / "new" / "plan.yaml"
        plan.save(path)
        assert SparsityPlan.load(path) == plan
        assert SparsityPlan.load(str(path)).granularity("conv*") == granularity
        assert list(SparsityPlan.load(path)) == list(plan)  # of patterns the last wins, so their order is kept

    @given(entries=st.dictionaries(NAMES, ENTRIES, max_size=5))
    def test_round_trip_of_any_plan(self, entries: dict[str, PlanEntry], tmp_path_factory: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "any.yaml"
        plan = SparsityPlan(entries)
        plan.save(path)
        assert SparsityPlan.load(path) == plan
        assert list(SparsityPlan.load(path)) == list(plan)

    def test_a_users_own_granularity_comes_back_once_its_class_is_known(self, tmp_path: Path) -> None:
        class Own(Unstructured):
            pass

        path = tmp_path / "plan.yaml"
        SparsityPlan({"w": (0.5, Own())}).save(path)
        assert type(SparsityPlan.load(path).granularity("w")) is Own

    def test_plain_maps_are_plans(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        path.write_text("'*': 0.7\nfc.weight: {sparsity: 0.5, granularity: {class_path: Filter}}\n")
        assert SparsityPlan.load(path) == SparsityPlan({"*": 0.7, "fc.weight": (0.5, Filter())})

    def test_files_say_what_they_are_and_everybody_may_read_them(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        SparsityPlan({"w": (0.5, Vector(3)), "v": 1e-5}).save(path)
        assert yaml.safe_load(path.read_text()) == {
            "schema": "lightning-prune/plan/1",
            "sparsity": {
                "w": {"sparsity": 0.5, "granularity": {"class_path": "Vector", "init_args": {"dim": 3}}},
                "v": 1e-5,
            },
        }
        if os.name == "posix":
            assert path.stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
    def test_a_crash_leaves_the_old_file(self, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        path = tmp_path / "plan.yaml"
        SparsityPlan({"w": 0.5}).save(path)
        monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(OSError, match="No space left on device"):
            SparsityPlan({"w": 0.9}).save(path)
        assert SparsityPlan.load(path) == SparsityPlan({"w": 0.5})
        assert list(tmp_path.iterdir()) == [path]

    def test_an_interrupt_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(descriptor: int) -> None:
            raise KeyboardInterrupt

        path = tmp_path / "plan.yaml"
        SparsityPlan({"w": 0.5}).save(path)
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            SparsityPlan({"w": 0.9}).save(path)
        assert SparsityPlan.load(path)["w"] == 0.5
        assert list(tmp_path.iterdir()) == [path]

    def test_the_file_is_written_before_it_takes_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace, seen = Path.replace, []

        def look(self: Path, target: Path) -> Path:
            seen.append((self.parent == target.parent, self.read_text(), target.read_text()))
            return replace(self, target)

        path = tmp_path / "plan.yaml"
        path.write_text("old")
        monkeypatch.setattr(Path, "replace", look)
        SparsityPlan({"w": 0.5}).save(path)
        assert seen == [(True, path.read_text(), "old")]
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError):
            SparsityPlan({"w": 0.5}).save(tmp_path / "file" / "plan.yaml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds NoneType, not a sparsity plan"),
            ("0.5", "holds float, not a sparsity plan"),
            ("[0.5]", "holds list, not a sparsity plan"),
            ("schema: lightning-prune/plan/2\nsparsity: {w: 0.5}", "has schema 'lightning-prune/plan/2', this version"),
            ("schema: null\nsparsity: {w: 0.5}", "has schema None"),
            ("schema: lightning-prune/plan/1", "no map of parameter names under 'sparsity'"),
            ("schema: lightning-prune/plan/1\nsparsity: 0.5", "no map of parameter names under 'sparsity'"),
            ("schema: lightning-prune/plan/1\nsparsity: [w]", "no map of parameter names under 'sparsity'"),
            (
                "schema: lightning-prune/plan/1\nsparsity: {w: 0.5}\nscope: local",
                r"unknown keys \['scope'\] beside 'schema'",
            ),
            ("0: 0.5", "no map of parameter names"),
            ("fc: '0.5'", "entry 'fc': sparsity is the fraction removed.*got '0.5'"),
            ("fc: yes", "entry 'fc'.*got True"),
            ("fc: [0.5]", r"entry 'fc'.*got \[0\.5\]"),
            ("fc: 90", "entry 'fc'.*got 90"),
            ("fc: .nan", "entry 'fc'.*got nan"),
            ("fc: null", "entry 'fc'.*got None"),
            ("fc: {sparsity: 0.5, granularty: null}", "entry 'fc': expected the keys sparsity and.*granularty"),
            ("fc: {granularity: {class_path: Filter}}", "entry 'fc': expected the keys sparsity"),
            ("fc: {sparsity: 0.5, granularity: Filter}", r"granularity is an object such as Filter\(\).*got 'Filter'"),
            ("fc: {sparsity: 0.5, granularity: {class_path: Filtr}}", "unknown granularity 'Filtr'; closest: 'Filter'"),
            ("fc: {sparsity: 0.5, granularity: {class_path: _Reduced}}", "unknown granularity '_Reduced'"),
            ("fc: {sparsity: 0.5, granularity: {class_path: Granularity}}", "unknown granularity 'Granularity'"),
            ("fc: {sparsity: 0.5, granularity: {init_args: {dim: 1}}}", "unknown granularity ''"),
            ("fc: {sparsity: 0.5, granularity: {class_path: NM}}", "entry 'fc': .*missing.*'n' and 'm'"),
            (
                "fc: {sparsity: 0.5, granularity: {class_path: NM, init_args: [2, 4]}}",
                "entry 'fc': .*must be a mapping",
            ),
            ("fc: {sparsity: 0.5, granularity: {class_path: NM, init_args: {n: 4, m: 2}}}", "1 <= n < m, got n=4, m=2"),
            ("fc: {sparsity: 0.5, granularity: {class_path: NM, init_args: {n: '2', m: 4}}}", "got n='2', m=4"),
            ("fc: {sparsity: 0.5, granularity: {class_path: NM, init_args: {n: 2, m: 4, k: 1}}}", "unexpected.*'k'"),
            ("fc: {sparsity: 0.5, granularity: {class_path: Filter, args: {}}}", r"class_path and.*got \['args'\] too"),
            ("fc: !!python/object/apply:os.getcwd []", "is no YAML file"),
            ("fc: 0.5\n  x: {", "is no YAML file"),
        ],
    )
    def test_what_is_no_plan_is_refused_with_file_and_place(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"plan\.yaml.*{message}"):
            SparsityPlan.load(path)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        path.write_bytes(b"\xff\xfe\x00w: 0.5")
        with pytest.raises(ValueError, match=r"plan\.yaml is no YAML file"):
            SparsityPlan.load(path)

    def test_a_class_path_imports_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "foreign_module.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        path = tmp_path / "plan.yaml"
        path.write_text("fc: {sparsity: 0.5, granularity: {class_path: foreign_module.Groups}}")
        with pytest.raises(ValueError, match=r"unknown granularity 'foreign_module\.Groups'"):
            SparsityPlan.load(path)
        assert "foreign_module" not in sys.modules


def test_a_users_own_granularity_is_told_from_ours_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"

    @dataclass(frozen=True)
    class Filter(granularities.Filter):
        """Another one, defined elsewhere."""

    for granularity in (Filter(), granularities.Filter()):
        SparsityPlan({"fc": (0.5, granularity)}).save(path)
        assert type(SparsityPlan.load(path).granularity("fc")) is type(granularity)


def test_as_dict_is_plain_and_read_again() -> None:
    plan = SparsityPlan({"a.weight": 0.5, "b.weight": (0.75, Block(4, 2)), "*": (0.5, Filter())})
    plain = plan.as_dict()
    assert plain["a.weight"] == 0.5
    assert plain["b.weight"] == {
        "sparsity": 0.75,
        "granularity": {"class_path": "Block", "init_args": {"rows": 4, "cols": 2}},
    }
    for text in (json.dumps(plain), yaml.safe_dump(plain, sort_keys=False)):
        again = SparsityPlan(yaml.safe_load(text))
        assert again == plan
        assert list(again) == list(plan)
    plain["a.weight"] = 0.9
    assert plan["a.weight"] == 0.5
    assert SparsityPlan({}).as_dict() == {}
