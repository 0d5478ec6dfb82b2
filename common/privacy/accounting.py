"""How much privacy a sequence of noised steps costs, and how much noise a budget asks for.

Two accountants, both Google's dp-accounting for the Poisson-subsampled Gaussian mechanism with add/remove adjacency; what they return are
upper bounds. Steps whose parameters were fixed beforehand: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022),
pessimistic. Steps whose parameters may follow from what was released before: a Rényi filter (Feldman and Zrnic 2021), at one order that is
fixed before the first release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from lichen.common.errors import Code, LichenError

# Discretisation of the privacy loss, by the ε below which the next one is used: at 1e-3 the bound lies within .2 % of that at 1e-4 from
# ε = .5 on and takes a tenth of the time; a small ε asks for a finer one, and costs less.
INTERVALS = ((math.inf, 1e-3), (0.5, 1e-4), (0.05, 1e-5))
PRV_ERROR = 0.005
"""What the second accountant's ε may lie above its own estimate."""
# Below this noise multiplier a step has no privacy worth the name, and its distribution takes seconds to compute.
LEAST_NOISE = 0.1
# Candidates for a filter's order: whole ones, whose divergence is a finite sum (Mironov et al. 2019, section 3.3).
ORDERS = (*range(2, 33), 36, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)


class Segment(NamedTuple):
    """Steps of one mechanism: Poisson sampling, then Gaussian noise on a sum of ℓ2-clipped terms."""

    noise_multiplier: float
    """σ: the noise's standard deviation over the clipping norm."""
    sample_rate: float
    """q: each unit's chance to be in a step."""
    steps: int


def epsilon(history: Sequence[Segment], delta: float, enough: float = 0.0) -> float:
    """ε at ``delta`` of all segments together, applied to the same data.

    Args:
        history: of one data segment.
        delta: above 0.
        enough: a bound that need not be made tighter once it is at or below this: tightening a small one can take minutes.

    Returns:
        An upper bound; 0 for an empty history, infinity where a segment has no noise.
    """
    taken, found = _merged(history), math.inf
    if not taken:
        return 0.0
    if any(segment.noise_multiplier < LEAST_NOISE for segment in taken):
        return math.inf
    for below, interval in INTERVALS:
        if found > below or found <= enough:
            break
        found = min(found, _epsilon(taken, delta, interval))
    return found


def _merged(history: Sequence[Segment]) -> tuple[Segment, ...]:
    """The steps of each mechanism together, in one order: what a bound depends on."""
    merged: dict[tuple[float, float], int] = {}
    for segment in history:
        if segment.steps < 0:  # it would take back what other steps cost
            raise LichenError(Code.INTERNAL, f"{segment} in a privacy history")
        if segment.steps:
            key = (segment.noise_multiplier, segment.sample_rate)
            merged[key] = merged.get(key, 0) + segment.steps
    return tuple(Segment(*key, steps) for key, steps in sorted(merged.items()))


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Segment, ...], delta: float, interval: float) -> float:
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    return float(_composed(PLDAccountant(value_discretization_interval=interval), history).get_epsilon(delta))


def _composed(accountant: Any, history: Sequence[Segment]) -> Any:
    from dp_accounting import dp_event

    for noise, rate, steps in history:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return accountant


def filter_epsilon(history: Sequence[Segment], delta: float, order: float) -> float:
    """ε at ``delta`` of all segments together by their Rényi divergences of one order, which add up.

    As long as it stays below a bound, that bound holds, even if each segment was chosen by what the ones before released (Feldman and
    Zrnic 2021, section 4): the order must not depend on that, so take it from `filter_order`.

    Returns:
        As `epsilon`; for the same history never less.
    """
    return _filter_epsilon(_merged(history), delta, order)


@lru_cache(maxsize=4096)
def _filter_epsilon(history: tuple[Segment, ...], delta: float, order: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    if not history:
        return 0.0
    if any(segment.noise_multiplier < LEAST_NOISE for segment in history):
        return math.inf
    return float(_composed(RdpAccountant([order]), history).get_epsilon(delta))


@lru_cache(maxsize=256)
def filter_order(noise: float, sample_rate: float, target: float, delta: float) -> float:
    """The order at which most steps of one kind stay below ε = ``target``: a function of what was fixed before the first of them.

    Args:
        noise: the first steps' noise multiplier.
        sample_rate: their sample rate.
        target: the bound for life.
        delta: its δ.
    """
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    def best(steps: int) -> tuple[float, float]:
        accountant = _composed(RdpAccountant(ORDERS), [Segment(max(noise, LEAST_NOISE), sample_rate, steps)])
        found, order = accountant.get_epsilon_and_optimal_order(delta)
        return float(found), float(order)

    low, high = 1, 2
    while best(high)[0] <= target and high < 2**40:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if best(middle)[0] <= target else (low, middle)
    return best(low)[1]


@lru_cache(maxsize=64)
def _epsilon_prv(history: tuple[Segment, ...], delta: float) -> float:
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [tuple(segment) for segment in history]
    with np.errstate(divide="ignore"):  # it takes logarithms of both sides of a `where`
        return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000))


def epsilon_prv(history: Sequence[Segment], delta: float) -> float:
    """ε by a second accountant (Gopi et al. 2021, in Opacus), to hold the first against; `epsilon` is what is promised.

    Returns:
        An upper bound to `PRV_ERROR`; 0 for an empty history, infinity where a segment has no noise.
    """
    taken = tuple(segment for segment in history if segment.steps > 0)
    if not taken:
        return 0.0
    if any(segment.noise_multiplier < LEAST_NOISE for segment in taken):
        return math.inf
    return _epsilon_prv(taken, delta)


@lru_cache(maxsize=256)
def noise_multiplier(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least σ, to .1 %, that keeps ``steps`` steps at or below ε = ``target``.

    Raises:
        LichenError: PRIVACY_TARGET, if no noise does.
    """

    def over(noise: float) -> float:
        return math.log(max(epsilon([Segment(noise, sample_rate, steps)], delta, target), 1e-300) / target)

    found = _least_noise_near(over)
    if found is None:
        raise LichenError(
            Code.PRIVACY_TARGET,
            f"no noise keeps {steps} steps at sample rate {sample_rate:g} under ε = {target:g}, δ = {delta:g}",
            where="privacy.epsilon",
            fix="Raise privacy.epsilon, or lower rounds, local.steps or privacy.sample_rate.",
        )
    return found


def _least_noise_near(over: Callable[[float], float]) -> float | None:
    """What `least_noise` finds, in half as many tries: it is asked near where a line through the last two would have it.

    Args:
        over: how far σ is from fitting, at most 0 where it fits: falling, and about a line in log σ.
    """
    unfit, fit = LEAST_NOISE, math.inf

    def fits(noise: float) -> bool:
        nonlocal unfit, fit
        if unfit < noise < fit:
            if over(noise) <= 0:
                fit = noise
            else:
                unfit = noise
        return noise >= fit

    last, noise = 1.0, 2.0
    fits(last)
    for _ in range(6):  # more are needed nowhere; if they were, the rest is halving
        if (fits(noise) and fit / unfit <= 1.001) or over(noise) == over(last):
            break
        step = over(noise) * math.log(noise / last) / (over(last) - over(noise))
        guess = noise * math.exp(min(max(step, -9), 9))
        if not unfit < guess < fit:
            break
        last, noise = noise, guess * 1.0003 if guess * 1.0006 < fit else fit / 1.0009
    return least_noise(fits, LEAST_NOISE, 1e5)


def least_noise(fits: Callable[[float], bool], low: float, most: float) -> float | None:
    """The least σ, to .1 %, that fits, between ``low``, which does not, and ``most``; None if there is none."""
    high = min(max(1.0, 2 * low), most)
    while not fits(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def affordable_steps(history: Sequence[Segment], planned: Segment, target: float, delta: float) -> int:
    """How many of ``planned``'s steps fit after ``history`` before ε would pass ``target``: from 0 to all of them."""

    def fits(steps: int) -> bool:
        return epsilon([*history, planned._replace(steps=steps)], delta, target) <= target

    if fits(planned.steps):
        return planned.steps
    low, high = 0, planned.steps
    if not fits(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
