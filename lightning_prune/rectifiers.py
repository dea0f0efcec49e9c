"""Lets layers rectify their own outputs where a ReLU module alone reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lightning_prune.folding import Reads, removed, replace_module, unwatched
from lightning_prune.tracing import observe


class Rectifier(nn.Module):
    """A ReLU that returns tensors as they are which a layer has rectified already, and marked.

    Args:
        inplace: as of `nn.ReLU`.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """`max(x, 0)`."""
        if not getattr(x, "rectified", False):
            return nn.functional.relu(x, self.inplace)
        x.rectified = False  # type: ignore[attr-defined]  # somebody may work on it in place from here on
        return x


def mark_rectified(x: Tensor) -> Tensor:
    """Tell the `Rectifier` that sees a tensor next that there is nothing left to do."""
    x.rectified = True  # type: ignore[attr-defined]
    return x


def skip_rectified(model: nn.Module) -> None:
    """Put a `Rectifier` in the place of every ReLU module, however many calls share it."""
    for module in list(model.modules()):
        if type(module) is nn.ReLU and unwatched(module):
            replace_module(model, module, Rectifier(module.inplace))


def rectified_layers(model: nn.Module, example_inputs: Any, names: Collection[str]) -> list[str]:
    """Those of the layers whose output nobody sees before a ReLU module does.

    Args:
        model: in eval mode.
        example_inputs: as for `layer_table`.
        names: of layers that are called once.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    >>> rectified_layers(model, torch.zeros(1, 2), ["0", "2"])
    ['0']
    """
    reads = Reads()
    made: dict[int, str] = {}
    found: dict[str, Tensor | None] = {}

    def on_layer(name: str) -> Any:
        def note(layer: nn.Module, args: Any, output: Tensor) -> None:
            made[id(output)] = name
            reads.announce(output)

        return note

    def before_relu(relu: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        name = made.get(id(x))
        if name is not None and reads.counts[id(x)] == 0:
            found[name] = None if relu.inplace else x  # in place, what is read later is rectified

    handles = [model.get_submodule(name).register_forward_hook(on_layer(name)) for name in names]
    handles += [
        module.register_forward_pre_hook(before_relu, with_kwargs=True)
        for module in model.modules()
        if type(module) is nn.ReLU and unwatched(module)
    ]
    with removed(handles):
        reads.note(observe(model, example_inputs, reads))
    return [name for name, x in found.items() if x is None or reads.counts[id(x)] == 1]
