from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial
from scipy.optimize import brentq
from torch import nn

from lightning_prune.granularities import Filter
from lightning_prune.layers import LayerCall, LayerSpec, LayerTable, layer_table
from lightning_prune.plan import SparsityPlan
from lightning_prune.search.suggest import suggest_plan


def table(*shapes: tuple[int, ...]) -> LayerTable:
    call = LayerCall((1, 4), (1, 8), macs=32)
    return LayerTable(tuple(LayerSpec(f"{i}.weight", "linear", shape, (call,)) for i, shape in enumerate(shapes)))


LAYERS = table((8, 4), (16, 8), (4, 16))


def test_each_layer_has_a_parameter_of_its_name() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    plans: list[SparsityPlan] = []

    def objective(trial: optuna.Trial) -> float:
        plans.append(suggest_plan(trial, LAYERS, low=0.2, high=0.8))
        return 0.0

    optuna.logging.disable_default_handler()
    study.optimize(objective, n_trials=20)
    optuna.logging.enable_default_handler()
    assert list(study.best_params) == [f"sparsity.{name}" for name in LAYERS.names]
    shares = np.array([list(plan.values()) for plan in plans])
    assert shares.min() >= 0.2
    assert shares.max() <= 0.8
    assert len(np.unique(shares)) == 60
    # The parameters of a trial give the plan again.
    for trial, plan in zip(study.trials, plans, strict=True):
        assert suggest_plan(FixedTrial(trial.params), LAYERS, low=0.2, high=0.8) == plan


def test_the_plan_prunes_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    listed = layer_table(model, torch.ones(1, 4))
    plan = suggest_plan(FixedTrial({"sparsity.0.weight": 0.5, "sparsity.2.weight": 0.25}), listed)
    assert plan.resolve(model) == plan
    assert listed.nonzeros(plan) == 16 + 12


def test_groups_share_a_sparsity_and_others_stay_dense() -> None:
    plan = suggest_plan(
        FixedTrial({"sparsity.ends": 0.6}), LAYERS, groups={"ends": ["2.weight", "0.*"]}, granularity=Filter()
    )
    assert dict(plan) == {"0.weight": 0.6, "2.weight": 0.6}
    assert list(plan) == ["0.weight", "2.weight"]
    assert plan.granularity("0.weight") == Filter()


def test_steps() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    shares = {
        share
        for _ in range(30)
        for share in suggest_plan(study.ask(), LAYERS, groups={"all": "*"}, high=0.9, step=0.3).values()
    }
    assert sorted(round(share, 9) for share in shares) == [0.0, 0.3, 0.6, 0.9]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(-3.0, 3.0)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_overall_sparsity_is_met_and_coefficients_keep(
    layers: list[tuple[int, float]], share: float, high: float
) -> None:
    listed = table(*((size, 3) for size, _ in layers))
    weights = [min(math.exp(3.0), max(math.exp(-3.0), math.exp(exponent))) for _, exponent in layers]
    sparsity = share * high
    parameters = {"sparsity": sparsity, **{f"weight.{i}.weight": weight for i, weight in enumerate(weights)}}
    plan = suggest_plan(FixedTrial(parameters), listed, overall=True, high=high)
    params = np.array([layer.params for layer in listed], dtype=float)
    shares = np.array(list(plan.values()))
    assert (shares * params).sum() == pytest.approx(sparsity * params.sum(), abs=1e-9 * params.sum())
    assert shares.max() <= high + 1e-12
    assert shares.min() >= 0.0

    # A root finder of somebody else's agrees, wherever eps is unique.
    def excess(eps: float) -> float:
        return float((np.clip(eps * np.array(weights), 1.0 - high, 1.0) * params).sum() - (1 - sparsity) * params.sum())

    if excess(0.0) < -1e-6 * params.sum() and excess(100.0) > 1e-6 * params.sum():
        eps = brentq(excess, 0.0, 100.0, xtol=1e-14)
        np.testing.assert_allclose(1.0 - shares, np.clip(eps * np.array(weights), 1.0 - high, 1.0), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": -0.1}, "low is a sparsity, the fraction removed, in .0, 1., got -0.1"),
        ({"high": 95}, "high is a sparsity"),
        ({"high": True}, "high is a sparsity"),
        ({"low": 0.8, "high": 0.5}, "low <= high, got low=0.8, high=0.5; lower low or raise high"),
        ({"step": 0.0}, "step is between sparsities"),
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"a": []}}, "group 'a' has no layers"),
        (
            {"groups": {"a": "9.wieght"}},
            "group 'a' names '9.wieght', which matches no layer; closest: '2.weight', '1.weight'",
        ),
        ({"groups": {"a": "*", "b": "1.weight"}}, "'1.weight' is in the groups 'a' and 'b'; leave it in one"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_plan(FixedTrial({}), LAYERS, **options)


def test_an_empty_table() -> None:
    with pytest.raises(ValueError, match="the layer table has no layers"):
        suggest_plan(FixedTrial({}), LayerTable(()))
