"""A stream of tasks in the plan: rounds, rows, labels, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.common.continual import make_method
from lichen.common.continual.measures import drift, measures
from lichen.common.continual.stream import (
    fields_of,
    labels_until,
    rounds_of_tasks,
    rows_by_task,
    rows_of,
    stage_of,
    stage_size,
    stages,
    tasks_of,
)
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.schedule import evaluations, looks, planned_steps, rounds_of_a_unit

LABELS = ["a", "b", "c", "d"]
DOCUMENT: dict[str, Any] = {"task": {"labels": LABELS}, "model": {"base": "some/model"}, "local": {"steps": 5}}


def plan_of(*tasks: dict[str, Any], rounds: int = 6, method: str = "sequential", **sections: Any) -> Plan:
    stream = [{"name": f"task-{number}"} | task for number, task in enumerate(tasks)]
    model = DOCUMENT["model"] | sections.pop("model", {})
    return parse_plan(DOCUMENT | {"rounds": rounds, "continual": {"method": method, "stream": stream}, "model": model} | sections)


def refusal(*tasks: dict[str, Any], code: Code = Code.PLAN_UNSOUND, **changes: Any) -> str:
    with pytest.raises(LichenError) as caught:
        plan_of(*tasks, **changes)
    assert caught.value.code is code, str(caught.value)
    assert caught.value.fix
    return caught.value.what


ONE, TWO = {"labels": ["a", "b"]}, {"labels": ["c"]}


def test_without_a_stream_a_run_is_one_stage() -> None:
    plan = parse_plan(DOCUMENT | {"rounds": 6})
    assert stages(plan) == (stage_of(plan, 3),)
    assert (stage_of(plan, 6).first, stage_of(plan, 6).last, stage_of(plan, 6).task) == (1, 6, None)
    assert labels_until(plan, 0) == tuple(LABELS)
    assert stage_size(plan, stage_of(plan, 1), 64) == 64


@given(given_=st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=6), more=st.integers(0, 7))
def test_the_tasks_share_the_rounds_and_each_round_is_of_one(given_: list[int | None], more: int) -> None:
    open_ = given_.count(None)
    rounds = sum(length or 0 for length in given_) + open_ + (more if open_ else 0)
    plan = plan_of(*({"labels": ["a", "b"]} | ({} if length is None else {"rounds": length}) for length in given_), rounds=rounds)
    lengths = rounds_of_tasks(plan)
    assert sum(lengths) == rounds
    assert all(length in {None, found} for length, found in zip(given_, lengths, strict=True))
    shared = [found for length, found in zip(given_, lengths, strict=True) if length is None]
    assert not shared or max(shared) - min(shared) <= 1
    assert [stage_of(plan, round).number for round in range(1, rounds + 1)] == [
        number for number, length in enumerate(lengths) for _ in range(length)
    ]
    assert [stage.rounds for stage in stages(plan)] == lengths


def test_a_row_is_of_a_task_if_it_meets_all_that_is_said() -> None:
    plan = plan_of(
        {"labels": ["a", "b"], "where": {"site": ["x", 7]}},
        {"between": {"year": [1800, 1850.5]}},
        {"between": {"day": ["2024-01-01", "2024-07-01"]}, "where": {"site": ["x"]}},
    )
    columns = {
        "label": ["a", "c", "b", "a", "a", "b"],
        "site": ["x", "x", 7, "y", "x", "x"],
        "year": [1800, "1850", "1850.5", "none", None, "nan"],
        "day": ["2024-01-01", "2024-06-30", "2024-06-30", "2023-12-31", "2024-07-01", ""],
    }
    assert [rows_of(plan, task, columns) for task in plan.continual.stream] == [[0, 2, 4, 5], [0, 1], [0, 1]]
    assert fields_of(plan) == ("site", "year", "day")


def test_the_model_chooses_among_the_labels_of_the_tasks_so_far_in_the_plans_order() -> None:
    plan = plan_of({"labels": ["d", "c"]}, {"labels": ["a", "d"]}, {"labels": ["b"]})
    assert [labels_until(plan, number) for number in range(3)] == [("c", "d"), ("a", "c", "d"), ("a", "b", "c", "d")]
    by_domain = plan_of({"where": {"site": ["x"]}}, {"labels": ["a"]})
    assert [labels_until(by_domain, number) for number in range(2)] == [tuple(LABELS)] * 2


def test_a_task_has_its_public_share_of_the_declared_size() -> None:
    plan = plan_of(ONE, {**TWO, "share": 0.25}, rounds=4)
    assert [stage_size(plan, stage, 1000) for stage in stages(plan)] == [500, 250]
    assert stage_size(plan, stages(plan)[1], 1) == 1


def test_noise_is_for_the_rounds_in_which_a_unit_is_read() -> None:
    privacy = {"unit": "example", "sample_rate": 0.1}
    plan = plan_of({**ONE, "rounds": 2}, {**TWO, "rounds": 4}, privacy=privacy)
    short, long = (planned_steps(plan, 100, stage).noise_multiplier for stage in stages(plan))
    assert short < long
    assert long == planned_steps(parse_plan(DOCUMENT | {"rounds": 4, "privacy": privacy}), 100).noise_multiplier
    entity = plan_of({**ONE, "rounds": 2}, {**TWO, "rounds": 4}, privacy=privacy | {"unit": "entity", "unit_field": "who"})
    assert [rounds_of_a_unit(entity, stage) for stage in stages(entity)] == [6, 6]


def test_a_row_of_two_tasks_is_of_the_first_where_each_counts_once() -> None:
    plan = plan_of({"between": {"year": [2000, 2003]}}, {"between": {"year": [2002, 2005]}})
    columns = {"year": [1999, 2004, 2002, 2000], "label": ["a"] * 4}
    assert rows_by_task(plan, 1, columns) == ([1, 2, 3], [[1, 2], [0]])
    assert rows_by_task(plan, 0, columns) == ([2, 3], [[0, 1]])


@pytest.mark.parametrize(
    ("tasks", "changes", "reason"),
    [
        ([{"labels": ["z"]}], {}, "task-0: ['z'] are not among task.labels"),
        ([TWO, ONE], {}, "nothing to choose among"),
        ([{**ONE, "rounds": 2}, {**TWO, "rounds": 3}], {}, "have 5 rounds together, and rounds is 6"),
        ([{**ONE, "rounds": 6}, TWO], {}, "have 6 rounds together, and 1 leave theirs out, and rounds is 6"),
        ([ONE, TWO], {"aggregation": {"average_last": 4}}, "above the rounds of the shortest task that train (3)"),
        ([ONE, TWO], {"cohort": {"mode": "buffered"}}, "when another task is learned"),
        ([ONE, TWO], {"privacy": {"unit": "example", "audit": {"canaries": 4}}}, "they are of no task"),
    ],
)
def test_a_stream_that_would_not_do_is_refused(tasks: list[dict[str, Any]], changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(*tasks, **changes)


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("lwf", {"continual": {"method": "lwf"}}, "there is nothing old"),
        ("lwf", {"aggregation": {"rule": "flora"}}, "no second one is kept"),
        ("adapters", {"aggregation": {"rule": "nested"}}, "clients of several ranks"),
        ("adapters", {"model": {"adapter": {"kind": "full"}}}, "kind full has none"),
        ("adapters", {"rounds": 2}, "two rounds a task"),
        ("adapters", {"evaluation": {"federated_every": 1}}, "at the coordinator alone"),
        ("adapters", {"model": {"head": {"pooling": "pooler"}}}, "mean pooling"),
        ("adapters", {"rounds": 4, "aggregation": {"average_last": 2}}, "of the shortest task that train (1)"),
        ("replay", {"privacy": {"unit": "example"}}, "needs privacy.sample_rate"),
        ("adapters", {"privacy": {"unit": "client", "noise": "central"}, "cohort": {"population": 4}}, "a clip of their own"),
        ("adapters", {"transfer": {"uplink": {"codec": "topk", "error_feedback": True}}}, "none of the next one's"),
        ("olora", {"transfer": {"uplink": {"codec": "topk", "error_feedback": True}}}, "none of the next one's"),
        ("ewc", {"cohort": {"oversample": 1.5}}, "in no sum"),
        ("ewc", {"rounds": 2}, "two rounds a task"),
        ("ewc", {"aggregation": {"rule": "rolora"}}, "one factor at a time"),
        ("olora", {"aggregation": {"rule": "ffa"}}, "never trains A"),
        ("olora", {"model": {"adapter": {"kind": "head"}}}, "is for LoRA"),
        ("analytic", {"continual": {"method": "analytic"}, "cohort": {"mode": "buffered"}}, "no round to gather sums in"),
        ("analytic", {}, "model.adapter.kind is lora"),
        ("analytic", {"model": {"adapter": {"kind": "head"}}}, "one round a task"),
        ("analytic", {"model": {"adapter": {"kind": "head"}}, "rounds": 2}, "codecs round what travels"),
    ],
)
def test_a_method_that_would_not_do_what_it_says_is_refused(method: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(*([] if "continual" in changes else [ONE, TWO]), method=method, **changes)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([{}], "needs labels, where or between"),
        ([{"where": {"site": []}}], "where.site names no value"),
        ([{"between": {"year": [1, "2"]}}], "a number and a text"),
        ([{"between": {"year": [2, 2]}}], "2.0 is not before 2.0"),
        ([{"labels": ["a"], "name": "x y"}], "name"),
        ([{"labels": ["a"], "name": "x"}, {"labels": ["b"], "name": "x"}], "one name"),
        ([{"labels": ["a"], "label": ["b"]}], "unknown key"),
    ],
)
def test_a_task_that_is_none_is_told(tasks: list[dict[str, Any]], reason: str) -> None:
    assert reason in refusal(*tasks, code=Code.PLAN_INVALID)


def online_of(rounds: int = 6, method: str = "sequential", online: dict[str, Any] | None = None, **sections: Any) -> Plan:
    continual = {"mode": "online", "method": method, "online": online or {}} | sections.pop("continual", {})
    return parse_plan(DOCUMENT | {"rounds": rounds, "continual": continual} | sections)


def test_batches_are_tasks_without_an_end_of_their_own() -> None:
    plan = online_of(rounds=10_000, online={"rounds": 2})
    assert stage_of(plan, 9_999)._replace(task=None) == (4_999, 9_999, 10_000, None)
    assert [task.name for task in tasks_of(plan)[:2]] == ["batch-1", "batch-2"]
    assert labels_until(plan, 0) == tuple(LABELS)
    assert stage_size(plan, stage_of(plan, 1), 64) == 64
    private = online_of(rounds=10_000, online={"rounds": 2}, privacy={"unit": "example", "sample_rate": 0.2})
    once = online_of(rounds=2, online={"rounds": 2}, privacy={"unit": "example", "sample_rate": 0.2})
    assert planned_steps(private, 64) == planned_steps(once, 64), "however many batches come, a record is in one"
    scored = online_of(rounds=6, online={"rounds": 2}, evaluation={"federated_every": 1})
    assert [evaluations(scored, after) for after in range(7)] == [6 + 3, 5 + 2, 4 + 2, 3 + 1, 2 + 1, 1, 0]
    drifts = online_of(rounds=6, online={"rounds": 2, "drift": 0.1, "looks": 4}, evaluation={"federated_every": 1})
    assert [evaluations(drifts, after) for after in range(7)] == [6 + 1 + 4 + 4, 5 + 8, 4 + 8, 3 + 4, 2 + 4, 1, 0]
    assert [looks(drifts, stage) for stage in stages(drifts)] == [1, 4, 4], "the first has nothing to differ from"
    assert evaluations(plan_of(ONE, TWO, evaluation={"federated_every": 2})) == 3


def test_a_plan_of_very_many_tasks_is_read_and_asked_at_once() -> None:
    """An agent and its worker read it with each message."""
    began = time.monotonic()
    plan = online_of(rounds=20_000, method="ewc", online={"rounds": 2})
    assert [stage_of(plan, round).number for round in (1, 2, 3, 20_000, 20_001)] == [0, 0, 1, 9_999, 9_999]
    stream = [{"name": f"task-{number}", "labels": ["a", "b"]} for number in range(1000)]
    planned = plan_of(*stream, rounds=2_500, method="ewc")
    found = [make_method(planned).gathers(round) for round in range(1, 2_501)]
    assert time.monotonic() - began < 2
    assert [number for number, what in enumerate(found, 1) if what] == [stage.last for stage in stages(planned)]
    assert tuple(stage_of(plan, 2 * number) for number in range(1, 10_001)) == stages(plan)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"continual": {"stream": [{"name": "x", "labels": ["a", "b"]}]}}, "the one or the other"),
        ({"rounds": 5, "online": {"rounds": 2}}, "are not those of 1 to 10000 batches of 2"),
        ({"rounds": 10_001}, "are not those of 1 to 10000 batches of 1"),
        ({"cohort": {"size": 3, "minimum": 3}}, "is below cohort.minimum"),
        ({"method": "replay"}, "not built"),
        ({"method": "ewc"}, "two rounds a task"),
        ({"cohort": {"mode": "buffered"}}, "another task is learned"),
        ({"privacy": {"unit": "client", "noise": "central"}, "cohort": {"population": 4}}, "cohorts are to stay secret"),
        ({"rounds": 101, "evaluation": {"federated_every": 1}}, "of at most 100"),
        ({"online": {"drift": 0.1}}, "measured on the clients' hold-outs"),
        ({"privacy": {"audit": {"canaries": 4}}}, "of no task"),
    ],
)
def test_an_online_run_that_would_not_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LichenError) as caught:
        online_of(**changes)
    assert caught.value.code is Code.PLAN_UNSOUND
    assert reason in caught.value.what
    assert caught.value.fix


def test_the_measures_are_those_of_the_papers() -> None:
    matrix = [[0.9, 0.1, None], [0.7, 0.8, 0.2], [0.8, 0.5, 0.6]]
    found = measures(matrix, [0.3, 0.2, 0.1])
    assert found.acc == pytest.approx((0.8 + 0.5 + 0.6) / 3)
    assert found.bwt == pytest.approx((0.8 - 0.9 + 0.5 - 0.8) / 2)
    assert found.fwt == pytest.approx((0.1 - 0.2 + 0.2 - 0.1) / 2)
    assert found.forgetting == pytest.approx((0.9 - 0.8 + 0.8 - 0.5) / 2)
    early = measures([[0.5, 0.6], [0.5, 0.3]])
    assert early.forgetting == 0.0, "of tasks before the last alone"
    assert measures([[0.5, 0.6, 0.1], [0.4, 0.5, 0.2], [0.4, 0.3, 0.9]]).forgetting == pytest.approx((0.1 + 0.3) / 2), (
        "the best of any model before"
    )
    half = measures(matrix[:2])
    assert half.fwt is None
    assert half._replace(fwt=0) == pytest.approx((0.75, -0.2, 0, 0.2))
    assert drift(matrix) == [None, pytest.approx(0.9 - 0.1), pytest.approx((0.7 + 0.8) / 2 - 0.2)]
    assert (drift([]), drift([[0.5]]), drift([[0.5, None], [0.4, 0.4]])) == ([], [None], [None, None])
    assert measures([]) == measures([], [0.1]) == (None, None, None, None)
    assert measures([[0.5]], [0.1]) == (0.5, None, None, None)
    assert measures([[None, 0.5], [0.4, None]], [0.0, None]) == (0.4, None, None, None)
