"""A node's own plan: what an assignment may change, and that nothing which privacy rests on is among it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lichen.common.assignment import ASSIGNED, capped_steps, own_plan
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Cohort, Plan, parse_plan
from lichen.common.records import Assignment

EVERYTHING = {"assign": [name for name in ASSIGNED if name != "rank"]}


def of(plan: Plan, **given: Any) -> Assignment:
    return Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=1, **given)


@pytest.fixture
def plan(tiny_plan: dict[str, Any]) -> Plan:
    private = {"unit": "example", "epsilon": 6.0, "sample_rate": 0.125}
    return parse_plan({**tiny_plan, "privacy": private, "cohort": {**tiny_plan["cohort"], **EVERYTHING}})


def any_rank(plan: Plan) -> Plan:
    cohort = plan.cohort.model_copy(update={"assign": ASSIGNED})
    return plan.model_copy(update={"cohort": cohort, "aggregation": plan.aggregation.model_copy(update={"rule": "nested"})})


def test_the_names_are_those_of_the_plan_and_of_the_record() -> None:
    (kind, _) = get_args(Cohort.model_fields["assign"].annotation)
    assert get_args(kind) == ASSIGNED
    assert set(ASSIGNED) <= set(Assignment.model_fields)


def test_an_assignment_that_leaves_all_to_the_plan_changes_nothing(plan: Plan) -> None:
    assert own_plan(plan, of(plan)) is plan
    assert own_plan(plan, of(plan), most_rows=32) is plan
    assert capped_steps(5, of(plan)) == 5


def test_a_smaller_rank_is_not_the_plans(plan: Plan) -> None:
    plan = any_rank(plan)
    assert own_plan(plan, of(plan, rank=1)) == plan, "the model is cut to it"


def test_what_privacy_rests_on_is_the_plans_whatever_is_assigned(plan: Plan) -> None:
    plan = any_rank(plan)
    own = own_plan(plan, of(plan, rank=1, max_physical_batch_size=1, max_length=8, steps=1))
    assert own.privacy == plan.privacy
    assert (own.rounds, own.cohort, own.aggregation, own.seed) == (plan.rounds, plan.cohort, plan.aggregation, plan.seed)
    changed = {"max_physical_batch_size": plan.local.max_physical_batch_size}
    assert own.local.model_copy(update=changed) == plan.local, "steps stay what the noise is calibrated for"
    assert (own.local.max_physical_batch_size, own.task.max_length, own.evaluation.batch_size) == (1, 8, 1)
    assert [capped_steps(5, of(plan, steps=steps)) for steps in (1, 5, 9)] == [1, 5, 5]


def test_memory_that_ran_out_lowers_rows_at_once_whatever_may_vary(tiny_plan: dict[str, Any]) -> None:
    plan = parse_plan({**tiny_plan, "cohort": {"assign": ["max_physical_batch_size"]}})
    assert own_plan(plan, of(plan), most_rows=4).local.max_physical_batch_size == 4
    assert own_plan(plan, of(plan, max_physical_batch_size=2), most_rows=4).local.max_physical_batch_size == 2
    fixed = parse_plan({**tiny_plan, "cohort": {"assign": []}})
    assert own_plan(fixed, of(fixed), most_rows=4).local.max_physical_batch_size == 4


@pytest.mark.parametrize("given", [{"rank": 99}, {"max_physical_batch_size": 10**6}, {"max_length": 64}])
def test_more_than_the_plan_is_refused(plan: Plan, given: dict[str, int]) -> None:
    plan = any_rank(plan)
    with pytest.raises(LichenError, match="above the plan's") as caught:
        own_plan(plan, of(plan, **given))
    assert caught.value.code is Code.POLICY_REFUSED


def test_another_adapter_has_no_rank(tiny_plan: dict[str, Any]) -> None:
    plan = any_rank(parse_plan({**tiny_plan, "model": {**tiny_plan["model"], "adapter": {"kind": "head"}}}))
    with pytest.raises(LichenError, match="above the plan's 0"):
        own_plan(plan, of(plan, rank=1))


@pytest.mark.parametrize("given", [{"rank": 1}, {"steps": 1}, {"max_length": 8}, {"precision": "bfloat16"}])
def test_what_the_plan_does_not_let_vary_is_refused(tiny_plan: dict[str, Any], given: dict[str, Any]) -> None:
    plan = parse_plan(tiny_plan)
    assert own_plan(plan, of(plan, max_physical_batch_size=1)).local.max_physical_batch_size == 1, "it changes no result"
    with pytest.raises(LichenError, match=f"another {next(iter(given))}, which cohort.assign does not permit") as caught:
        own_plan(plan, of(plan, **given))
    assert caught.value.code is Code.POLICY_REFUSED


def test_the_base_may_have_fewer_bits_and_layers_be_computed_again(plan: Plan) -> None:
    own = own_plan(plan, of(plan, checkpointing=True, precision="int8"))
    assert (own.local.checkpointing, own.model.base_precision) == (True, "int8")
    assert own.model_copy(update={"local": plan.local, "model": plan.model}) == plan
