"""How much privacy a sequence of noised steps costs, and how much noise a budget asks for.

One accountant calibrates, gates and reports: privacy loss distributions of the Poisson-subsampled Gaussian mechanism (Koskela et al.
2020; Doroshenko et al. 2022), by Google's dp-accounting, pessimistic, with add/remove adjacency. What it returns is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lichen.common.errors import Code, LichenError

# Discretisation of the privacy loss. At 1e-3 the bound lies within .05 % of that at 1e-4 and takes a tenth of the time.
INTERVAL = 1e-3
PRV_ERROR = 0.005
"""What the second accountant's ε may lie above its own estimate."""
# Below this noise multiplier a step has no privacy worth the name, and its distribution takes seconds to compute.
LEAST_NOISE = 0.1


class Segment(NamedTuple):
    """Steps of one mechanism: Poisson sampling, then Gaussian noise on a sum of ℓ2-clipped terms."""

    noise_multiplier: float
    """σ: the noise's standard deviation over the clipping norm."""
    sample_rate: float
    """q: each unit's chance to be in a step."""
    steps: int


def epsilon(history: Sequence[Segment], delta: float) -> float:
    """ε at ``delta`` of all segments together, applied to the same data.

    Returns:
        An upper bound; 0 for an empty history, infinity where a segment has no noise.
    """
    merged: dict[tuple[float, float], int] = {}
    for segment in history:
        if segment.steps > 0:
            key = (segment.noise_multiplier, segment.sample_rate)
            merged[key] = merged.get(key, 0) + segment.steps
    return _epsilon(tuple(Segment(*key, steps) for key, steps in sorted(merged.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Segment, ...], delta: float) -> float:
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    if not history:
        return 0.0
    if any(segment.noise_multiplier < LEAST_NOISE for segment in history):
        return math.inf
    accountant = PLDAccountant(value_discretization_interval=INTERVAL)
    for noise, rate, steps in history:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


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

    def fits(noise: float) -> bool:
        return epsilon([Segment(noise, sample_rate, steps)], delta) <= target

    low, high = LEAST_NOISE, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e5:
            raise LichenError(
                Code.PRIVACY_TARGET,
                f"no noise keeps {steps} steps at sample rate {sample_rate:g} under ε = {target:g}, δ = {delta:g}",
                where="privacy.epsilon",
                fix="Raise privacy.epsilon, or lower rounds, local.steps or privacy.sample_rate.",
            )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def affordable_steps(history: Sequence[Segment], planned: Segment, target: float, delta: float) -> int:
    """How many of ``planned``'s steps fit after ``history`` before ε would pass ``target``: from 0 to all of them."""

    def fits(steps: int) -> bool:
        return epsilon([*history, planned._replace(steps=steps)], delta) <= target

    if fits(planned.steps):
        return planned.steps
    low, high = 0, planned.steps
    if not fits(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
