"""Between which numbers a layer that runs in 8-bit integers rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """How the numbers of a layer become integers.

        x ~ input_step * (q - input_zero),  0 <= q <= 255;      w_o ~ weight_steps_o * q,  -128 <= q <= 127

    Args:
        input_step: between two inputs.
        input_zero: the integer of an input of 0.
        weight_steps: between two weights, for each output or one for all.

    Raises:
        ValueError: a step is not positive and finite, or no integer stands for 0.
    """

    input_step: float
    input_zero: int
    weight_steps: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what are no steps."""
        if not self.weight_steps or not all(0.0 < s < math.inf for s in (self.input_step, *self.weight_steps)):
            raise ValueError(f"steps are positive and finite, got {self.input_step!r} and {self.weight_steps!r}")
        if not 0 <= self.input_zero <= 255:
            raise ValueError(f"the integer of an input of 0 is one of 0 to 255, got {self.input_zero!r}")
