"""Second moments of what Linear and Conv2d layers take in, gathered by hooks on calibration batches."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.calibration_batches import NotFinite, each, run
from lightning_prune.targets import closest, parameters

POSITIONS = 4096
_BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the inputs of a layer; it is all that repairing and judging its weights takes.

    Args:
        name: of the weight.
        gram: `H = E[x x^T]`, `[groups, n, n]` with `n` the weights of a row; groups are 1 but for grouped convolutions.
        mean: `E[x]`, `[groups, n]`.
        positions: how many were averaged.
    """

    name: str
    gram: Tensor
    mean: Tensor
    positions: int

    def covariance(self) -> Tensor:
        """`H - E[x] E[x]^T`: what counts where a constant shift of the outputs is made good, as by a bias."""
        return self.gram - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


@dataclass(frozen=True)
class Layer:
    """A weight that can be repaired, and the modules that use it."""

    name: str
    modules: tuple[nn.Linear | nn.Conv2d, ...]
    bias: str | None

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight

    @property
    def groups(self) -> int:
        first = self.modules[0]
        return first.groups if isinstance(first, nn.Conv2d) else 1

    def gram_bytes(self, dtype: torch.dtype) -> int:
        """Of `H`."""
        return self.groups * self.weight[0].numel() ** 2 * dtype.itemsize


def repairable(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The weights that can be repaired, and why others cannot."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    names = {id(parameter): name for name, parameter in parameters(model).items()}
    layers: dict[str, Layer] = {}
    reasons = dict.fromkeys(names.values(), "no weight of a Linear or Conv2d layer")
    for key, modules in holders.items():
        usable = [
            module for module in modules if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) == key
        ]
        if not usable:
            continue
        name = names[key]
        if len(usable) < len(modules) or len({(type(m), getattr(m, "groups", 1)) for m in usable}) > 1:
            reasons[name] = "another kind of layer uses this weight too"
            continue
        bias = usable[0].bias
        own = bias is not None and len(usable) == 1 and len(holders[id(bias)]) == 1
        layers[name] = Layer(name, tuple(usable), names[id(bias)] if own else None)
        del reasons[name]
    return layers, reasons


class Moments:
    """Sums over positions of what one layer takes in, and of the outputs it is to meet.

    Args:
        layer: whose weight counts `n` entries a row.
        dtype: of the sums.
        paired: whether outputs are given, too.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, paired: bool = False) -> None:
        self.layer = layer
        self.count = 0
        out, n = layer.weight.flatten(1).shape
        zeros = torch.zeros(layer.groups, n, n, dtype=dtype, device=layer.weight.device)
        self.gram, self.total = zeros, zeros.new_zeros(layer.groups, n)
        if paired:
            self.cross, self.outputs = zeros.new_zeros(out, n), zeros.new_zeros(out)
            self.power = zeros.new_zeros(out)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """`x` is `[positions, groups, n]`, `y` `[positions, out]`."""
        x = x.to(self.gram).transpose(0, 1)
        self.count += x.shape[1]
        self.gram.baddbmm_(x.mT, x)
        self.total += x.sum(1)
        if y is not None:
            y = y.to(self.gram)
            self.outputs += y.sum(0)
            self.power += y.square().sum(0)
            self.cross += torch.bmm(y.T.reshape(len(x), -1, y.shape[0]), x).view(self.cross.shape)

    def statistics(self) -> LayerStatistics:
        """Means instead of sums.

        Raises:
            ValueError: they overflowed.
        """
        gram, mean = self.gram.div_(self.count), self.total.div_(self.count)
        if not torch.isfinite(gram).all():
            raise ValueError(f"the second moments of the inputs of {self.layer.name!r} overflow {gram.dtype}")
        return LayerStatistics(self.layer.name, gram, mean, self.count)


def generator_of(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def places_of(module: nn.Module, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Which positions of a call are looked at: all, or `most` of them drawn without replacement."""
    total = y.numel() // (y.shape[-1] if isinstance(module, nn.Linear) else y.shape[-3])
    if total <= most:
        return torch.arange(total, device=x.device)
    return torch.randperm(total, generator=generator)[:most].sort().values.to(x.device)


def patches_of(module: nn.Linear | nn.Conv2d, x: Tensor, places: Tensor) -> Iterator[Tensor]:
    """What the layer sees at these positions, some of them at a time: `[positions, groups, n]`."""
    groups = 1
    if isinstance(module, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = x if x.ndim == 4 else x.unsqueeze(0)
        x = functional.pad(x, list(module._reversed_padding_repeated_twice), mode)
        for dim in (0, 1):
            reach = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
            x = x.unfold(2 + dim, reach, module.stride[dim])[..., :: module.dilation[dim]]
        groups = module.groups
        height, width = x.shape[2:4]
    step = max(1, _BLOCK_BYTES // (module.weight[0].numel() * groups * x.element_size()))
    for some in places.split(step):
        if isinstance(module, nn.Linear):
            yield flat[some].unsqueeze(1)
        else:
            column, row, image = some % width, some // width % height, some // (width * height)
            yield x[image, :, row, column].reshape(len(some), groups, -1)


def outputs_of(module: nn.Linear | nn.Conv2d, y: Tensor, places: Tensor) -> Tensor:
    """`[positions, out]`: what the layer gave, without its bias."""
    if isinstance(module, nn.Linear):
        y = y.reshape(-1, y.shape[-1])[places]
    else:
        y = y if y.ndim == 4 else y.unsqueeze(0)
        height, width = y.shape[2:]
        y = y[places // (width * height), :, places // width % height, places % width]
    return y if module.bias is None else y - module.bias


def _argument(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    if not torch.isfinite(x).all():
        raise NotFinite(
            f"the inputs of {layer.name!r} are not finite on the calibration batches; the network has diverged, or the "
            "batches hold NaN or are not normalised"
        )
    return x


_Hook = Callable[[Layer, Any, Tensor, Tensor], None]


@contextlib.contextmanager
def hooked(layers: Iterable[Layer], hook: _Hook) -> Iterator[None]:
    """Calls `hook(layer, module, input, output)` at every call of the layers."""
    handles = []

    def add(layer: Layer, module: nn.Module) -> None:
        def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            hook(layer, module, _argument(layer, args, kwargs), output)

        handles.append(module.register_forward_hook(forward, with_kwargs=True))

    try:
        for layer in layers:
            for module in layer.modules:
                add(layer, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    max_positions: int = POSITIONS,
    max_bytes: int = 2**31,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """Gather, in one pass over calibration batches, the moments of the inputs of Linear and Conv2d layers.

    The model is run in eval mode and left as it was: modes, parameters, buffers, hooks, global random generators.
    Calls of a shared layer add up. Weights used functionally, past their module, are not seen.

    Args:
        model: any module.
        batches: what the model takes, as for `layer_table`: a tuple holds positional arguments, a mapping keyword
            arguments, anything else is the only argument. Wrap it to show progress.
        names: of weights; all that the batches reach where None.
        max_positions: looked at in every call of a layer; of more, so many are drawn, alike each time.
        max_bytes: that the results may take in all, `groups * n^2` numbers for each layer.
        dtype: of the sums.
        seed: of the draw.

    Returns:
        By name, in the order in which the layers are first called.

    Raises:
        ValueError: no batch, an unknown, unsuitable or unused name, inputs that are not finite, or too many bytes.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> found = layer_statistics(model, [torch.tensor([[1.0, 2.0], [3.0, 0.0]])])
    >>> list(found), found["0.weight"].gram.tolist(), found["0.weight"].mean.tolist()
    (['0.weight', '2.weight'], [[[5.0, 1.0], [1.0, 2.0]]], [[2.0, 1.0]])
    """
    layers = chosen(model, names, max_positions)
    sizes = {layer.name: layer.gram_bytes(dtype) for layer in layers}
    if sum(sizes.values()) > max_bytes:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"the moments of {len(sizes)} layers take {sum(sizes.values()):,} bytes, more than "
            f"max_bytes={max_bytes:,} ({largest!r} alone {sizes[largest]:,}); raise it, name fewer layers, or take "
            "them one after another from each_layer_statistics"
        )
    found = _gather(model, layers, batches, max_positions, dtype, seed)
    _require_called(found, names)
    return found


def each_layer_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    max_positions: int = POSITIONS,
    max_bytes: int = 2**31,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Iterator[LayerStatistics]:
    """The same as `layer_statistics`, in as many passes as it takes to hold no more than `max_bytes` at a time.

    Args:
        model: as for `layer_statistics`, like all that follow.
        batches: that can be read several times.
        names: of weights.
        max_positions: per call of a layer.
        max_bytes: that the layers of one pass may take.
        dtype: of the sums.
        seed: of the draw.

    Raises:
        ValueError: as `layer_statistics`, when a single layer takes more, or when an iterator had to be read twice.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [found.name for found in each_layer_statistics(model, [torch.ones(1, 2)], max_bytes=40)]
    ['0.weight', '2.weight']
    """
    names = None if names is None else list(names)
    found = set()
    for statistics in in_passes(
        model, chosen(model, names, max_positions), batches, max_positions, max_bytes, dtype, seed
    ):
        found.add(statistics.name)
        yield statistics
    _require_called(found, names)


def in_passes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    most: int,
    max_bytes: int,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[LayerStatistics]:
    passes: list[list[Layer]] = []
    room = 0
    for layer in layers:
        size = require_room(layer, dtype, max_bytes)
        if size > room:
            passes.append([])
            room = max_bytes
        passes[-1].append(layer)
        room -= size
    if len(passes) > 1:
        require_repeatable(batches, f"{len(passes)} passes")
    for some in passes:
        found = _gather(model, some, batches, most, dtype, seed)
        while found:
            yield found.pop(next(iter(found)))


def require_room(layer: Layer, dtype: torch.dtype, max_bytes: int) -> int:
    size = layer.gram_bytes(dtype)
    if size > max_bytes:
        raise ValueError(
            f"the moments of {layer.name!r} alone take {size:,} bytes, more than max_bytes={max_bytes:,}; raise it, or "
            "leave the layer out"
        )
    return size


def chosen(model: nn.Module, names: Iterable[str] | None, max_positions: int) -> list[Layer]:
    if max_positions < 1:
        raise ValueError(
            f"max_positions is how many positions of a call are looked at, at least 1, got {max_positions}"
        )
    layers, reasons = repairable(model)
    if names is None:
        if not layers:
            raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer, so there is nothing to repair")
        return list(layers.values())
    names = list(dict.fromkeys(names))
    require_known(names, [*layers, *reasons])
    for name in names:
        if name in reasons:
            raise ValueError(f"{name!r} cannot be repaired: {reasons[name]}; leave it out of names")
    return [layers[name] for name in names]


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"no parameter {name!r} in the model; the closest are {closest(name, known)}")


def _require_called(found: Collection[str], names: Iterable[str] | None) -> None:
    for name in names or ():
        if name not in found:
            raise ValueError(f"the layer of {name!r} is never called on the calibration batches; leave it out of names")


def require_repeatable(batches: Iterable[Any], what: str) -> None:
    if isinstance(batches, Iterator):  # asking a loader for one would draw from the global generator
        raise ValueError(f"{what} over the batches are needed, but an iterator can be read once; pass list(batches)")


def _gather(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any], most: int, dtype: torch.dtype, seed: int
) -> dict[str, LayerStatistics]:
    """Of the layers that are called."""
    sums: dict[str, Moments] = {}
    draws = {layer.name: generator_of(layer.name, seed) for layer in layers}

    def look(layer: Layer, module: Any, x: Tensor, y: Tensor) -> None:
        if layer.name not in sums:
            with torch.inference_mode(False):  # they outlive the pass
                sums[layer.name] = Moments(layer, dtype)
        for patches in patches_of(module, x, places_of(module, x, y, most, draws[layer.name])):
            sums[layer.name].add(patches)

    with hooked(layers, look), contextlib.closing(each(batches)) as numbered:
        for index, batch in numbered:
            run(model, index, batch)
    return {name: moments.statistics() for name, moments in sums.items() if moments.count}
