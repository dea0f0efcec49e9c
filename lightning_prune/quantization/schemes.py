"""How real numbers become integers of a few bits and return: scale, zero point, rounding, and the gradient past it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scheme: TypeAlias = Literal["asymmetric", "symmetric"]

WIDTHS = (*range(2, 9), 16)


@dataclass(frozen=True)
class Grid:
    """The integers of a width and a scheme, and the arithmetic that leads there.

    With `n` bits and a range from `min <= 0` to `max >= 0`, all in float32, each operation rounded once:

        asymmetric    scale = (2^n - 1) / (max - min);            zp = round(scale * min);   0 <= q <= 2^n - 1
        symmetric     scale = ((2^n - 1) / 2) / max(-min, max);   zp = 0;                    -2^(n-1) <= q < 2^(n-1)

        q = clamp(round(scale * x - zp), low, high),              x^ = (q + zp) / scale

    `round` takes ties to the even integer. Zero is `q = -zp` and returns as zero exactly, so masks survive. Where a
    range is so narrow that its scale would be infinite (that of nothing but zeros is), the scale is 1.

    Args:
        bits: 2 to 8, or 16.
        scheme: "asymmetric" or "symmetric".

    Raises:
        ValueError: another width or scheme.

    Source: Distiller's linear range-based quantisation.

    >>> grid = Grid(8, "asymmetric")
    >>> scale, zero_point = grid.scale_and_zero_point(torch.tensor(-1.0), torch.tensor(1.55))
    >>> scale.item(), zero_point.item()
    (100.0, -100.0)
    >>> grid.integers(torch.tensor([-9.0, 0.0, 0.5, 9.0]), scale, zero_point).tolist()
    [0, 100, 150, 255]
    """

    bits: int = 8
    scheme: Scheme = "asymmetric"

    def __post_init__(self) -> None:
        """Refuse widths and schemes that there are not."""
        check_bits("bits", self.bits)
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme is one of {', '.join(map(repr, get_args(Scheme)))}, got {self.scheme!r}")

    @property
    def low(self) -> int:
        """The least integer."""
        return 0 if self.scheme == "asymmetric" else -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The greatest integer."""
        return self.low + (1 << self.bits) - 1

    def scale_and_zero_point(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Of ranges, which are widened to contain 0.

        Args:
            minimum: float32, any shape; `maximum` has the same.
            maximum: at least `minimum`.

        Returns:
            Scale (integers per unit of `x`) and zero point (a whole number), both float32 of that shape.

        Raises:
            ValueError: a bound is NaN or infinite, or greater than a quarter of the greatest float32.
        """
        minimum, maximum = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
        limit = torch.finfo(torch.float32).max / 4  # beyond it, what is nearest to a value could be infinity
        if not bool(((minimum >= -limit) & (maximum <= limit)).all()):
            raise ValueError(f"a range needs finite bounds below {limit:.1e}, got {_some(minimum)} to {_some(maximum)}")
        if self.scheme == "asymmetric":
            steps, width = 2.0**self.bits - 1, maximum - minimum
        else:
            steps, width = (2.0**self.bits - 1) / 2, torch.maximum(-minimum, maximum)
        # A number divided by a tensor is its reciprocal times the number in torch: two roundings.
        scale = torch.full_like(width, steps) / width
        scale = torch.where(torch.isfinite(scale), scale, 1.0)
        if self.scheme == "symmetric":
            return scale, torch.zeros_like(scale)
        return scale, torch.round(scale * minimum) + 0.0  # no -0.0, which would return zeros as -0.0

    def integers(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`q`, int32, of the shape of `x`, with which scale and zero point broadcast."""
        return _rounded(x, scale, zero_point).clamp(self.low, self.high).int()

    def real(self, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`x^`, float32, of the shape of the integers."""
        return (integers.float() + zero_point) / scale

    def fake_quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`x^` for `x`, in the type of `x`.

        The gradient passes rounding as if it were not there, and is 0 where `x` was clamped.

        Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013).
        """
        quantized: Tensor = _StraightThrough.apply(x, scale, zero_point, self.low, self.high)
        return quantized


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        rounded = _rounded(x, scale, zero_point)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((rounded >= low) & (rounded <= high))
        # In place, as each new tensor would cost as much as the arithmetic.
        return rounded.clamp_(low, high).add_(zero_point).div_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (scale * x.float()).sub_(zero_point).round_()


def check_bits(what: str, bits: object) -> None:
    """Refuse a width that there is not.

    Raises:
        ValueError: naming the argument and its value.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WIDTHS:
        raise ValueError(f"{what} is a width of 2 to 8, or 16, got {what}={bits!r}")


def _some(bounds: Tensor) -> str:
    return ", ".join(f"{bound:.3g}" for bound in bounds.flatten()[:3].tolist()) + (
        ", ..." if bounds.numel() > 3 else ""
    )
