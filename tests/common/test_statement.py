"""The privacy statement: nothing is called ε that is no bound, and what is not protected is told as plainly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lichen.common.channel.rules import RULES
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.statement import Statement, as_markdown, bound_text, in_words, make_statement
from lichen.common.records import EvaluateReport, TrainReport
from lichen.common.result import ClientPrivacy, Privacy, Result, Round, Transfer

EPSILON, DELTA = 6.0, 1e-5


def plan_of(unit: str = "example", **changes: Any) -> Plan:
    privacy: dict[str, Any] = {"unit": unit, "epsilon": EPSILON, "delta": DELTA}
    if unit == "entity":
        privacy["unit_field"] = "patient"
    document = {
        "rounds": 4,
        "task": {"labels": ["a", "b"]},
        "model": {"base": "x"},
        "local": {"steps": 4, "batch_size": 8},
        "privacy": privacy if unit != "none" else {},
    }
    return parse_plan(document | changes)


def result_of(plan: Plan, **changes: Any) -> Result:
    def client(train: float, holdout: float | None = None) -> ClientPrivacy:
        segments = {"train": train} | ({} if holdout is None else {"holdout": holdout})
        return ClientPrivacy(
            epsilon=max(segments.values()),
            epsilon_sum=sum(segments.values()),
            steps=16,
            noise_multiplier=0.9,
            sample_rate=0.1,
            segments=segments,
        )

    private = plan.privacy.unit != "none"
    values: dict[str, Any] = {
        "run_id": "1",
        "status": "finished",
        "plan_sha256": plan.sha256(),
        "engine": "deployed",
        "seed": 0,
        "versions": {},
        "seconds": 1.0,
        "privacy": Privacy(
            unit=plan.privacy.unit,
            delta=DELTA if private else None,
            noise="secret" if private else None,
            max_epsilon=5.5 if private else None,
            clients={"ward-1": client(5.5, 3.25), "ward-2": client(4.0)} if private else {},
        ),
        "transfer": Transfer(uplink_bytes=0, downlink_bytes=0),
    }
    return Result(**(values | changes))


def text_of(statement: Statement) -> str:
    return "\n".join([*(line for heading, lines in in_words(statement) for line in (heading, *lines))])


def failing(name: str, number: int | None) -> list[Round]:
    return [Round(round=1, participants=1, failed=1, errors={name: number}, uplink_bytes=0, downlink_bytes=0, seconds=1)]


def test_a_finished_private_run_tells_each_clients_bounds() -> None:
    plan = plan_of(evaluation={"federated_every": 1})
    statement = make_statement(plan, result_of(plan))
    assert statement.private
    assert (statement.unit, statement.adjacency) == ("one row", "add/remove of one row")
    first = statement.clients["ward-1"]
    assert (first.epsilon, first.delta) == (5.5, DELTA)
    assert (first.epsilon_sum, first.delta_sum) == (8.75, 2 * DELTA), "two segments' δ add up as their ε do"
    assert (statement.clients["ward-2"].epsilon_sum, statement.clients["ward-2"].delta_sum) == (4.0, DELTA)
    assert statement.worst == first
    assert not statement.with_secret_noise
    assert "ε ≤ 5.500" in statement.summary
    assert "coordinator" in statement.summary
    assert {claim.verified_by for claim in statement.claims} == {"the agent", "the coordinator (promised)", "both ends"}


@pytest.mark.parametrize("number", [None, 103])
def test_what_the_coordinator_cannot_account_for_is_told_with_the_plans_epsilon(number: int | None) -> None:
    """An update that came too late left its node, and a failure after noised steps tells of them."""
    plan = plan_of()
    statement = make_statement(plan, result_of(plan, rounds=failing("ward-1", number)))
    assert statement.clients["ward-1"].epsilon == EPSILON
    assert statement.clients["ward-2"].epsilon == 4.0
    absent = make_statement(plan, result_of(plan, rounds=failing("ward-3", number)))
    assert absent.clients["ward-3"].epsilon == EPSILON
    assert absent.clients["ward-1"].epsilon == 5.5


def test_who_was_called_off_may_have_worked_unseen() -> None:
    plan = plan_of()
    round = Round(
        round=1, participants=1, failed=0, unneeded=2, called_off=["ward-2", "ward-3"], uplink_bytes=0, downlink_bytes=0, seconds=1
    )
    found = make_statement(plan, result_of(plan, rounds=[round])).clients
    assert {name: bound.epsilon for name, bound in found.items()} == {"ward-1": 5.5, "ward-2": EPSILON, "ward-3": EPSILON}


def test_an_earlier_runs_model_is_not_called_public() -> None:
    plan = plan_of(model={"base": "x", "head": {"init": "base"}})
    told = text_of(make_statement(plan, result_of(plan)))
    assert "may be an earlier run's" in told
    assert "the base model and the plan are public" not in told
    assert "the base model and the plan are public" in text_of(make_statement(plan_of(), result_of(plan_of())))


@pytest.mark.parametrize("change", [{"status": "failed"}, {"status": "running"}, {"status": "stopped"}, {"engine": "flower"}])
def test_a_round_under_way_is_told_with_the_plans_epsilon(change: dict[str, str]) -> None:
    plan = plan_of()
    statement = make_statement(plan, result_of(plan, **change))
    assert {bound.epsilon for bound in statement.clients.values()} == {EPSILON}
    assert statement.bound("ward-2") == statement.bound("ward-9")
    nobody = result_of(plan, **change)
    nobody.privacy.clients.clear()
    assert make_statement(plan, nobody).summary.startswith("Differential privacy: ε ≤ 6.000"), "none has reported, yet some may have worked"


def test_a_simulation_has_no_epsilon_that_holds() -> None:
    plan = plan_of()
    result = result_of(plan, engine="inprocess")
    result.privacy.noise = "seeded: not private"
    statement = make_statement(plan, result)
    assert not statement.private
    assert not statement.clients
    assert statement.with_secret_noise["ward-1"].epsilon == 5.5
    assert statement.summary.startswith("Not private")
    assert "seed" in statement.not_protected[0]
    assert "TLS" not in text_of(statement)
    assert "Not private" in as_markdown(statement)


def test_a_run_without_privacy_says_so_as_plainly() -> None:
    plan = plan_of("none")
    statement = make_statement(plan, result_of(plan))
    assert not statement.private
    assert statement.summary.startswith("No differential privacy")
    assert "ε" not in text_of(statement)
    assert "ε" not in as_markdown(statement)
    assert statement.unit is None
    leaves = {field.field: field.rule for field in statement.leaves}
    assert leaves["TrainReport.train_loss"] == "plain"
    assert leaves["update (every trained tensor)"] == "plain"


def test_an_entity_is_named_by_its_field() -> None:
    plan = plan_of("entity")
    assert make_statement(plan, result_of(plan)).unit == "all rows with one value of patient"


def test_every_field_that_may_leave_is_told_and_no_other() -> None:
    for every, unit in ((0, "example"), (1, "example"), (1, "none")):
        plan = plan_of(unit, evaluation={"federated_every": every})
        told = {field.field for field in make_statement(plan, result_of(plan)).leaves}
        expected = {f"TrainReport.{name}" for name in TrainReport.model_fields} | set(RULES) | {"update (every trained tensor)"}
        expected -= {"TrainReport.within_clip"}  # only under noise: central
        expected -= {"News.run_id", "News.rows"}  # only of an online run
        expected |= {f"EvaluateReport.{name}" for name in EvaluateReport.model_fields} if every else set()
        if unit != "none":
            expected -= {"TrainReport.examples", "TrainReport.train_loss", "EvaluateReport.loss_sum", "Error.reason"}
        assert told == expected


def test_it_is_json_and_a_function_of_plan_and_result() -> None:
    plan = plan_of()
    result = result_of(plan)
    first = make_statement(plan, result)
    assert Statement.model_validate(json.loads(first.model_dump_json())) == first
    result.privacy.statement = Statement(private=True, summary="whatever was there before")
    assert make_statement(plan, result) == first


def test_bounds_are_rounded_up_and_many_clients_cut() -> None:
    plan = plan_of()
    result = result_of(plan)
    spent = result.privacy.clients["ward-2"]
    result.privacy.clients = {f"c{index}": spent.model_copy(update={"epsilon": 3.00001 + index / 1000}) for index in range(50)}
    statement = make_statement(plan, result)
    lines = dict(in_words(statement, most=5))["ε and δ of each client"]
    assert sum(line.startswith("c") for line in lines) == 5
    assert any("45 more" in line for line in lines)
    assert any("ε ≤ 3.050" in line for line in lines), "3.04901 is told as 3.050"
    assert "c4" not in as_markdown(statement), "a card names no client"


def test_the_statement_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lichen.common.privacy.statement; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"


def test_a_bound_never_reads_lower_than_it_is() -> None:
    assert [bound_text(value) for value in (7.99413, 9.997e-5, 7.0, math.inf, 0.0)] == ["7.995", "0.001", "7.000", "∞", "0.000"]
    assert bound_text(7.994, 2) == "8.00"


@pytest.mark.parametrize(("unit", "rule"), [("none", "plain"), ("example", "noised"), ("entity", "noised"), ("client", "summed")])
def test_what_carries_the_update_has_the_updates_rule(unit: str, rule: str) -> None:
    central = {"privacy": {"unit": "client", "noise": "central"}, "cohort": {"size": 4, "population": 8}} if unit == "client" else {}
    statement = make_statement(plan := plan_of(unit, **central), result_of(plan))
    told = {leaving.field: leaving.rule for leaving in statement.leaves}
    carriers = {"update (every trained tensor)", "Chunk.digest", "Chunk.data", "Missing.digest"}
    assert {told[field] for field in carriers} == {rule}


@pytest.mark.parametrize("method", ["sequential", "lwf", "adapters", "ewc"])
def test_sums_that_a_method_gathers_are_told_as_what_leaves(method: str) -> None:
    stream = [{"name": "one", "labels": ["a", "b"]}, {"name": "two", "labels": ["b"]}]
    statement = make_statement(plan := plan_of(continual={"method": method, "stream": stream}), result_of(plan))
    told = [leaving for leaving in statement.leaves if "sum" in leaving.field]
    assert [leaving.rule for leaving in told] == (["noised"] if method in {"adapters", "ewc"} else [])
