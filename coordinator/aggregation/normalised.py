"""How much each update counts: by examples (FedAvg), by the steps behind it (FedNova), by how old its model is (FedBuff).

Client i sends Δ_i, made on n_i examples in steps of effective number a_i, from a model that is s_i server steps old. With p_i = n_i / Σ n:

    step = (Σ_j p_j a_j) · Σ_i p_i · Δ_i / a_i · 1/√(1 + s_i)

The first factor and the division by a_i are FedNova (Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization", sections 3 and 4): the mean of the clients' mean steps, times τ_eff = Σ p_j a_j, so that who does more steps does
not pull the model towards its own optimum. The root is FedBuff's staleness scaling (Nguyen et al. 2022): a stale update is made smaller,
and the sum is not divided by the roots. With equal a and s = 0 this is FedAvg's Σ p_i Δ_i, to the bit as computed here.

A running weighted mean gives Σ w_i Δ_i / Σ w_i; with w_i = n_i · (a_max / a_i) / √(1 + s_i) the step is `factor` times that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def effective_steps(steps: int, momentum: float = 0.0) -> float:
    """‖a‖₁ of local training: how far a constant gradient moves, in steps of plain SGD.

    Args:
        steps: τ, at least 1.
        momentum: ρ of SGD with momentum, for which ‖a‖₁ = (τ − ρ(1 − ρ^τ)/(1 − ρ)) / (1 − ρ) (Wang et al. 2020); 0 for plain SGD and for
            AdamW, whose steps are about as long however many came before: then it is τ.
    """
    if momentum == 0.0:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class Contribution:
    """What one update weighs by."""

    examples: float
    """n_i, above 0; under privacy what stands for it."""
    steps: float = 1.0
    """a_i, above 0; the same for all where steps are not to count."""
    staleness: int = 0
    """Steps of the server since the model that the update was made from."""

    def weight(self, most: float) -> float:
        """In the running mean.

        Args:
            most: the largest `steps` of all.
        """
        return self.examples * (most / self.steps) / math.sqrt(1 + self.staleness)


def factor(contributions: Sequence[Contribution], most: float) -> float:
    """What the weighted mean is to be multiplied by; exactly 1 where steps are equal and nothing is stale.

    Args:
        contributions: of the updates in the mean, at least one.
        most: as their weights had it.
    """
    examples = sum(one.examples for one in contributions)
    steps = sum(one.examples * (one.steps / most) for one in contributions) / examples
    return steps * (sum(one.weight(most) for one in contributions) / examples)
