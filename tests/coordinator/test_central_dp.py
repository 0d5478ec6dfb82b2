"""Client-level privacy by the coordinator: what one client can move, the noise's size, the adaptive clip, and the secret draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.coordinator.aggregation.central_dp import CentralDP, ClippedSum

SHAPES = {"layer.lora_A.weight": (2, 3), "layer.lora_B.weight": (3, 2), "classifier.bias": (3,)}


def plan_of(size: int = 50, population: int = 100, rounds: int = 10, **privacy: Any) -> Plan:
    return parse_plan(
        {
            "rounds": rounds,
            "task": {"labels": ["a", "b"]},
            "model": {"base": "some/model"},
            "cohort": {"size": size, "population": population},
            "local": {"steps": 1},
            "privacy": {"unit": "client", "noise": "central", "epsilon": 8, "delta": 1e-5} | privacy,
        }
    )


def update_of(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def distance(left: State, right: State) -> float:
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def sum_of(updates: list[State], clip: float, quantile: float = 0.5) -> ClippedSum:
    total = ClippedSum(update_of(0), clip, quantile)
    for update in updates:
        total.add(update)
    return total


@settings(deadline=None)
@given(
    others=st.lists(st.integers(0, 99), max_size=8),
    own=st.integers(100, 199),
    exponent=st.integers(-40, 38),
    spoiled=st.sampled_from([None, math.nan, math.inf]),
    clip=st.floats(1e-3, 1e3),
    quantile=st.floats(0.01, 0.99),
)
def test_no_client_moves_the_sum_further_than_the_clip(
    others: list[int], own: int, exponent: int, spoiled: float | None, clip: float, quantile: float
) -> None:
    """The sensitivity, by construction: with and without one client, whatever it sends."""
    update = {name: tensor.nan_to_num(0, 3e38, -3e38) for name, tensor in update_of(own, 10.0**exponent).items()}
    if spoiled is not None:
        update["classifier.bias"][0] = spoiled
    rest = [update_of(seed, 10.0 ** (seed % 7 - 3)) for seed in others]
    without, with_it = sum_of(rest, clip, quantile), sum_of([*rest, update], clip, quantile)
    rounding = 1e-12 * clip * (1 + len(rest))
    assert distance(with_it.total, without.total) <= clip + rounding
    assert abs(with_it.count - without.count) <= max(quantile, 1 - quantile) + 1e-9
    another = sum_of([*rest, update_of(own + 1, 1e6)], clip, quantile)
    assert distance(with_it.total, another.total) <= 2 * clip + rounding  # replaced: left out, and another put in


def test_the_norm_is_of_the_whole_update_and_not_of_each_tensor() -> None:
    total = sum_of([update_of(1, 1e3)], clip=2.0)
    assert distance(total.total, ClippedSum(update_of(0), 2.0).total) == pytest.approx(2.0)


def test_what_the_client_says_of_its_clip_counts_only_against_it() -> None:
    small, large = update_of(1, 1e-3), update_of(1, 1e3)
    counts = []
    for update, within in ((small, True), (small, False), (large, True), (large, False)):
        total = ClippedSum(small, 1.0)
        total.add(update, within=within)
        counts.append(total.count)
    assert counts == [0.5, -0.5, -0.5, -0.5]


def test_the_noise_has_its_size_and_the_denominator_is_fixed() -> None:
    like = {"w": torch.zeros(40_000)}
    for size, clip, present in ((50, 0.3, 0), (50, 0.3, 7), (10, 5.0, 3)):
        mechanism = CentralDP(plan_of(size=size, clip=clip), secret=True)
        total = mechanism.sum_of(like, clip)
        for _ in range(present):
            total.add({"w": torch.full((40_000,), clip / 200)})  # of norm C
        released = mechanism.release(total, 1)
        std = mechanism.noise.update * clip / size
        values = released.update["w"].double() - present * clip / 200 / size
        assert abs(float(values.std()) / std - 1) < 4.5 / math.sqrt(2 * 40_000)
        assert stats.kstest((values / values.std()).numpy(), "norm").pvalue > 1e-4
        assert abs(float(values.mean())) < 4.5 * std / 200
        assert released.clip == clip


def test_an_empty_cohort_releases_noise_alone_and_a_seed_repeats_it() -> None:
    like = update_of(0)
    secret, seeded = (CentralDP(plan_of(), secret=value) for value in (True, False))
    one, two = (secret.release(secret.sum_of(like, 1.0), 1).update for _ in range(2))
    assert all(float(tensor.abs().min()) > 0 for tensor in one.values())
    assert all(not torch.equal(one[name], two[name]) for name in one)
    first, again, next_round = (seeded.release(seeded.sum_of(like, 1.0), round).update for round in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], next_round[name]) for name in first)


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 10.0), (0.5, 0.05), (0.8, 0.5)])
def test_the_clip_finds_the_quantile_of_the_norms(quantile: float, start: float) -> None:
    """Norms are lognormal; half the clients are in each round, and who is absent pulls nowhere."""
    mechanism = CentralDP(plan_of(size=500, population=1000, rounds=60, adaptive_clip={"quantile": quantile}), secret=False)
    generator = np.random.default_rng(1)
    clip, late = start, []
    for round in range(1, 61):
        total = mechanism.sum_of({"w": torch.zeros(1)}, clip)
        for norm in generator.lognormal(0.0, 0.5, 500):
            total.add({"w": torch.tensor([norm])})
        clip = mechanism.release(total, round).clip
        late.append(clip)
    share = stats.lognorm(0.5).cdf(np.mean(late[-20:]))
    assert abs(share - quantile) < 0.06, (share, clip)


def test_an_empty_cohort_leaves_an_adaptive_clip_where_it_is_but_for_noise() -> None:
    mechanism = CentralDP(plan_of(adaptive_clip={"quantile": 0.9, "learning_rate": 0.2}), secret=True)
    pulls = [math.log(mechanism.release(mechanism.sum_of({"w": torch.zeros(1)}, 1.0), 1).clip) / 0.2 * 50 for _ in range(400)]
    assert mechanism.noise.count is not None
    assert abs(np.mean(pulls)) < 4.5 * mechanism.noise.count / 20
    assert abs(np.std(pulls) / mechanism.noise.count - 1) < 4.5 / math.sqrt(800)


def test_each_node_is_drawn_with_the_sample_rate_independently() -> None:
    mechanism = CentralDP(plan_of(size=30, population=100), secret=True)
    nodes = list(range(1000, 1100))
    drawn = np.zeros((600, 100))
    for round in range(600):
        cohort = mechanism.draw(nodes, round + 1)
        assert cohort == sorted(set(cohort))
        drawn[round, [node - 1000 for node in cohort]] = 1
    assert stats.chisquare([drawn.sum(), drawn.size - drawn.sum()], [0.3 * drawn.size, 0.7 * drawn.size]).pvalue > 1e-4
    sizes = drawn.sum(axis=1)  # binomial: no fixed size, and no coupling between nodes
    assert abs(sizes.var() / (100 * 0.3 * 0.7) - 1) < 4.5 * math.sqrt(2 / 600)
    assert mechanism.draw([], 1) == []


def test_what_was_spent_is_one_number_by_two_accountants() -> None:
    mechanism = CentralDP(plan_of(), secret=True)
    assert [mechanism.account(rounds, last=False).epsilon_prv for rounds in (0, 5)] == [None, None]
    whole = mechanism.account(10, last=True)
    assert 7.95 < whole.epsilon <= 8
    assert whole.epsilon_prv == pytest.approx(whole.epsilon, rel=5e-3)
    assert mechanism.spent(0) == 0 < mechanism.spent(5) < mechanism.spent(10) == whole.epsilon
