"""Learning-compression without a Trainer: one round by hand, exact counts, convex problems, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import NM, Block, Filter, GradientMagnitude, Magnitude, Movement, SparsityPlan, Unstructured
from lightning_prune.learning_compression import Compressor, check_penalty


def one_layer(values: list[float]) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def prune(values: Any, removed: int) -> Any:
    kept = np.array(values, dtype=np.float64)
    kept[np.argsort(np.abs(kept), kind="stable")[:removed]] = 0.0
    return kept


def test_rounds_by_hand() -> None:
    """Three rounds of two gradient steps each, against the formulas in NumPy."""
    start, mu, growth, rate = [3.0, -1.0, 2.0, 0.5], 0.5, 1.5, 0.1
    aim = np.array([1.0, -2.0, 0.3, 1.5])  # the loss is ‖w − aim‖² / 2
    w, lam = np.array(start), np.zeros(4)
    layer = one_layer(start).double()
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}), penalty=mu, growth=growth, max_penalty=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)

    theta = prune(w - lam / mu, 2)
    compressor.compress()
    np.testing.assert_allclose(compressor.theta["weight"].numpy()[0], theta)
    assert theta.tolist() == [3.0, 0.0, 2.0, 0.0]
    assert compressor.penalty == mu
    supports = set()
    for _ in range(3):
        for _ in range(2):
            w = w - rate * (w - aim + mu * (w - theta) - lam)
            layer.weight.grad = layer.weight.detach() - torch.tensor(aim)
            compressor.attract(optimizer)
            optimizer.step()
        np.testing.assert_allclose(layer.weight.detach().numpy()[0], w, rtol=1e-12)
        theta = prune(w - lam / mu, 2)
        lam = lam - mu * (w - theta)
        mu = min(mu * growth, 1.0)
        compressor.compress()
        np.testing.assert_allclose(compressor.theta["weight"].numpy()[0], theta, rtol=1e-12)
        np.testing.assert_allclose(compressor.multipliers["weight"].numpy()[0], lam, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(layer.weight.detach().numpy()[0], w, rtol=1e-12)
        assert compressor.penalty == mu
        assert compressor.gap == pytest.approx(np.linalg.norm(w - theta) / np.linalg.norm(w))
        supports.add(tuple(theta != 0))
    assert mu == 1.0
    assert compressor.rounds == 4
    assert len(supports) > 1  # a weight that was pruned has come back


GRANULARITIES = [(Unstructured(), 0.7), (Filter(), 0.5), (NM(2, 4), 0.5), (Block(2, 2), 0.25)]


@pytest.mark.parametrize(("granularity", "share"), GRANULARITIES, ids=str)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_theta_is_the_nearest_network_of_the_plan(granularity: Any, share: float, scope: Any) -> None:
    model = two_layers()
    compressor = Compressor(model, SparsityPlan({"*": share}), granularity=granularity, scope=scope)
    compressor.compress()
    removed = sum(int((~mask).sum()) for mask in compressor.masks.values())
    assert removed == (round(0.7 * 64) + round(0.7 * 32) if share == 0.7 and scope == "local" else round(share * 96))
    for name, theta in compressor.theta.items():
        assert torch.equal(theta, compressor.parameters[name].detach() * compressor.masks[name])
    compressor.settle()
    assert sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim > 1) == removed
    assert not compressor.learning


@given(st.lists(st.integers(-8, 8), min_size=8, max_size=8, unique_by=abs), st.sampled_from([2, 4]))
@settings(max_examples=25)
def test_the_c_step_is_a_projection(values: list[int], columns: int) -> None:
    """Of all networks with half of the filters, none is nearer: found by trying them all."""
    layer = nn.Linear(columns, 8 // columns, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values, dtype=torch.float).reshape(-1, columns))
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}), granularity=Filter())
    compressor.compress()
    weight = layer.weight.detach()
    rows = range(len(weight))
    nearest = min(
        sum(float(weight[row].square().sum()) for row in gone)
        for gone in itertools.combinations(rows, len(weight) // 2)
    )
    assert float((weight - compressor.theta["weight"]).square().sum()) == nearest


class LeastSquares:
    """`‖X w − y‖² / 2n` with correlated columns, where the largest coefficients are not the best ones to keep."""

    def __init__(self, seed: int, columns: int = 10, kept: int = 3) -> None:
        rng = np.random.default_rng(seed)
        common = rng.normal(size=(60, 3)) @ rng.normal(size=(3, columns))
        self.x = common + 0.7 * rng.normal(size=(60, columns))
        self.y = self.x @ rng.normal(size=columns) + 0.1 * rng.normal(size=60)
        self.kept, self.columns = kept, columns
        self.dense = self.solve(range(columns))[1]

    def solve(self, support: Any) -> tuple[float, Any]:
        columns = list(support)
        w = np.zeros(self.x.shape[1])
        w[columns] = np.linalg.lstsq(self.x[:, columns], self.y, rcond=None)[0]
        return float(((self.x @ w - self.y) ** 2).mean() / 2), w

    def one_shot(self) -> float:
        return self.solve(np.argsort(np.abs(self.dense))[-self.kept :])[0]

    def best(self) -> float:
        return min(self.solve(support)[0] for support in itertools.combinations(range(self.columns), self.kept))

    def learning_compression(self) -> tuple[float, float]:
        """The objective at θ, and the gap that is left."""
        layer = one_layer(self.dense.tolist()).double()
        plan = SparsityPlan({"*": 1 - self.kept / self.columns})
        compressor = Compressor(layer, plan, penalty=0.05, growth=1.1)
        x, y = torch.tensor(self.x), torch.tensor(self.y)
        curvature, slope = x.T @ x / len(y), x.T @ y / len(y)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        compressor.compress()
        for _ in range(60):
            for _ in range(25):
                layer.weight.grad = layer.weight.detach() @ curvature - slope
                compressor.attract(optimizer)
                optimizer.step()
            compressor.compress()
        gap = compressor.gap
        compressor.settle()
        assert int((layer.weight == 0).sum()) == self.columns - self.kept
        return float((layer(x)[:, 0] - y).square().mean().detach() / 2), gap


def test_least_squares_never_worse_than_one_shot_and_often_the_best_there_is() -> None:
    problems = [LeastSquares(seed) for seed in range(6)]
    found = [problem.learning_compression() for problem in problems]
    for problem, (objective, gap) in zip(problems, found, strict=True):
        assert gap < 1e-3  # both sets of weights have met
        assert objective <= problem.one_shot() * (1 + 1e-3)
        assert objective >= problem.best() * (1 - 1e-9)
    better = [objective < 0.9 * problem.one_shot() for problem, (objective, _) in zip(problems, found, strict=True)]
    best = [objective <= 1.001 * problem.best() for problem, (objective, _) in zip(problems, found, strict=True)]
    assert sum(better) >= 3
    assert sum(best) >= 5


def test_without_a_step_in_between_nothing_but_theta_changes() -> None:
    layer = one_layer([1.0, 2.0])
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}))
    for _ in range(3):
        compressor.compress()
    assert compressor.penalty == 1e-3
    assert not compressor.multipliers["weight"].any()
    assert not compressor.attracted


def test_layers_that_nobody_moves_gather_no_multipliers() -> None:
    model = two_layers()
    model[0].weight.requires_grad_(False)
    compressor = Compressor(model, SparsityPlan({"*": 0.5}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor.compress()
    model(torch.ones(2, 8)).sum().backward()
    compressor.attract(optimizer)
    optimizer.step()
    compressor.compress()
    assert not compressor.multipliers["0.weight"].any()
    assert compressor.multipliers["2.weight"].any()


def gradient_after(optimizer: Any, scale: float = 1.0, penalty: float = 0.5) -> Tensor:
    layer = one_layer([3.0, 1.0])
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}), penalty=penalty)
    compressor.compress()
    layer.weight.grad = torch.tensor([[0.25, 0.25]])
    compressor.attract(optimizer([layer.weight]), scale)
    assert layer.weight.grad is not None
    return layer.weight.grad[0]


def test_the_pull_on_gradients() -> None:
    plain = torch.optim.SGD
    assert gradient_after(lambda p: plain(p, lr=1.0)).tolist() == [0.25, 0.75]
    assert gradient_after(lambda p: plain(p, lr=1.0, maximize=True)).tolist() == [0.25, -0.25]
    assert gradient_after(lambda p: torch.optim.Adam(p, lr=1.0), scale=8.0).tolist() == [0.25, 4.25]
    # lr * mu = 4: the whole gradient is divided by it, so that the penalty does not overshoot.
    assert gradient_after(lambda p: plain(p, lr=8.0)).tolist() == [0.0625, 0.1875]
    assert gradient_after(lambda p: torch.optim.Adam(p, lr=8.0)).tolist() == [0.25, 0.75]


def test_a_steep_penalty_does_not_diverge_under_sgd() -> None:
    layer = one_layer([3.0, 1.0])
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}), penalty=1e3, growth=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    compressor.compress()
    for _ in range(20):
        layer.weight.grad = torch.tensor([[0.1, 0.1]])
        compressor.attract(optimizer)
        optimizer.step()
    assert layer.weight.abs().max() < 4
    assert compressor.gap < 1e-3


def test_theta_can_be_shown_and_hidden() -> None:
    model = two_layers()
    compressor = Compressor(model, SparsityPlan({"*": 0.5}))
    compressor.show()  # no θ yet
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    compressor.compress()
    with torch.inference_mode():  # as validation has it
        compressor.show()
        compressor.show()
        assert sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1) == 48
        assert torch.equal(compressor.weights()["0.weight"], before["0.weight"])
    with pytest.raises(RuntimeError, match=r"holds theta.*hide\(\) first"):
        compressor.compress()
    compressor.hide()
    compressor.hide()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.get_parameter("0.weight").data.add_(1)  # still a tensor that can be trained


def test_divergence_is_told_and_leaves_the_weights() -> None:
    layer = one_layer([1.0, math.nan])
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}))
    with pytest.raises(ValueError, match="NaN: the network has diverged"):
        compressor.compress()
    assert layer.weight[0, 0] == 1.0
    assert not compressor.learning


def test_settled_weights_stay_zero() -> None:
    layer = one_layer([3.0, 1.0])
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    compressor.attach([optimizer])
    layer.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert compressor.stepped()
    assert not compressor.stepped()
    compressor.compress()
    compressor.settle([optimizer])
    assert not optimizer.state  # what it held was about the penalty
    for _ in range(3):
        layer.weight.grad = torch.ones(1, 2)
        compressor.attract(optimizer)
        optimizer.step()
    assert layer.weight[0, 1] == 0
    assert layer.weight[0, 0] != 3.0
    layer.weight.data.fill_(1.0)
    compressor.enforce()
    assert layer.weight.tolist() == [[1.0, 0.0]]
    compressor.detach()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="start anew"):
        compressor.compress()


def test_state_goes_from_one_to_another() -> None:
    first, second = two_layers(0), two_layers(1)
    one, other = (Compressor(model, SparsityPlan({"*": 0.5}), penalty=0.1) for model in (first, second))
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    one.compress()
    for _ in range(3):
        first(torch.ones(2, 8)).sum().backward()
        one.attract(optimizer)
        optimizer.step()
        one.compress()
    first(torch.ones(2, 8)).sum().backward()
    one.attract(optimizer)
    one.show()  # the state has the weights in training even then
    other.load_state_dict(one.state_dict())
    one.hide()
    for compressor in (one, other):
        compressor.compress()
    assert other.penalty == one.penalty == pytest.approx(0.1 * 1.1**4)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(one.theta[name], other.theta[name])
        assert torch.equal(one.multipliers[name], other.multipliers[name])
        assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    changed = Compressor(two_layers(), SparsityPlan({"*": 0.5}), penalty=0.2)
    with pytest.raises(ValueError, match=r"another penalty: 0\.1 then, 0\.2 now"):
        changed.load_state_dict(one.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_multipliers_are_as_precise_as_they_need_to_be(dtype: torch.dtype) -> None:
    layer = one_layer([3.0, 1.0]).to(dtype)
    compressor = Compressor(layer, SparsityPlan({"*": 0.5}))
    compressor.compress()
    layer.weight.grad = torch.zeros(1, 2, dtype=dtype)
    compressor.attract(torch.optim.SGD(layer.parameters(), lr=0.1))
    compressor.compress()
    assert compressor.multipliers["weight"].dtype == torch.promote_types(dtype, torch.float32)
    assert compressor.multipliers["weight"][0].tolist() == pytest.approx([0.0, -1e-3])
    assert compressor.theta["weight"].dtype == dtype


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0.0, 1.1, 1.0), r"penalty is where mu starts, above 0 and finite, got penalty=0\.0"),
        ((-1.0, 1.1, 1.0), r"got penalty=-1\.0"),
        ((math.inf, 1.1, 1.0), "got penalty=inf"),
        ((1.0, 0.9, 1.0), r"growth is the factor of mu per round, at least 1 and finite, got growth=0\.9"),
        ((1.0, math.nan, 1.0), "got growth=nan"),
        ((1.0, 1.1, 0.5), r"max_penalty bounds mu from above, got max_penalty=0\.5 with penalty=1\.0"),
        ((1.0, 1.1, math.inf), "got max_penalty=inf"),
    ],
)
def test_numbers_that_cannot_work(numbers: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_penalty(*numbers)
    with pytest.raises(ValueError, match=message):
        Compressor(
            two_layers(), SparsityPlan({"*": 0.5}), penalty=numbers[0], growth=numbers[1], max_penalty=numbers[2]
        )


def test_other_refusals() -> None:
    for criterion in (GradientMagnitude(), Movement()):
        with pytest.raises(ValueError, match=r"cannot see a gradient; use a criterion of the weights alone"):
            Compressor(two_layers(), SparsityPlan({"*": 0.5}), criterion=criterion)
    compressor = Compressor(two_layers(), SparsityPlan({"*": 0.5}), criterion=Magnitude())
    for act in (compressor.settle, lambda: compressor.gap):
        with pytest.raises(RuntimeError, match=r"needs a theta .* call compress\(\) first"):
            act()
    table = nn.Embedding(4, 2, sparse=True)
    compressor = Compressor(table, SparsityPlan({"weight": 0.5}))
    compressor.compress()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'weight' is sparse.*sparse=False"):
        compressor.attract(torch.optim.SGD(table.parameters(), lr=0.1))
