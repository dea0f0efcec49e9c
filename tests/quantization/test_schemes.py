"""Scale, zero point and integers, bit for bit, and the gradient."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_prune.quantization.schemes import WIDTHS, Grid, Scheme
from tests.quantization import reference

SCHEMES = get_args(Scheme)
LIMIT = 2.0**125
VALUES = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-LIMIT, LIMIT, width=32)) | arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-8, 8, width=16)
)


def same_bits(tensor: torch.Tensor, array: Any) -> bool:
    return tensor.numpy().tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=40)
@given(x=VALUES, share=st.floats(0.1, 1.0))
def test_scale_zero_point_and_integers_are_those_of_numpy(bits: int, scheme: Scheme, x: Any, share: float) -> None:
    grid = Grid(bits, scheme)
    low, high = np.float32(x.min() * share), np.float32(x.max() * share)
    scale, zero_point = grid.scale_and_zero_point(torch.tensor(low), torch.tensor(high))
    expected = reference.parameters(low, high, bits, scheme)
    assert same_bits(scale, expected[0])
    assert float(zero_point) == float(expected[1])
    tensor = torch.from_numpy(x.copy())
    q = grid.integers(tensor, scale, zero_point)
    with np.errstate(over="ignore"):
        assert same_bits(q, reference.integers(x, *expected, bits, scheme))
    back = reference.real(q.numpy(), *expected)
    assert same_bits(grid.real(q, scale, zero_point), back)
    assert same_bits(grid.fake_quantized(tensor, scale, zero_point), back)
    assert np.isfinite(back).all()
    assert q.min() >= grid.low
    assert q.max() <= grid.high
    assert same_bits(tensor, x), "the argument was written to"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=40)
@given(low=st.floats(-LIMIT, LIMIT, width=32), high=st.floats(-LIMIT, LIMIT, width=32))
def test_zero_is_exactly_zero_and_a_second_time_changes_nothing(
    bits: int, scheme: Scheme, low: float, high: float
) -> None:
    grid = Grid(bits, scheme)
    parameters = grid.scale_and_zero_point(torch.tensor(min(low, high)), torch.tensor(max(low, high)))
    zeros = grid.fake_quantized(torch.tensor([0.0, -0.0]), *parameters)
    assert torch.equal(zeros, torch.zeros(2))
    assert not torch.signbit(zeros).any()
    q = torch.arange(grid.low, grid.high + 1, dtype=torch.int32)
    assert torch.equal(grid.integers(grid.real(q, *parameters), *parameters), q)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_range_is_covered_to_half_a_step(bits: int) -> None:
    low, high = torch.tensor(-0.7), torch.tensor(2.9)
    grid = Grid(bits)
    scale, zero_point = grid.scale_and_zero_point(low, high)
    x = torch.linspace(-0.7, 2.9, 5001)
    error = (grid.fake_quantized(x, scale, zero_point) - x).abs()
    assert error.max() <= (1.0 + 1e-3) / scale  # half a step, and at the ends half more for the zero point
    inside = (x > -0.7 + 0.5 / scale) & (x < 2.9 - 0.5 / scale)
    assert error[inside].max() <= (0.5 + 1e-2) / scale
    assert (grid.low, grid.high) == (0, 2**bits - 1)


def test_golden_values() -> None:
    scale, zero_point = Grid(8, "symmetric").scale_and_zero_point(torch.tensor(-0.5), torch.tensor(2.0))
    assert (scale.item(), zero_point.item()) == (63.75, 0.0)
    x = torch.tensor([-9.0, -2.0, -0.5, 0.0, 1.0, 2.0])
    assert Grid(8, "symmetric").integers(x, scale, zero_point).tolist() == [-128, -128, -32, 0, 64, 127]
    half = torch.tensor([0.5, 1.5, 2.5])
    assert Grid(4).integers(half, torch.tensor(1.0), torch.tensor(0.0)).tolist() == [0, 2, 2]
    # Ties are broken after the zero point is taken off.
    assert Grid(4).integers(half, torch.tensor(1.0), torch.tensor(-1.0)).tolist() == [2, 2, 4]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_but_zeros_or_next_to_nothing(scheme: Scheme) -> None:
    for width in (0.0, 1e-40):
        scale, zero_point = Grid(8, scheme).scale_and_zero_point(torch.tensor(-width), torch.tensor(width))
        assert (scale.item(), zero_point.item()) == (1.0, 0.0)


@pytest.mark.parametrize("bound", [math.inf, math.nan, 1e38])
def test_endless_ranges_are_refused(bound: float) -> None:
    for scheme in SCHEMES:
        for low, high in ((0.0, bound), (-bound, 0.0)):
            with pytest.raises(ValueError, match=r"finite bounds below 8.5e\+37, got .* to "):
                Grid(8, scheme).scale_and_zero_point(torch.tensor([low] * 4), torch.tensor([high] * 4))


@pytest.mark.parametrize("bits", [1, 0, -8, 9, 15, 17, 32, 8.0, "8", True, None])
def test_widths_that_there_are_not(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"a width of 2 to 8, or 16, got bits="):
        Grid(bits)


def test_schemes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"'asymmetric', 'symmetric', got 'affine'"):
        Grid(8, "affine")  # type: ignore[arg-type]


def test_the_gradient_goes_straight_through_and_ends_at_the_clamp() -> None:
    x = torch.tensor([-0.3, -0.05, 0.0, 0.4, 1.02, 7.0], requires_grad=True)
    grid = Grid(8)
    scale, zero_point = grid.scale_and_zero_point(torch.tensor(0.0), torch.tensor(1.0))
    (grid.fake_quantized(x, scale, zero_point) * torch.arange(1.0, 7.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_computed_in_float32_and_keep_their_type(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 50, dtype=dtype)
    parameters = Grid(8).scale_and_zero_point(x.min(), x.max())
    y = Grid(8).fake_quantized(x, *parameters)
    assert y.dtype == dtype
    assert torch.equal(y, Grid(8).fake_quantized(x.float(), *parameters).to(dtype))
