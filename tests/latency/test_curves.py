"""Curves are linear between their knots, many at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.latency.curves import LIVING_KNOTS, SPARSITY_KNOTS, Curves

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def falling(layers: int, count: int, living: int, seed: int = 0) -> Tensor:
    """Times that fall with sparsity, by up to a thousand, and rise with living inputs."""
    generator = torch.Generator().manual_seed(seed)
    power = 0.5 + 2.5 * torch.rand(layers, count, 1, 1, generator=generator, dtype=torch.float64)
    kept = (1.0 - torch.tensor(SPARSITY_KNOTS, dtype=torch.float64)).view(1, 1, -1, 1) ** power
    shares = torch.tensor(LIVING_KNOTS if living > 1 else (1.0,), dtype=torch.float64)
    return 1e-3 * (0.001 + kept * (0.2 + shares))


def reference(values: Tensor, sparsity: float, living: float) -> float:
    """Of one curve."""
    table = values.numpy()
    if table.shape[1] > 1:
        across = [float(np.interp(living, LIVING_KNOTS, row)) for row in table]
    else:
        across = table[:, 0].tolist()
    return float(np.interp(sparsity, SPARSITY_KNOTS, across))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("living", [1, len(LIVING_KNOTS)])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_equal_interpolation(dtype: torch.dtype, living: int, seed: int) -> None:
    values = falling(2, 3, living, seed)
    generator = torch.Generator().manual_seed(seed)
    s, c = (torch.rand(2, 40, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = Curves(values)(s, c if living > 1 else None)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 40)
    for layer, curve, n in itertools.product(range(2), range(3), range(40)):
        expected = reference(values[layer, curve], float(s[layer, n]), float(c[layer, n]))
        assert float(found[layer, curve, n]) == pytest.approx(expected, rel=TOLERANCE[dtype], abs=0)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_meet_their_knots(dtype: torch.dtype) -> None:
    values = falling(1, 2, len(LIVING_KNOTS))
    knots = torch.cartesian_prod(*(torch.tensor(knots, dtype=dtype) for knots in (SPARSITY_KNOTS, LIVING_KNOTS))).t()
    found = Curves(values)(knots[:1], knots[1:])
    torch.testing.assert_close(found.double(), values.flatten(2), rtol=10 * TOLERANCE[dtype], atol=0)


def test_any_values() -> None:
    values = torch.rand(3, 2, len(SPARSITY_KNOTS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linspace(0, 1, 1001, dtype=torch.float64).expand(3, -1)
    found = Curves(values)(s)
    for layer, curve in itertools.product(range(3), range(2)):
        expected = np.interp(s[0].numpy(), SPARSITY_KNOTS, values[layer, curve, :, 0].numpy())
        np.testing.assert_allclose(found[layer, curve].numpy(), expected, rtol=1e-11)


def test_all_inputs_live_unless_told() -> None:
    curves, s = Curves(falling(1, 2, len(LIVING_KNOTS))), torch.linspace(0, 1, 9, dtype=torch.float64)[None]
    assert torch.equal(curves(s), curves(s, torch.ones_like(s)))


def test_no_candidates_and_no_layers() -> None:
    assert Curves(falling(2, 3, 1))(torch.zeros(2, 0)).shape == (2, 3, 0)
    assert Curves(torch.zeros(0, 1, len(SPARSITY_KNOTS), 1))(torch.zeros(0, 4)).shape == (0, 1, 4)


def test_knots_run_from_nothing_to_all() -> None:
    for knots in (SPARSITY_KNOTS, LIVING_KNOTS):
        assert knots[0] == 0.0
        assert knots[-1] == 1.0
        assert list(knots) == sorted(set(knots))
