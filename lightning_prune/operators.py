"""What PyTorch's operators do with weights: whose weight it is, the shapes, the multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightUse:
    """One operation between a weight, or a slice of it, and data; names are plain parameter names."""

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    biases: tuple[str, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False


class Owners:
    """Knows which parameter a tensor comes from: by its memory, or because it was computed from it alone."""

    def __init__(self) -> None:
        # Storage -> (a reference telling whether it still lives, [(first, one past last, owner)]). A
        # storage may hold several parameters, as those of an LSTM on a GPU; None owns buffers.
        self._spans: dict[int, tuple[StorageWeakRef, list[tuple[float, float, str | None]]]] = {}

    def add(self, tensor: Tensor, owner: str | None, *, whole: bool = False) -> None:
        """Let `owner` own the elements of the tensor, or the whole of its storage."""
        if (key := _storage_key(tensor)) is None:
            return
        first = int(tensor.storage_offset())
        span = (0.0, math.inf, owner) if whole else (first, first + tensor.numel(), owner)
        if not self.known(tensor):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._spans[key] = (reference, [])
        self._spans[key][1].append(span)

    def known(self, tensor: Tensor) -> bool:
        """Whether the tensor holds parameters, buffers, or what was computed from these alone."""
        key = _storage_key(tensor)
        return key in self._spans and not self._spans[key][0].expired()

    def of(self, tensor: Tensor | None) -> str | None:
        """The parameter that the tensor is, views, or was computed from; the first added counts."""
        if tensor is None or not self.known(tensor):
            return None
        place = tensor.storage_offset()
        spans = self._spans[_storage_key(tensor)][1]  # type: ignore[index]
        return next((owner for first, end, owner in spans if first <= place < end), None)

    def follow(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Pass ownership on to what is computed from weights and buffers alone.

        A copy in another dtype, a masked or a normalised weight belongs to the one weight of its size.
        """
        inputs = list(inputs)
        if not inputs or not all(map(self.known, inputs)):
            return
        for output in outputs:
            if not self.known(output):
                sources = {self.of(tensor) for tensor in inputs if tensor.numel() == output.numel()} - {None}
                self.add(output, sources.pop() if len(sources) == 1 else None, whole=True)


def _storage_key(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors have none
        return None


Arguments = Mapping[str, Any]
# One per family of operators: (arguments by name, output, owners) -> the uses it makes of weights.
Rule = Callable[[Arguments, Any, Owners], Iterator[WeightUse]]


def _linear(arguments: Arguments, output: Tensor, owners: Owners) -> Iterator[WeightUse]:
    """MACs = prod(output) * in_features."""
    inputs, weight, bias = (arguments[key] for key in ("input", "weight", "bias"))
    if name := owners.of(weight):
        macs = output.numel() * weight.shape[-1]
        yield WeightUse(name, "linear", _shape(inputs), _shape(output), macs, _biases(owners, bias))


def _product(left: str, right: str) -> Rule:
    """MACs = prod(output) * length of the sum.

    One operand must be data: a product of weights with weights or buffers, as in spectral normalisation
    or a low-rank factorisation, prepares a weight and is no layer.
    """

    def rule(arguments: Arguments, output: Tensor, owners: Owners) -> Iterator[WeightUse]:
        first, second = arguments[left], arguments[right]
        if owners.known(first) and owners.known(second):
            return
        data, weight = (first, second) if owners.known(second) else (second, first)
        if name := owners.of(weight):
            bias = None if left == "self" else arguments["self"]
            macs = output.numel() * first.shape[-1]
            yield WeightUse(name, "linear", _shape(data), _shape(output), macs, _biases(owners, bias))

    return rule


def _convolution(transposed: bool | None = None) -> Rule:
    """MACs = N * Cout * prod(out) * (Cin / groups) * prod(kernel), with `in` for `out` when transposed.

    As Cin * Cout / groups * prod(kernel) elements make the weight, that is N * prod(out) * numel(weight).
    """

    def rule(arguments: Arguments, output: Tensor, owners: Owners) -> Iterator[WeightUse]:
        inputs, weight = arguments["input"], arguments["weight"]
        if not (name := owners.of(weight)):
            return
        turned = bool(arguments["transposed"]) if transposed is None else transposed
        dimensions = weight.dim() - 2
        # N * prod(out) or N * prod(in): the weight is stored with Cout, or transposed with Cin, in front
        positions = (inputs if turned else output).numel() // weight.shape[0]
        padding = arguments["padding"]
        if padding == "valid":
            padding = [0]
        yield WeightUse(
            name,
            f"conv_transpose{dimensions}d" if turned else f"conv{dimensions}d",
            _shape(inputs),
            _shape(output),
            positions * weight.numel(),
            _biases(owners, arguments["bias"]),
            stride=_each(arguments["stride"], dimensions),
            padding=padding if isinstance(padding, str) else _each(padding, dimensions),
            dilation=_each(arguments["dilation"], dimensions),
            groups=int(arguments["groups"]),
            transposed=turned,
        )

    return rule


def _recurrent(kind: str) -> Rule:
    """MACs of each weight = steps * batch * numel(weight): every step multiplies by every element once.

    PyTorch hands over, per layer and direction, w_ih, w_hh, then b_ih, b_hh if any, then w_hr if the
    hidden state is projected. A packed sequence counts its valid steps only.
    """

    def rule(arguments: Arguments, _output: Any, owners: Owners) -> Iterator[WeightUse]:
        packed = "data" in arguments
        lead = _shape(arguments["data"])[:1] if packed else _shape(arguments["input"])[:2]
        directions = 2 if arguments["bidirectional"] else 1
        tensors: list[Tensor] = arguments["params"]
        group = len(tensors) // (int(arguments["num_layers"]) * directions)
        for begin in range(0, len(tensors), group):
            cell = tensors[begin : begin + group]
            weights = [tensor for tensor in cell if tensor.dim() > 1]
            biases: list[Tensor | None] = [tensor for tensor in cell if tensor.dim() == 1]
            biases += [None] * (len(weights) - len(biases))
            for weight, bias in zip(weights, biases, strict=True):
                if name := owners.of(weight):
                    rows, columns = _shape(weight)
                    macs = math.prod(lead) * weight.numel()
                    yield WeightUse(name, kind, (*lead, columns), (*lead, rows), macs, _biases(owners, bias))

    return rule


def _embedding(arguments: Arguments, output: Any, owners: Owners) -> Iterator[WeightUse]:
    """No MACs: rows are looked up."""
    if name := owners.of(arguments["weight"]):
        rows = output if isinstance(output, Tensor) else output[0]
        yield WeightUse(name, "embedding", _shape(arguments["indices"]), _shape(rows), 0)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _each(value: int | list[int], dimensions: int) -> tuple[int, ...]:
    """One number per dimension; a single one holds for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(int(number) for number in (numbers * dimensions if len(numbers) == 1 else numbers))


def _biases(owners: Owners, bias: Tensor | None) -> tuple[str, ...]:
    name = owners.of(bias)
    return () if name is None else (name,)


RULES: dict[OpOverload, Rule] = {
    aten.linear.default: _linear,
    aten.mm.default: _product("self", "mat2"),
    aten.bmm.default: _product("self", "mat2"),
    aten.mv.default: _product("self", "vec"),
    aten.addmm.default: _product("mat1", "mat2"),
    aten.baddbmm.default: _product("batch1", "batch2"),
    aten.conv1d.default: _convolution(transposed=False),
    aten.conv1d.padding: _convolution(transposed=False),
    aten.conv2d.default: _convolution(transposed=False),
    aten.conv2d.padding: _convolution(transposed=False),
    aten.conv3d.default: _convolution(transposed=False),
    aten.conv3d.padding: _convolution(transposed=False),
    aten.conv_transpose1d.default: _convolution(transposed=True),
    aten.conv_transpose2d.input: _convolution(transposed=True),
    aten.conv_transpose3d.input: _convolution(transposed=True),
    aten.convolution.default: _convolution(),
    aten._convolution.default: _convolution(),
    aten.lstm.input: _recurrent("lstm"),
    aten.lstm.data: _recurrent("lstm"),
    aten.gru.input: _recurrent("gru"),
    aten.gru.data: _recurrent("gru"),
    aten.rnn_tanh.input: _recurrent("rnn"),
    aten.rnn_tanh.data: _recurrent("rnn"),
    aten.rnn_relu.input: _recurrent("rnn"),
    aten.rnn_relu.data: _recurrent("rnn"),
    aten.embedding.default: _embedding,
    aten._embedding_bag.default: _embedding,
    aten._embedding_bag_forward_only.default: _embedding,
}
