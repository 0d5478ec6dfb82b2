"""How updates weigh: FedAvg to the bit where nothing differs, FedNova's and FedBuff's formulas where steps and staleness do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.codec.plain import Tensors
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.coordinator.aggregation.normalised import Contribution, effective_steps, factor

unhurried = settings(deadline=None)
examples = st.integers(1, 10**7).map(float)
contributions = st.lists(st.builds(Contribution, examples, st.integers(1, 500).map(float), st.integers(0, 20)), min_size=1, max_size=8)


def step_of(counts: list[Contribution], updates: list[torch.Tensor]) -> torch.Tensor:
    """As the strategy makes it."""
    most, total = max(one.steps for one in counts), FedAvg()
    for one, update in zip(counts, updates, strict=True):
        total.add(Tensors({"w": update}), one.weight(most))
    return total.mean() * factor(counts, most)


def updates_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(5, generator=generator) for _ in range(count)]


@unhurried
@given(contributions)
def test_it_is_the_formula_of_fednova_and_fedbuff(counts: list[Contribution]) -> None:
    updates = updates_of(len(counts))
    shares = [one.examples / sum(other.examples for other in counts) for one in counts]
    effective = sum(share * one.steps for share, one in zip(shares, counts, strict=True))
    each = [
        share * update.double() / one.steps / math.sqrt(1 + one.staleness)
        for share, one, update in zip(shares, counts, updates, strict=True)
    ]
    expected = effective * torch.stack(each).sum(0)
    size = effective * max(float(one.abs().max()) for one in each)
    torch.testing.assert_close(step_of(counts, updates).double(), expected, rtol=1e-5, atol=1e-6 * size * len(counts))


@unhurried
@given(st.lists(examples, min_size=1, max_size=40), st.integers(1, 500))
def test_equal_steps_and_fresh_models_are_fedavg_to_the_bit(weights: list[float], steps: int) -> None:
    counts, updates = [Contribution(weight, effective_steps(steps, 0.9)) for weight in weights], updates_of(len(weights))
    plain = FedAvg()
    for weight, update in zip(weights, updates, strict=True):
        plain.add(Tensors({"w": update}), weight)
    assert factor(counts, counts[0].steps) == 1
    assert torch.equal(step_of(counts, updates), plain.mean())


def test_clients_that_walk_the_same_way_are_not_outweighed_by_who_walks_longer() -> None:
    """Each moves by its own optimum's direction times its steps: the mean step is that of equal clients, as long as the mean walk."""
    directions = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    counts = [Contribution(1.0, 8.0), Contribution(1.0, 2.0)]
    step = step_of(counts, [steps * direction for steps, direction in zip((8, 2), directions, strict=True)])
    torch.testing.assert_close(step, torch.tensor([2.5, 2.5]))


@pytest.mark.parametrize(("staleness", "share"), [(0, 1.0), (3, 0.5), (8, 1 / 3)])
def test_one_stale_update_alone_is_made_smaller(staleness: int, share: float) -> None:
    update = torch.tensor([3.0, -6.0])
    torch.testing.assert_close(step_of([Contribution(7.0, 4.0, staleness)], [update]), update * share)


@unhurried
@given(st.integers(1, 200), st.floats(0.01, 0.99))
def test_effective_steps_of_momentum_are_how_far_a_constant_gradient_moves(steps: int, momentum: float) -> None:
    moved = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1
        moved += velocity
    assert effective_steps(steps, momentum) == pytest.approx(moved, rel=1e-9)
    assert effective_steps(steps) == steps
