"""One norm over a whole update, at most the bound whatever arrives; and noised sums that lie on a grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.privacy.clipping import clipped
from lichen.common.privacy.randomness import GRID, SecretSource, add_noise


def norm_of(update: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-44, 38), bound=st.floats(1e-6, 1e6))
def test_the_norm_is_at_most_the_bound_and_the_direction_stays(seed: int, exponent: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = {name: 10.0**exponent * torch.randn(shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    update = {name: tensor.nan_to_num(0, 3e38, -3e38) for name, tensor in update.items()}
    scaled, norm = clipped(update, bound)
    assert norm == pytest.approx(norm_of(update), rel=1e-12)
    assert norm_of(scaled) <= bound * (1 + 1e-12)
    if norm <= bound:
        assert all(torch.equal(scaled[name], update[name].double()) for name in update)
    else:
        assert norm_of(scaled) == pytest.approx(bound)
        assert all(torch.allclose(scaled[name], update[name].double() * (bound / norm), rtol=1e-9, atol=0) for name in update)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_zero(bad: float) -> None:
    scaled, norm = clipped({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, 1.0)
    assert norm == math.inf
    assert not any(tensor.any() for tensor in scaled.values())


def test_zero_stays_zero() -> None:
    scaled, norm = clipped({"a": torch.zeros(3)}, 1.0)
    assert norm == 0
    assert torch.equal(scaled["a"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("std", [1e-3, 0.7, 300.0])
def test_noised_sums_have_their_noise_and_no_low_bits(std: float) -> None:
    total = torch.linspace(-2, 3, 20_000, dtype=torch.float64) * math.pi
    found = add_noise(total.clone(), std, SecretSource())
    step = GRID * 2.0 ** math.floor(math.log2(std))
    assert torch.equal(found / step, torch.round(found / step))
    noise = found - total
    assert abs(float(noise.std()) / std - 1) < 4.5 / math.sqrt(2 * len(total))
    assert abs(float(noise.mean())) < 4.5 * std / math.sqrt(len(total))
