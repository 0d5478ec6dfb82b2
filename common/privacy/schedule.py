"""What a plan's noised work costs a client: functions of the plan and of what the owner declares, never of the data.

The client reserves by them, and the coordinator holds a report against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lichen.common.continual.stream import Stage, is_online, is_stream, stage_of, stages
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, noise_multiplier

if TYPE_CHECKING:
    from lichen.common.plan import Plan


MOST_NOISE = 4.0
"""Records that would need more than this many times the plan's noise have no budget left worth the name."""


def planned_steps(plan: Plan, declared_size: int, stage: Stage | None = None) -> Segment:
    """What one round of training costs a client.

    The noise is for all rounds in which a unit may be read (`rounds_of_a_unit`).

    Args:
        plan: a private one.
        declared_size: units that the owner declares; of a stream's task, its share of them (`stage_size`).
        stage: of a stream, whose round it is; None: the first, or the only one.

    Raises:
        LichenError: PRIVACY_TARGET; PLAN_UNSOUND, if δ is above one in the declared size: it would permit to publish a row.
    """
    if too_large(plan, declared_size):
        raise LichenError(
            Code.PLAN_UNSOUND,
            f"δ = {plan.privacy.delta:g} is above one in the declared size, {declared_size}",
            where="privacy.delta",
            fix=f"Set it below 1 / {declared_size}.",
        )
    rate = plan.privacy.sample_rate or min(1.0, plan.local.batch_size / declared_size)
    steps = plan.local.steps or max(1, round((plan.local.epochs or 1) / rate))
    noise = noise_multiplier(plan.privacy.epsilon, plan.privacy.delta, rate, steps * rounds_of_a_unit(plan, stage))
    return Segment(noise, rate, steps)


def too_large(plan: Plan, declared_size: int) -> bool:
    """Whether a private plan's δ is above one in so many units: it would permit to publish one."""
    return plan.privacy.delta * declared_size > 1


def one_task_each(plan: Plan) -> bool:
    """Whether a unit is read in one task of the stream at most: then tasks compose in parallel, and a unit's ε is that of its task.

    A node sees to it that no record is read in two. An entity, which goes on from task to task, is read in all.
    """
    return reads_apart(plan) and plan.continual.method != "replay"


def reads_apart(plan: Plan) -> bool:
    """Whether units of a stream are charged by the tasks that they are read in: those that are read in other tasks lie apart."""
    return is_stream(plan) and plan.privacy.unit == "example"


def rounds_of_a_unit(plan: Plan, stage: Stage | None = None) -> int:
    """In how many rounds a unit may be read: in all, or in those of one task of a stream; ``stage`` as in `planned_steps`."""
    return (stage or stage_of(plan, 1)).rounds if one_task_each(plan) else plan.rounds


def planned_evaluation(plan: Plan) -> Segment:
    """What one federated evaluation costs a client's hold-out: noise on counts, where a row changes one entry by one.

    Args:
        plan: a private one with `evaluation.federated_every` above 0.

    Raises:
        LichenError: PRIVACY_TARGET.
    """
    times = evaluations(plan)
    return Segment(noise_multiplier(plan.privacy.epsilon, plan.privacy.delta, 1.0, times), 1.0, 1)


def evaluations(plan: Plan, after: int = 0) -> int:
    """How often the plan has hold-outs scored at most after a round: every so many rounds, and online before each batch too (`looks`)."""
    every = plan.evaluation.federated_every
    before = sum(looks(plan, stage) for stage in stages(plan) if stage.first > after) if is_online(plan) else 0
    return plan.rounds // every - after // every + before


def looks(plan: Plan, stage: Stage) -> int:
    """How often hold-outs are scored at most before a batch begins: once, or where drift decides as often as the plan says.

    Before the first it is once in any case: nothing was learned yet that new data could differ from.
    """
    online = plan.continual.online
    return online.looks if stage.number and online.drift is not None else 1


@dataclass(frozen=True)
class CentralNoise:
    """The noise of one round under `unit: client`. Together its two releases cost what one Gaussian of multiplier `z` does."""

    z: float
    """σ over sensitivity of the round as a whole: what is accounted."""
    update: float
    """Of the sum of updates, over the clip."""
    count: float | None
    """Standard deviation of the noise on the adaptive clip's count, in clients; None where the clip is fixed."""
    segment: Segment
    """All rounds."""


def planned_central(plan: Plan) -> CentralNoise:
    """What client-level privacy costs: the whole run, for every client alike, whether it is ever drawn or not.

    With an adaptive clip a round also releases how many updates lay within it (Andrew et al. 2021, theorem 1): a client moves
    Σ(b − quantile) by at most s = max(quantile, 1 − quantile), so z⁻² = z_update⁻² + (σ_b / s)⁻². σ_b is a twentieth of the expected
    cohort, as there, but at least 2·s·z: in a small cohort the count would else take most of the budget.

    Args:
        plan: one with `unit: client`.

    Raises:
        LichenError: PRIVACY_TARGET.
    """
    rate = sample_rate(plan)
    z = noise_multiplier(plan.privacy.epsilon, plan.privacy.delta, rate, plan.rounds)
    segment = Segment(z, rate, plan.rounds)
    if (adaptive := plan.privacy.adaptive_clip) is None:
        return CentralNoise(z, z, None, segment)
    moved = max(adaptive.quantile, 1 - adaptive.quantile)
    count = max(plan.cohort.size / 20, 2 * moved * z)
    return CentralNoise(z, 1 / math.sqrt(z**-2 - (count / moved) ** -2), count, segment)


def sample_rate(plan: Plan) -> float:
    """Each client's chance to be in a round, under `unit: client`."""
    return plan.cohort.size / (plan.cohort.population or plan.cohort.size)
