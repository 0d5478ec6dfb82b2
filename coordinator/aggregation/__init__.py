"""Aggregation rules: one file a family, and one line a rule in this registry; what each needs of a plan is in common/aggregation.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.common.continual import make_method
from lichen.coordinator.aggregation.mean import Mean
from lichen.coordinator.aggregation.merged import FedEx, Flora
from lichen.coordinator.aggregation.total import Total

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan
    from lichen.coordinator.aggregation.rule import Rule

RULES: Mapping[str, type[Rule]] = {
    "fedavg": Mean,
    "ffa": Mean,
    "rolora": Mean,
    "nested": Mean,
    "zero-padding": Mean,
    "flora": Flora,
    "fedex": FedEx,
}


def make_rule(plan: Plan, round: int, model: State) -> Rule:
    """What adds the updates of one round (from 1) that began with this model: the plan's rule, but where sums are gathered."""
    if make_method(plan).gathers(round):
        return Total(plan, round, model)
    return RULES[plan.aggregation.rule](plan, round, model)
