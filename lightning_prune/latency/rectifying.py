"""How long the ReLUs take that a kernel may do by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn


def rectifier_seconds(
    model: nn.Module,
    names: Collection[str],
    run: Callable[[], Any],
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Least seconds, in full passes, of the ReLU module behind each of the named layers.

    Args:
        model: whose passes `run` makes.
        names: of layers, each called once in a pass, whose output a ReLU module alone reads.
        run: makes one pass.
        rounds: how often.
        settle: is called before each pass.

    Returns:
        Seconds by name; layers behind which no ReLU module was called are left out.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    >>> list(rectifier_seconds(model, ["0"], lambda: model(torch.zeros(1, 2)), rounds=2))
    ['0']
    """
    made: dict[int, str] = {}
    begun: dict[nn.Module, tuple[str, float]] = {}
    least: dict[str, float] = {}

    def on_layer(name: str) -> Any:
        def note(layer: nn.Module, args: Any, output: Tensor) -> None:
            made[id(output)] = name

        return note

    def before(relu: nn.Module, args: Any, kwargs: Any) -> None:
        name = made.pop(id(args[0] if args else kwargs.get("input")), None)
        if name is not None:
            begun[relu] = (name, time.perf_counter())

    def after(relu: nn.Module, args: Any, output: Tensor) -> None:
        end = time.perf_counter()
        if relu in begun:
            name, start = begun.pop(relu)
            least[name] = min(least.get(name, math.inf), end - start)

    handles = [model.get_submodule(name).register_forward_hook(on_layer(name)) for name in names]
    for module in model.modules():
        if type(module) is nn.ReLU:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        with torch.inference_mode():
            for _ in range(rounds + 1):
                settle()
                run()
                made.clear()
    finally:
        for handle in handles:
            handle.remove()
    return least
