"""What to quantise, and to how many bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_prune.quantization.ranges import MinMax, Range
from lightning_prune.quantization.schemes import Grid, Scheme, check_bits
from lightning_prune.targets import closest


@dataclass(frozen=True)
class LayerBits:
    """Widths of one layer.

    Args:
        weight: of its weight.
        activation: of its input and, where that is quantised, its output.
    """

    weight: int
    activation: int


@dataclass(frozen=True)
class QuantizationSettings:
    """The arguments of `quantize`, checked; its docstring explains them.

    Raises:
        ValueError: a width, scheme, range or pattern that is none.

    >>> settings = QuantizationSettings(bits={"*": 4, "fc": 8}, activation_bits=8, last_bits=16)
    >>> widths = settings.widths(["conv1", "conv2", "fc"])
    >>> [(widths[name].weight, widths[name].activation) for name in widths]
    [(4, 8), (4, 8), (16, 16)]
    """

    bits: int | Mapping[str, int] = 8
    scheme: Scheme = "asymmetric"
    per_channel: bool = True
    activation_bits: int | None = None
    ranges: Range = field(default_factory=MinMax)
    weight_ranges: Range = field(default_factory=MinMax)
    exclude: str | Sequence[str] = ()
    first_bits: int | None = None
    last_bits: int | None = None
    outputs: bool = False
    weight_scheme: Scheme | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be, before any work starts."""
        Grid(8, self.scheme)
        Grid(8, self.scheme_of_weights)
        if isinstance(self.bits, Mapping):
            if not self.bits:
                raise ValueError('bits maps names of layers to widths, got an empty map; say {"*": 8} for all')
            for pattern, bits in self.bits.items():
                check_bits(f"bits[{pattern!r}]", bits)
        else:
            check_bits("bits", self.bits)
        for what in ("activation_bits", "first_bits", "last_bits"):
            if getattr(self, what) is not None:
                check_bits(what, getattr(self, what))
        for what in ("ranges", "weight_ranges"):
            if not isinstance(getattr(self, what), Range):
                raise ValueError(f"{what} is an object such as MinMax() or Percentile(), got {getattr(self, what)!r}")
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        if not all(isinstance(pattern, str) for pattern in exclude):
            raise ValueError(f"exclude holds names or patterns of layers, got {self.exclude!r}")
        object.__setattr__(self, "exclude", exclude)

    @property
    def scheme_of_weights(self) -> Scheme:
        """Of weights; `scheme` where they have none of their own."""
        return self.scheme if self.weight_scheme is None else self.weight_scheme

    def check(self, layers: Iterable[str]) -> None:
        """Refuse patterns that match no layer.

        Raises:
            ValueError: naming the pattern and the closest names.
        """
        layers = list(layers)
        patterns = [("exclude", pattern) for pattern in self.exclude]
        if isinstance(self.bits, Mapping):
            patterns += [("bits", pattern) for pattern in self.bits]
        for what, pattern in patterns:
            if not any(_matches(name, pattern) for name in layers):
                raise ValueError(
                    f"{what} names {pattern!r}, which matches none of the {len(layers)} layers that can be quantised; "
                    f"closest: {closest(pattern, layers)}"
                )

    def excluded(self, layer: str) -> bool:
        """Whether a layer is to stay in floating point."""
        return any(_matches(layer, pattern) for pattern in self.exclude)

    def widths(self, layers: Sequence[str]) -> dict[str, LayerBits]:
        """Of layers in the order in which they run; those without a width are left out.

        An exact name beats every pattern, and of several patterns the last one wins.
        """
        widths = {}
        for place, name in enumerate(layers):
            end = self.last_bits if place == len(layers) - 1 else None
            end = self.first_bits if place == 0 and self.first_bits is not None else end
            weight = end if end is not None else self._bits(name)
            if weight is not None:
                widths[name] = LayerBits(weight, end or self.activation_bits or weight)
        return widths

    def _bits(self, layer: str) -> int | None:
        if not isinstance(self.bits, Mapping):
            return self.bits
        matching = [bits for pattern, bits in self.bits.items() if _matches(layer, pattern)]
        return self.bits.get(layer, matching[-1] if matching else None)


def _matches(layer: str, pattern: str) -> bool:
    return layer == pattern or fnmatch.fnmatchcase(layer, pattern)
