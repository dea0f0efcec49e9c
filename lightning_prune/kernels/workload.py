"""What one layer call asks of a kernel: shapes alone, no numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from lightning_prune.layers import LayerCall, LayerSpec, LayerTable

Pair = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """The shape of one call of a linear layer or of a 2-D convolution.

    Args:
        kind: "linear" or "conv2d".
        batch: rows of a linear layer's input, images of a convolution's.
        inputs: features or channels that come in.
        outputs: features or channels that go out.
        input_size: height and width that come in; (1, 1) for linear layers, as are the next ones.
        output_size: height and width that go out.
        window: height and width of the kernel.
        stride: per dimension.
        padding: before each dimension.
        dilation: per dimension.
        groups: of a convolution.

    Raises:
        ValueError: a size is not a positive whole number, groups do not divide the channels, or a linear layer has
            what only convolutions have.

    >>> work = Workload("conv2d", 1, 64, 128, (56, 56), (28, 28), window=(3, 3), stride=(2, 2), padding=(1, 1))
    >>> work.macs, work.weights, work.positions
    (57802752, 73728, 784)
    >>> print(work)
    conv2d 64->128 k3x3 s2 56x56->28x28 b1
    """

    kind: str
    batch: int
    inputs: int
    outputs: int
    input_size: Pair = (1, 1)
    output_size: Pair = (1, 1)
    window: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        """Refuse shapes that no layer has."""
        if self.kind not in ("linear", "conv2d"):
            raise ValueError(f"a workload is 'linear' or 'conv2d', got kind={self.kind!r}")
        pairs = (self.input_size, self.output_size, self.window, self.stride, self.dilation, self.padding)
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"sizes of images are pairs of height and width, got {self!r}")
        sizes = (self.batch, self.inputs, self.outputs, self.groups, *(size for pair in pairs for size in pair))
        if any(type(size) is not int for size in sizes) or min(sizes[:-2]) < 1 or min(self.padding) < 0:
            raise ValueError(f"every size of a layer call is a whole number, at least 1 (padding 0), got {self!r}")
        if self.inputs % self.groups or self.outputs % self.groups:
            raise ValueError(f"{self.groups} groups do not divide both {self.inputs} inputs and {self.outputs} outputs")
        if self.kind == "linear" and (set(pairs[:-1]) != {(1, 1)} or self.padding != (0, 0) or self.groups > 1):
            raise ValueError(f"linear layers have batch, inputs and outputs alone, got {self!r}")

    def __str__(self) -> str:
        """A short unique name."""
        if self.kind == "linear":
            return f"linear {self.inputs}->{self.outputs} b{self.batch}"
        extra = "".join(
            f" {letter}{_pair(value)}"
            for letter, value, usual in (
                ("s", self.stride, (1, 1)),
                ("p", self.padding, tuple((w - 1) * d // 2 for w, d in zip(self.window, self.dilation, strict=True))),
                ("d", self.dilation, (1, 1)),
            )
            if value != usual
        )
        groups = f" g{self.groups}" if self.groups > 1 else ""
        sizes = "->".join("x".join(map(str, size)) for size in (self.input_size, self.output_size))
        return (
            f"conv2d {self.inputs}->{self.outputs} k{self.window[0]}x{self.window[1]}{extra}{groups} {sizes} "
            f"b{self.batch}"
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the layer's weight, `[outputs, inputs / groups, *window]`."""
        shape = (self.outputs, self.inputs // self.groups)
        return shape if self.kind == "linear" else (*shape, *self.window)

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return math.prod(self.window)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape)

    @property
    def positions(self) -> int:
        """Output positions of the whole batch: each meets every weight of its group once."""
        return self.batch * math.prod(self.output_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates when dense."""
        return self.weights * self.positions

    @property
    def input_elements(self) -> int:
        """Numbers that come in."""
        return self.batch * self.inputs * math.prod(self.input_size)

    @property
    def output_elements(self) -> int:
        """Numbers that go out."""
        return self.batch * self.outputs * math.prod(self.output_size)

    @property
    def pointwise(self) -> bool:
        """Whether the input, as it lies in memory, is already the matrix that the weight multiplies."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what has its default is left out."""
        return {field.name: value for field in fields(self) if (value := asdict(self)[field.name]) != field.default}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workload:
        """The inverse of `as_dict`.

        Raises:
            ValueError: a key is unknown or missing.
        """
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a layer call: {data!r} ({error})") from None

    def layer(self, bias: bool = True) -> nn.Linear | nn.Conv2d:
        """A layer of this shape with fresh weights."""
        if self.kind == "linear":
            return nn.Linear(self.inputs, self.outputs, bias)
        return nn.Conv2d(
            self.inputs, self.outputs, self.window, self.stride, self.padding, self.dilation, self.groups, bias
        )

    def input_shape(self) -> tuple[int, ...]:
        """Of an input that makes this call."""
        return (self.batch, self.inputs) if self.kind == "linear" else (self.batch, self.inputs, *self.input_size)


def workloads(spec: LayerSpec) -> tuple[Workload, ...]:
    """The calls of a layer of a table, in order.

    Raises:
        ValueError: the layer is of a kind without kernels, or is called with an empty batch; the message says which.
    """
    return tuple(_workload(spec, call) for call in spec.calls)


def runnable(table: LayerTable) -> dict[str, tuple[Workload, ...]]:
    """The layers of a table that some kernel may run: linear layers and 2-D convolutions with a weight of their own."""
    found = {}
    for spec in table:
        try:
            works = workloads(spec)
        except ValueError:
            continue
        if spec.name.rpartition(".")[2] == "weight":
            found[spec.name] = works
    return found


def _workload(spec: LayerSpec, call: LayerCall) -> Workload:
    if 0 in call.input_shape:
        raise ValueError(f"{spec.name}: called with an empty input of shape {call.input_shape}; give a batch of >= 1")
    if spec.kind == "linear":
        *rows, inputs = call.input_shape
        return Workload("linear", math.prod(rows), inputs, call.output_shape[-1])
    if spec.kind != "conv2d":
        raise ValueError(f"{spec.name}: no kernel runs {spec.kind} layers; their time is part of the fixed part")
    shape = call.input_shape if len(call.input_shape) == 4 else (1, *call.input_shape)
    padding = spec.padding
    if isinstance(padding, str):
        reach = [d * (w - 1) for d, w in zip(spec.dilation, spec.weight_shape[2:], strict=True)]
        padding = tuple(r // 2 for r in reach) if padding == "same" else (0, 0)
    height, width = call.output_shape[-2:]
    return Workload(
        "conv2d",
        shape[0],
        shape[1],
        spec.weight_shape[0],
        (shape[2], shape[3]),
        (height, width),
        _two(spec.weight_shape[2:]),
        _two(spec.stride),
        _two(padding),
        _two(spec.dilation),
        spec.groups,
    )


def _two(values: tuple[int, ...]) -> Pair:
    return (values[0], values[1])


def _pair(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
