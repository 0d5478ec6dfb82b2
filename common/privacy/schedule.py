"""What a plan's noised work costs a client: functions of the plan and of what the owner declares, never of the data.

The client reserves by them, and the coordinator holds a report against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, noise_multiplier

if TYPE_CHECKING:
    from lichen.common.plan import Plan


MOST_NOISE = 4.0
"""Records that would need more than this many times the plan's noise have no budget left worth the name."""


def planned_steps(plan: Plan, declared_size: int) -> Segment:
    """What one round of training costs a client.

    Args:
        plan: a private one.
        declared_size: units that the owner declares.

    Raises:
        LichenError: PRIVACY_TARGET; PLAN_UNSOUND, if δ is above one in the declared size: it would permit to publish a row.
    """
    if plan.privacy.delta * declared_size > 1:
        raise LichenError(
            Code.PLAN_UNSOUND,
            f"δ = {plan.privacy.delta:g} is above one in the declared size, {declared_size}",
            where="privacy.delta",
            fix=f"Set it below 1 / {declared_size}.",
        )
    rate = plan.privacy.sample_rate or min(1.0, plan.local.batch_size / declared_size)
    steps = plan.local.steps or max(1, round((plan.local.epochs or 1) / rate))
    noise = noise_multiplier(plan.privacy.epsilon, plan.privacy.delta, rate, steps * plan.rounds)
    return Segment(noise, rate, steps)


def planned_evaluation(plan: Plan) -> Segment:
    """What one federated evaluation costs a client's hold-out: noise on counts, where a row changes one entry by one.

    Args:
        plan: a private one with `evaluation.federated_every` above 0.

    Raises:
        LichenError: PRIVACY_TARGET.
    """
    times = plan.rounds // plan.evaluation.federated_every
    return Segment(noise_multiplier(plan.privacy.epsilon, plan.privacy.delta, 1.0, times), 1.0, 1)
