"""Which layers feed which, against what changes when a layer's outputs do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.kernels.workload import runnable
from lightning_prune.latency.producers import producers
from lightning_prune.layers import layer_table
from tests.latency.profiles import mlp, residual


class Joined(nn.Module):
    """Concatenation, a sum over images, a layer that is called twice, an idle one, and a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 3, padding=1)
        self.gate = nn.Linear(10, 10)
        self.twice = nn.Conv2d(10, 10, 1)
        self.idle = nn.Conv2d(10, 3, 1)
        self.grouped = nn.Conv2d(10, 4, 1, groups=2)
        self.out = nn.Linear(4 * 16, 5)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], dim=1).relu()
        both = both + self.gate(both.mean((2, 3)))[:, :, None, None]
        h = self.twice(self.twice(both)).flip(1)
        self.idle(h)
        self.seen += h.mean()
        y: Tensor = self.out(self.grouped(torch.cat([h[:, 5:], both[:, :5]], dim=1)).flatten(1))
        return y


def joined() -> tuple[Joined, Tensor]:
    torch.manual_seed(0)
    return Joined().eval(), torch.randn(2, 2, 4, 4)


def by_change(model: nn.Module, example: Tensor, layers: dict[str, Any]) -> dict[str, Counter[tuple[str, ...]]]:
    """Per layer, how many inputs change with which layers' outputs."""
    inputs: dict[str, list[Tensor]] = {}
    speaking = ""
    names = {module: name for name, module in layers.items()}

    def before(module: nn.Module, args: tuple[Tensor]) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        inputs.setdefault(names[module], []).append(args[0].movedim(dim, 0).flatten(1).clone())

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 1.0 + torch.rand_like(output) if names[module] == speaking else torch.zeros_like(output)

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    runs = {}
    with torch.no_grad():
        for speaking in ("", *layers):  # the hooks read it
            inputs = {}
            model(torch.zeros_like(example))
            runs[speaking] = inputs
    for handle in handles:
        handle.remove()
    found = {}
    for name in layers:
        count = len(runs[""][name][0])
        pairs = [(runs[""][name], other, runs[other][name]) for other in layers]
        sets = [
            tuple(other for a, other, b in pairs if any((x[c] != y[c]).any() for x, y in zip(a, b, strict=True)))
            for c in range(count)
        ]
        found[name] = Counter(names for names in sets if names)
    return found


@pytest.mark.parametrize("make", [residual, mlp, joined])
def test_equal_what_changes(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, example = make()
    works = runnable(layer_table(model, example))
    layers: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in works}
    found = producers(model, example, layers)
    expected = by_change(model, example, layers)
    for name, counts in expected.items():
        inputs = next(iter(works[name])).inputs
        assert {names: round(share * inputs) for share, names in found.get(name, ())} == dict(counts)
    assert any(found.values())


def test_leave_the_model_as_it_was() -> None:
    model, example = joined()
    model.seen.fill_(3.0)
    layers: dict[str, Any] = {"a.weight": model.a, "out.weight": model.out}
    producers(model, example, layers)
    assert float(model.seen) == 3.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_keep_a_forward_of_a_modules_own_and_bear_shapes_that_depend_on_values() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return cast(Tensor, self.b(y if y.isnan().any() else y[:1]))

    model = Picky().eval()
    own = model.a.forward
    vars(model.a)["forward"] = own
    found = producers(model, torch.zeros(3, 2), {"a.weight": model.a, "b.weight": model.b})
    assert found == {"b.weight": ((1.0, ("a.weight",)),)}
    assert vars(model.a)["forward"] == own
    assert "forward" not in vars(model.b)
