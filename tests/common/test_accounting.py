"""The accountant: against the published values, against dp-accounting at a finer interval, and at the edges of a budget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.errors import Code, LichenError
from lichen.common.privacy import accounting
from lichen.common.privacy.accounting import LEAST_NOISE, Segment, affordable_steps, epsilon, least_noise, noise_multiplier

DELTA = 1e-5
# (history, ε of Google's PLD, ε of GDP, which is no upper bound, or None where GDP can't say)
KNOWN = [
    ([Segment(1.0, 0.01, 1000)], 1.8282, 1.6177),
    ([Segment(1.0, 0.1, 100)], 7.047, 6.007),
    ([Segment(0.7, 0.05, 300)], 12.745, 11.513),
    ([Segment(1.0, 0.01, 1000), Segment(0.8, 0.05, 100)], 6.028, None),
]


def finer(history: list[Segment], delta: float, interval: float = 1e-4) -> float:
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    for noise, rate, steps in history:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("history", "known", "gdp"), KNOWN)
def test_known_values_and_never_below_a_finer_interval(history: list[Segment], known: float, gdp: float | None) -> None:
    found = epsilon(history, DELTA)
    assert found == pytest.approx(known, rel=1e-3)
    assert found >= known * (1 - 1e-4)
    if gdp is not None:  # hole 3: an approximation from below must not be what is reported
        assert found > 1.1 * gdp
    fine = finer(history, DELTA)
    assert fine <= found <= 1.001 * fine


@pytest.mark.parametrize("segment", [Segment(4.5, 1.0, 50), Segment(2.0, 0.02, 500), Segment(20.0, 0.5, 3), Segment(1.2, 0.1, 200)])
def test_close_to_a_finer_interval_and_not_below(segment: Segment) -> None:
    fine = finer([segment], DELTA)
    assert fine <= epsilon([segment], DELTA) <= 1.001 * fine


def test_an_analytic_oracle() -> None:
    # one unsampled Gaussian, Balle and Wang 2018, equation 6
    from scipy.optimize import brentq
    from scipy.stats import norm

    sigma = 2.0

    def delta_of(eps: float) -> float:
        return float(norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma))

    exact = brentq(lambda eps: delta_of(eps) - DELTA, 0.01, 20)
    assert exact <= epsilon([Segment(sigma, 1.0, 1)], DELTA) <= 1.001 * exact
    # k steps without sampling are one step with σ / √k
    assert epsilon([Segment(sigma * 5, 1.0, 25)], DELTA) == pytest.approx(exact, rel=2e-3)


def test_edges_of_a_history() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([Segment(1.0, 0.1, 0)], DELTA) == 0
    assert epsilon([Segment(0.0, 0.1, 1)], DELTA) == math.inf
    assert epsilon([Segment(LEAST_NOISE / 2, 1e-6, 1), Segment(5.0, 0.1, 1)], DELTA) == math.inf


def test_segments_of_one_mechanism_are_one() -> None:
    whole = epsilon([Segment(1.0, 0.05, 60)], DELTA)
    assert epsilon([Segment(1.0, 0.05, 20)] * 3, DELTA) == whole
    mixed = [Segment(1.0, 0.05, 20), Segment(2.0, 0.1, 5), Segment(1.0, 0.05, 40)]
    assert epsilon(mixed, DELTA) == epsilon(mixed[::-1], DELTA)


@settings(max_examples=6, deadline=None)
@given(
    noise=st.sampled_from([0.6, 0.9, 1.5, 3.0]),
    rate=st.sampled_from([0.05, 0.3, 1.0]),
    steps=st.integers(1, 20),
    delta=st.sampled_from([1e-6, 1e-4]),
)
def test_monotone(noise: float, rate: float, steps: int, delta: float) -> None:
    base = epsilon([Segment(noise, rate, steps)], delta)
    slack = 1 + 1e-6
    assert epsilon([Segment(noise, rate, steps + 1)], delta) * slack >= base
    assert epsilon([Segment(noise * 1.2, rate, steps)], delta) <= base * slack
    assert epsilon([Segment(noise, rate * 0.8, steps)], delta) <= base * slack
    assert epsilon([Segment(noise, rate, steps)], delta * 2) <= base * slack
    assert epsilon([Segment(noise, rate, steps), Segment(5.0, 0.1, 1)], delta) * slack >= base


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(8.0, 0.05, 100), (2.0, 0.1, 50), (1.0, 1.0, 50), (0.3, 0.02, 500), (8.0, 1.0, 1)],
)
def test_the_noise_multiplier_fits_and_is_tight(target: float, rate: float, steps: int) -> None:
    noise = noise_multiplier(target, DELTA, rate, steps)
    assert epsilon([Segment(noise, rate, steps)], DELTA) <= target
    assert epsilon([Segment(noise / 1.0011, rate, steps)], DELTA) > target


@pytest.mark.parametrize(("target", "rate", "steps"), [(8.0, 0.25, 16), (1.0, 0.05, 160), (0.3, 0.01, 1000), (30.0, 1.0, 2)])
def test_the_noise_multiplier_is_found_in_few_tries(target: float, rate: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def counted(history: list[Segment], delta: float, enough: float = 0.0) -> float:
        tried.append(history[0].noise_multiplier)
        return epsilon(history, delta, enough)

    monkeypatch.setattr(accounting, "epsilon", counted)
    found = noise_multiplier.__wrapped__(target, DELTA, rate, steps)
    assert found == least_noise(lambda noise: epsilon([Segment(noise, rate, steps)], DELTA) <= target, LEAST_NOISE, 1e5)
    assert len(set(tried)) <= 9  # halving alone takes 13


def test_a_bound_that_is_small_enough_is_not_made_tighter() -> None:
    segment, before = Segment(1.0, 1 / 900, 1), accounting._epsilon.cache_info().misses
    loose = epsilon([segment], 1e-3, enough=0.5)
    assert accounting._epsilon.cache_info().misses == before + 1
    assert epsilon([segment], 1e-3) <= loose <= 0.5


def test_more_privacy_asks_for_more_noise() -> None:
    found = [noise_multiplier(target, DELTA, 0.1, 20) for target in (8.0, 1.0)]
    assert found == sorted(found)


def test_a_target_that_no_noise_reaches() -> None:
    with pytest.raises(LichenError) as caught:
        noise_multiplier(1e-9, 1e-12, 1.0, 1)
    assert caught.value.code is Code.PRIVACY_TARGET


def test_affordable_steps_are_exact_at_the_edge() -> None:
    planned = Segment(0.9, 0.1, 100)
    for history in ([], [Segment(0.9, 0.1, 7)], [Segment(1.3, 0.2, 5)]):
        granted = affordable_steps(history, planned, 4.0, DELTA)
        assert 0 < granted < 100
        assert epsilon([*history, planned._replace(steps=granted)], DELTA) <= 4.0
        assert epsilon([*history, planned._replace(steps=granted + 1)], DELTA) > 4.0


def test_affordable_steps_at_the_ends() -> None:
    noise = noise_multiplier(3.0, DELTA, 0.1, 60)
    planned = Segment(noise, 0.1, 20)
    # what σ was found for fits to the last step, and not one more
    assert affordable_steps([planned, planned], planned, 3.0, DELTA) == 20
    assert affordable_steps([planned] * 3, planned, 3.0, DELTA) == 0
    assert affordable_steps([Segment(0.5, 1.0, 5)], planned, 3.0, DELTA) == 0
    assert affordable_steps([], planned, 100.0, DELTA) == 20
    assert affordable_steps([], planned._replace(noise_multiplier=0.0), 100.0, DELTA) == 0
