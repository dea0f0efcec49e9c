"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; images are flattened first.

    `MLP([784, 300, 100, 10])` is the LeNet-300-100 of the pruning papers.

    Args:
        widths: Inputs of one example, neurons of each hidden layer, and classes.

    Shapes:
        `[batch, ...]` with `widths[0]` values per example -> `[batch, widths[-1]]`.

    Raises:
        ValueError: Fewer than two widths, a width below 1, or examples of another size.

    Example:
        >>> network = MLP([64, 300, 100, 10])
        >>> sum(p.numel() for p in network.parameters())
        50610
        >>> [name for name, _ in network.named_parameters()][:2]
        ['layers.0.weight', 'layers.0.bias']
    """

    def __init__(self, widths: Sequence[int] = (64, 300, 100, 10)) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"MLP needs at least two widths, each >= 1, got widths={list(widths)}; "
                "give inputs, hidden layers and classes, such as [64, 300, 100, 10]."
            )
        self.inputs = widths[0]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape `[batch, classes]`."""
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ValueError(
                f"MLP takes {self.inputs} values per example but got {x.shape[1]}; set its first width to {x.shape[1]}."
            )
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)  # type: ignore[no-any-return]
