"""Aggregation rules: one file a family, and one line a rule in this registry; what each needs of a plan is in common/aggregation.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.coordinator.aggregation.mean import Mean
from lichen.coordinator.aggregation.merged import FedEx, Flora

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
    """The plan's rule, for one round (from 1) that began with this model."""
    return RULES[plan.aggregation.rule](plan, round, model)
