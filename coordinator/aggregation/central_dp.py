"""Client-level differential privacy by the coordinator: secret Poisson cohorts, whole updates clipped, one noised sum a round.

DP-FedAvg with a fixed denominator (McMahan et al. 2018, arXiv:1710.06963) and adaptive clipping (Andrew et al. 2021,
arXiv:1905.03871). What the bound rests on is all here and in `common/privacy`: nothing that a client says can widen it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lichen.common.privacy.accounting import epsilon, epsilon_prv
from lichen.common.privacy.clipping import clipped
from lichen.common.privacy.randomness import RandomSource, SecretSource, SeededSource, add_noise, poisson_sample
from lichen.common.privacy.schedule import planned_central
from lichen.common.result import CentralPrivacy
from lichen.coordinator.run_directory import Release

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan

ROUNDING = 1e-5
"""How far a norm that a client clipped in 32-bit floats may lie above the bound."""


class ClippedSum:
    """A running sum of updates, each clipped to the bound, in 64-bit floats; it starts at zero, so nobody's sum is one too.

    Args:
        like: tensors whose names and shapes the updates have.
        clip: C.
        quantile: what the adaptive clip aims at; the count is taken less this share, so that who is absent pulls nowhere.
    """

    def __init__(self, like: Mapping[str, torch.Tensor], clip: float, quantile: float = 0.5) -> None:
        self.clip = clip
        self.total: State = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self.count = 0.0
        self._quantile = quantile

    def add(self, update: Mapping[str, torch.Tensor], *, within: bool = True) -> None:
        """Add one client's update: it moves the sum by at most `clip`, and the count by at most max(quantile, 1 − quantile).

        Args:
            update: trained minus received tensors, of any size.
            within: whether the client's own clip left it as it was.
        """
        scaled, norm = clipped(update, self.clip)
        for name, total in self.total.items():
            total.add_(scaled[name])
        self.count += float(within and norm <= self.clip * (1 + ROUNDING)) - self._quantile


class CentralDP:
    """The mechanism of one run.

    Args:
        plan: one with `unit: client`.
        secret: False in a simulation, whose draws follow from the plan's seed: then nothing is private.

    Raises:
        LichenError: PRIVACY_TARGET.
    """

    def __init__(self, plan: Plan, *, secret: bool) -> None:
        self.plan = plan
        self.noise = planned_central(plan)
        self._secret = secret

    def draw(self, nodes: Sequence[int], round: int) -> list[int]:
        """A round's cohort: each node is in it with the sample rate, whatever the others are; it may be empty.

        Args:
            nodes: those that are connected. Drawing from all that are enrolled and leaving out who is absent gives the same: who is
                absent adds nothing, and the denominator does not ask.
            round: from 1.
        """
        return [nodes[index] for index in poisson_sample(len(nodes), self.noise.segment.sample_rate, self._source("cohort", round))]

    def sum_of(self, model: State, clip: float) -> ClippedSum:
        """An empty sum of updates of ``model``."""
        adaptive = self.plan.privacy.adaptive_clip
        return ClippedSum(model, clip, adaptive.quantile if adaptive else 0.5)

    def release(self, total: ClippedSum, round: int) -> Release:
        """The round's noised mean, and the next clip: all that may ever leave of the sum.

        The denominator is qN = `cohort.size`, never the number of updates. Called once a round: two releases of one sum would have to
        be charged twice.
        """
        source, expected = self._source("noise", round), self.plan.cohort.size
        std = self.noise.update * total.clip
        update = {
            name: add_noise(tensor.clone(), std, source, over=expected).to(torch.float32) for name, tensor in sorted(total.total.items())
        }
        clip = total.clip
        if (adaptive := self.plan.privacy.adaptive_clip) and self.noise.count:
            above = float(add_noise(torch.tensor([total.count], dtype=torch.float64), self.noise.count, source, over=expected))
            clip *= math.exp(-adaptive.learning_rate * above)
        return Release(update, clip)

    def spent(self, rounds: int) -> float:
        """ε of so many releases, for every client of the federation, drawn or not."""
        return epsilon([self.noise.segment._replace(steps=rounds)], self.plan.privacy.delta)

    def account(self, rounds: int, *, last: bool) -> CentralPrivacy:
        """The same with what it follows from and, after the last round, by a second accountant."""
        segment = self.noise.segment._replace(steps=rounds)
        return CentralPrivacy(
            epsilon=self.spent(rounds),
            epsilon_prv=epsilon_prv([segment], self.plan.privacy.delta) if last else None,
            releases=rounds,
            noise_multiplier=segment.noise_multiplier,
            sample_rate=segment.sample_rate,
            update_noise_multiplier=self.noise.update,
            count_noise=self.noise.count,
        )

    def _source(self, what: str, round: int) -> RandomSource:
        return SecretSource() if self._secret else SeededSource("central", what, self.plan.seed, round)
