"""The layer table: shapes, weights and multiply-accumulates of a model's layers, in execution order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.operators import WeightUse
from lightning_prune.targets import closest, parameters
from lightning_prune.tracing import weight_uses

__all__ = ["LayerSpec", "LayerTable", "layer_table"]


@dataclass(frozen=True)
class LayerCall:
    """One use of a weight.

    Args:
        input_shape: of the data that meets the weight, as the operation was given it.
        output_shape: of the result.
        macs: multiply-accumulates; one is a multiplication and an addition, two FLOPs.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if self.macs < 0:
            raise ValueError(f"macs is a count, got {self.macs}")


@dataclass(frozen=True)
class LayerSpec:
    """A weight and the work that is done with it.

    Args:
        name: plain parameter name of the weight, as a sparsity plan spells it.
        kind: "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d", "lstm", "gru",
            "rnn" or "embedding"; of a tied weight, that of its first call.
        weight_shape: of the whole parameter as stored.
        calls: every use, at least one, in execution order. A parameter that is used in slices, as the
            projections of `nn.MultiheadAttention` between different tensors, has a call per slice.
        bias_params: elements of the biases that the calls add.
        stride: per spatial dimension, empty for other layers than convolutions; of the first call, as
            are the next four.
        padding: likewise; "same" where the convolution was given that word.
        dilation: likewise.
        groups: of a convolution, 1 for other layers.
        transposed: whether the convolution is transposed and its weight stored `[in, out / groups, *k]`.

    >>> call = LayerCall((1, 64, 56, 56), (1, 256, 28, 28), macs=28 * 28 * 256 * 64 * 9)
    >>> spec = LayerSpec("conv1.weight", "conv2d", (256, 64, 3, 3), (call,), stride=(2, 2))
    >>> spec.params, spec.macs, spec.nonzeros(0.5), spec.kept_macs(0.5)
    (147456, 115605504, 73728, 57802752)
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    calls: tuple[LayerCall, ...]
    bias_params: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        """Refuse a layer without a name, weights or calls."""
        if not self.name or not self.kind:
            raise ValueError(f"a layer needs a name and a kind, got {self.name!r} and {self.kind!r}")
        if self.params < 1:
            raise ValueError(f"{self.name}: a layer needs weights, got weight_shape={self.weight_shape}")
        if not self.calls:
            raise ValueError(f"{self.name}: a layer is called at least once, got calls={self.calls}")
        if self.bias_params < 0:
            raise ValueError(f"{self.name}: bias_params is a count, got {self.bias_params}")
        if self.groups < 1:
            raise ValueError(f"{self.name}: a convolution has at least one group, got {self.groups}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first call."""
        return self.calls[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the first call."""
        return self.calls[0].output_shape

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls, for the whole batch of the example."""
        return sum(call.macs for call in self.calls)

    @property
    def params(self) -> int:
        """Elements of the weight alone; biases are `bias_params`."""
        return math.prod(self.weight_shape)

    def nonzeros(self, sparsity: float) -> int:
        """Weights kept when a share is removed: `params - round(sparsity * params)`.

        Raises:
            ValueError: the sparsity is outside [0, 1].
        """
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"{self.name}: sparsity is the fraction removed, in [0, 1], got {sparsity!r}")
        return self.params - round(sparsity * self.params)

    def kept_macs(self, sparsity: float) -> int:
        """MACs with kept weights: `round(macs * nonzeros / params)`, every weight being used alike often."""
        return round(self.macs * self.nonzeros(sparsity) / self.params)


@dataclass(frozen=True)
class LayerTable(Sequence[LayerSpec]):
    """The layers of a model in the order in which they first run.

    A sequence of `LayerSpec` that is also indexed by name. A plan is any mapping from names of the
    table to the fraction removed; layers that it leaves out are dense.

    Args:
        layers: with distinct names.

    >>> import torch
    >>> table = layer_table(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(3, 4))
    >>> print(table)
    layer     kind    weight  output  params  macs
    0.weight  linear  8x4     3x8         32    96
    2.weight  linear  2x8     3x2         16    48
    total                                 48   144
    >>> plan = {"0.weight": 0.75}
    >>> table["2.weight"].macs, table.total_macs, table.macs(plan), table.nonzeros(plan)
    (48, 144, 72, 24)
    """

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        """Refuse two layers of one name."""
        names = self.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"a weight has one entry in a layer table, found several of {sorted(twice)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Plain parameter names of the weights, in execution order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of all layers, dense."""
        return sum(layer.macs for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Weights of all layers, without biases."""
        return sum(layer.params for layer in self.layers)

    def macs(self, plan: Mapping[str, float]) -> int:
        """MACs that remain under a plan: the sum of `LayerSpec.kept_macs`.

        Raises:
            KeyError: the plan names a weight that is not in the table.
            ValueError: a sparsity is outside [0, 1].
        """
        return sum(layer.kept_macs(sparsity) for layer, sparsity in self._planned(plan))

    def nonzeros(self, plan: Mapping[str, float]) -> int:
        """Weights that remain under a plan: the sum of `LayerSpec.nonzeros`; raises as `macs` does."""
        return sum(layer.nonzeros(sparsity) for layer, sparsity in self._planned(plan))

    def _planned(self, plan: Mapping[str, float]) -> Iterator[tuple[LayerSpec, float]]:
        for name in plan:
            self[name]
        return ((layer, plan.get(layer.name, 0.0)) for layer in self.layers)

    @overload
    def __getitem__(self, index: int | str) -> LayerSpec: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerSpec, ...]: ...

    def __getitem__(self, index: int | str | slice) -> LayerSpec | tuple[LayerSpec, ...]:
        """A layer by position or name, or several by slice."""
        if not isinstance(index, str):
            return self.layers[index]
        for layer in self.layers:
            if layer.name == index:
                return layer
        raise KeyError(
            f"no layer {index!r} among the {len(self)} of the table; the closest are {closest(index, self.names)}"
        )

    def __len__(self) -> int:
        """How many weights it lists."""
        return len(self.layers)

    def __str__(self) -> str:
        """One line per layer and one of totals."""
        rows = [("layer", "kind", "weight", "output", "params", "macs")]
        rows += [
            (x.name, x.kind, _times(x.weight_shape), _times(x.output_shape), f"{x.params:,}", f"{x.macs:,}")
            for x in self.layers
        ]
        rows.append(("total", "", "", "", f"{self.total_params:,}", f"{self.total_macs:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place < 4 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def layer_table(model: nn.Module, example_inputs: Any) -> LayerTable:
    """Lists the layers that a model runs on an example, with their shapes, weights and MACs.

    Listed is every parameter that meets data in a linear map, convolution, recurrent layer or embedding,
    whether through its module or functionally, once per parameter however often it is used. Never called
    layers are left out, and so are products between activations, as inside attention. With B for the
    product of leading dimensions and N for the batch, the MACs of a call are

        linear            B * out_features * in_features
        convolution       N * Cout * prod(out) * (Cin / groups) * prod(kernel)
        transposed        N * Cin * prod(in) * (Cout / groups) * prod(kernel)
        LSTM, GRU, RNN    N * steps * numel(weight), for each weight of each layer and direction
        embedding         0

    that is half of what `torch.utils.flop_counter.FlopCounterMode` counts. They are for the example as
    given, its whole batch included.

    The model is run in eval mode on fake tensors, which takes neither arithmetic nor memory, also for
    models on the meta device. If its shapes depend on its data, as in detection, it is run for real on
    the example. Either way it is left as it was: modes, gradients, buffers, hooks, random generators.

    Args:
        model: any module.
        example_inputs: a tuple holds positional arguments, a mapping keyword arguments; anything else, a
            tensor or a list say, is the only argument. Tensors are taken to the model's device.

    Raises:
        ValueError: the model has lazy parameters, does not run on the example, or runs no such layer.

    >>> import torch
    >>> table = layer_table(nn.Conv2d(64, 256, 3, stride=2, padding=1), torch.empty(1, 64, 56, 56))
    >>> table.total_params, table.total_macs, table[0].output_shape
    (147456, 115605504, (1, 256, 28, 28))
    """
    lazy = [name for name, parameter in parameters(model).items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"{type(model).__name__} has parameters without a shape yet, {', '.join(lazy)}: "
            "run it once, model(example), before its layers are listed"
        )
    uses: dict[str, list[WeightUse]] = {}
    for use in weight_uses(model, example_inputs):
        uses.setdefault(use.name, []).append(use)
    if not uses:
        raise ValueError(
            f"{type(model).__name__} used no weight in a linear, convolution, recurrent or embedding layer: "
            "pass a model that has such layers and an example on which its forward runs them"
        )
    tensors = parameters(model)
    return LayerTable(tuple(_spec(calls, tensors) for calls in uses.values()))


def _spec(uses: Sequence[WeightUse], tensors: Mapping[str, nn.Parameter]) -> LayerSpec:
    first = uses[0]
    return LayerSpec(
        name=first.name,
        kind=first.kind,
        weight_shape=tuple(tensors[first.name].shape),
        calls=tuple(LayerCall(use.input_shape, use.output_shape, use.macs) for use in uses),
        bias_params=sum(tensors[bias].numel() for bias in {bias for use in uses for bias in use.biases}),
        stride=first.stride,
        padding=first.padding,
        dilation=first.dilation,
        groups=first.groups,
        transposed=first.transposed,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
