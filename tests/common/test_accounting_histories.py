"""ε of random histories of mixed (σ, q), against Google's dp-accounting at its finest practical discretisation."""

from __future__ import annotations

import random

import pytest

from lichen.common.privacy.accounting import Segment, epsilon, filter_epsilon, filter_order


def finest(history: list[Segment], delta: float, rough: float) -> float:
    """The same bound by a discretisation ten times as fine; straight from the library."""
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-4 if rough > 0.5 else 1e-5)
    for noise, rate, steps in history:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


def draw_history(draw: random.Random) -> list[Segment]:
    history = []
    for _ in range(draw.randint(1, 4)):
        rate = draw.choice([1.0, *(10 ** draw.uniform(-3, -0.5) for _ in range(3))])
        steps = 10 ** draw.uniform(0, 1.5 if rate == 1 else 3)
        history.append(Segment(draw.uniform(3, 30) if rate == 1 else draw.uniform(0.6, 4), rate, int(steps)))
    return history


def compare(count: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(count):
        history, delta = draw_history(draw), 10 ** -draw.uniform(4, 7)
        found = epsilon(history, delta)
        exact = finest(history, delta, found)
        assert exact * 0.999 <= found <= exact * 1.02, (history, delta, found, exact)
        order = filter_order(*history[0][:2], 10 ** draw.uniform(-0.5, 1.2), delta)
        assert filter_epsilon(history, delta, order) >= exact, (history, delta, order)


def test_ten_random_histories() -> None:
    compare(10)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_random_histories() -> None:
    compare(200)


def test_a_filters_order_is_nearly_the_best_for_what_it_was_chosen_for() -> None:
    """As many steps as fit by the best order of all fit by it, to a few in a hundred."""
    for noise, rate, target, delta in ((1.0, 0.01, 8.0, 1e-5), (0.7, 0.05, 3.0, 1e-6), (3.0, 0.2, 1.0, 1e-5), (20.0, 1.0, 2.0, 1e-5)):
        chosen = filter_order(noise, rate, target, delta)

        def fit(order: float, noise: float = noise, rate: float = rate, target: float = target, delta: float = delta) -> int:
            low, high = 0, 2**24
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if filter_epsilon([Segment(noise, rate, middle)], delta, order) <= target else (low, middle)
            return low

        assert fit(chosen) >= 0.95 * max(fit(order) for order in range(2, 33))
