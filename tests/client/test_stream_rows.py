"""A stream of tasks at a client: which rows a task reads and pays for, and that no record is read in two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.client.app import app
from lichen.client.data import add_source
from lichen.client.ledger import Ledger, open_ledger
from lichen.client.ledger_book import Limit, Limits
from lichen.common import records
from lichen.common.errors import Code
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
PRIVACY = {"unit": "example", "epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.125}
STREAM = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]
STEP = Segment(2.0, 0.1, 4)
DELTA = 1e-5
FIELDS = {"text": "text", "label": "label", "site": "site"}


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(stream: list[dict[str, Any]] = STREAM, **changes: Any) -> Plan:
        local = {**tiny_plan["local"], "steps": 2}
        return parse_plan({**tiny_plan, "local": local, "rounds": 2 * len(stream), "continual": {"stream": stream}, **changes})

    return make


def home_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    told = [{**row, "text": f"{row['text']} {number}", "site": "ab"[number % 2]} for number, row in enumerate(rows)]
    (path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in told) + "\n")
    add_source(path, path / "rows.jsonl", fields=FIELDS, declared_size=64, holdout=0.0)
    return path


def ask(home: Path, plan: Plan, round: int, run: int = 1, *, simulated: bool = False) -> Message:
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan).start, None)
    about = {"src_node_id": 1, "dst_node_id": 2, "message_type": records.TRAIN, "group_id": str(round)}
    message = records.build_message(content, run_id=run, message_id=f"{run}-{round}", **about)
    config = {"home": str(home), "name": "a", "simulated": simulated}
    context = Context(run_id=run, node_id=2, node_config=config, state=RecordDict(), run_config={})
    return app(message, context)  # type: ignore[no-any-return]


def segments_of(home: Path) -> list[tuple[int, float]]:
    """Records and ε of each data segment."""
    with open_ledger(home) as ledger:
        return [(segment.records, ledger.spent(segment.number, Limit(8.0, DELTA)).epsilon) for segment in ledger.segments()]


def test_a_round_reads_the_rows_of_its_task(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    rows = tiny_rows(60)
    home, plan = home_of(tmp_path / "node", rows), plan_of()
    of_task = [sum(row["label"] != "money" for row in rows), sum(row["label"] == "money" for row in rows)]
    found = [ask(home, plan, round, simulated=True).content.config_records["report"]["examples"] for round in (1, 2, 3, 4)]
    assert found == [of_task[0]] * 2 + [of_task[1]] * 2
    by_site = plan_of([{"name": "a", "where": {"site": ["a"]}}, {"name": "none", "where": {"site": ["z"]}}])
    assert ask(home, by_site, 1, simulated=True).content.config_records["report"]["examples"] == 30
    assert ask(home, by_site, 3, simulated=True).error.code == Code.DATA_EMPTY


def test_under_privacy_each_task_pays_for_its_own_records(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    rows = tiny_rows(60)
    home, plan = home_of(tmp_path / "node", rows), plan_of(privacy=PRIVACY)
    reports = [ask(home, plan, round).content.config_records["report"] for round in (1, 2, 3, 4)]
    assert [report["declared_size"] for report in reports] == [32] * 4
    (first, paid), (second, also_paid) = segments_of(home)
    assert (first, second) == (sum(row["label"] != "money" for row in rows), sum(row["label"] == "money" for row in rows))
    steps = [Segment(float(report["noise_multiplier"]), 0.125, 2) for report in reports]  # type: ignore[arg-type]
    assert paid == also_paid == epsilon(steps[:2], DELTA)
    assert 3.5 < paid <= 4.0, "the whole budget, in each"


def test_no_record_is_read_in_two_tasks_whatever_its_label(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    rows = tiny_rows(40)
    home, plan = home_of(tmp_path / "node", rows), plan_of(privacy=PRIVACY)
    ask(home, plan, 1)
    relabelled = [{**json.loads(line), "label": "money"} for line in (home / "rows.jsonl").read_text().splitlines()]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in relabelled) + "\n")
    assert not ask(home, plan, 3).has_error(), "those that were money before"
    with open_ledger(home) as ledger:
        charged = [entry.charged for entry in ledger.entries()]
    assert charged == [frozenset({1}), frozenset({2})]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in relabelled if row["text"] in first_texts(rows)) + "\n")
    assert not ask(home, plan, 4).has_error(), "a refusal would tell that there are rows"
    with open_ledger(home) as ledger:
        assert ledger.entries()[-1].charged == frozenset(), "all that is left was read in the first task: noise alone"


def test_nor_if_a_coordinator_asks_for_the_later_task_first(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    home, plan = home_of(tmp_path / "node", tiny_rows(40)), plan_of(privacy=PRIVACY)
    assert not ask(home, plan, 3).has_error()
    lines = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    renamed = [{**row, "label": "crop"} for row in lines if row["label"] == "money"]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in renamed) + "\n")
    assert not ask(home, plan, 1).has_error()
    with open_ledger(home) as ledger:
        assert ledger.entries()[-1].charged == frozenset()


@pytest.mark.parametrize("life", [4.0, 5.0])
def test_whether_a_task_has_rows_is_told_neither_with_budget_nor_without(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], life: float
) -> None:
    """A task may be one patient's: neither an error, nor fewer steps, nor more noise may follow from whether there are such rows."""
    probe = plan_of([{"name": "all", "where": {"site": ["a", "b"]}}, {"name": "probe", "where": {"site": ["a"]}}], privacy=PRIVACY)
    rows = tiny_rows(40)
    answers = []
    for name, kept in (("with", rows), ("without", [])):
        home = home_of(tmp_path / name, kept or rows)
        if not kept:
            lines = (home / "rows.jsonl").read_text().splitlines()
            (home / "rows.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["site"] == "b") + "\n")
        (home / "policy.yaml").write_text(f"format: 1\nprivacy: {{max_epsilon: {life}}}\n")
        whole = parse_plan(probe.model_dump(mode="json") | {"continual": {}, "rounds": 2})
        for round in (1, 2):
            assert not ask(home, whole, round, run=1).has_error(), "of life's budget little is left"
        answers += [ask(home, probe, round, run=2).content.config_records["report"] for round in (1, 3)]
        with open_ledger(home) as ledger:
            assert [entry.charged for entry in ledger.entries()[-2:]] == [frozenset()] * 2
    assert dict(answers[0]) == dict(answers[2])
    assert dict(answers[1]) == dict(answers[3])


def test_nor_is_it_told_by_a_run_without_tasks_that_comes_after(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    """What the task's rows have paid lies in a segment of their own, which would ask for more noise, or be refused."""
    probe = plan_of([{"name": "probe", "where": {"site": ["a"]}}, {"name": "rest", "where": {"site": ["c"]}}], privacy=PRIVACY)
    answers = []
    for name, sites in (("with", "ab"), ("without", "b")):
        home = home_of(tmp_path / name, tiny_rows(40))
        lines = (home / "rows.jsonl").read_text().splitlines()
        (home / "rows.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["site"] in sites) + "\n")
        (home / "policy.yaml").write_text("format: 1\nprivacy: {max_epsilon: 5.0}\n")
        plain = parse_plan(probe.model_dump(mode="json") | {"continual": {}, "rounds": 2})
        for round, run, plan in ((1, 1, probe), (2, 1, probe), (1, 2, plain), (2, 2, plain), (1, 3, plain)):
            answers.append(dict(ask(home, plan, round, run).content.config_records["report"]))
    assert answers[:5] == answers[5:]


def test_an_entity_goes_on_in_a_task_that_needs_less_noise(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    """A run keeps to the most noise that it was given, but for a stream, in which each task has its own."""
    home = home_of(tmp_path / "home", tiny_rows(40))
    (home / "policy.yaml").write_text("format: 1\nprivacy: {max_epsilon: 50.0}\n")
    stream = [{"name": "fields", "labels": ["crop", "metal"], "share": 0.2}, {"name": "banks", "labels": ["money"], "share": 0.8}]
    privacy = {"unit": "entity", "unit_field": "site", "epsilon": 20.0, "delta": 1e-5}
    plan = plan_of(stream, privacy=privacy)
    noise = [ask(home, plan, round).content.config_records["report"]["noise_multiplier"] for round in (1, 3)]
    assert noise[1] < noise[0]
    with open_ledger(home) as ledger:
        first, second = ledger.entries()
        assert first.charged & second.charged, "the entities'"


def test_records_that_another_process_parts_are_charged_where_they_are_now(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]
) -> None:
    home, plan = home_of(tmp_path / "node", tiny_rows(40)), plan_of(privacy=PRIVACY)
    whole = parse_plan(plan.model_dump(mode="json") | {"continual": {}, "rounds": 3})
    assert not ask(home, whole, 1).has_error()
    with open_ledger(home) as ledger:
        some = [one for (one,) in ledger._rows("SELECT fingerprint FROM records LIMIT 7")]
        assert ledger.assign("holdout", some, apart=True) == [2] * 7
    assert not ask(home, whole, 2).has_error()
    with open_ledger(home) as ledger:
        assert ledger.entries()[-1].charged == {1, 2}


def first_texts(rows: list[dict[str, Any]]) -> set[str]:
    return {f"{row['text']} {number}" for number, row in enumerate(rows) if row["label"] != "money"}


def test_what_an_earlier_run_read_whole_is_parted_by_task(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    rows = tiny_rows(40)
    home, plan = home_of(tmp_path / "node", rows), plan_of(privacy=PRIVACY)
    whole = parse_plan(plan.model_dump(mode="json") | {"continual": {}, "rounds": 2})
    ask(home, whole, 1, run=1)
    [(count, before)] = segments_of(home)
    assert count == 40
    for round in (1, 2, 3, 4):
        assert not ask(home, plan, round, run=2).has_error()
    (one, paid), (other, also_paid) = segments_of(home)
    assert one + other == 40
    assert min(one, other) > 0
    assert before < paid == also_paid, "each part has what the whole had paid, and its own task's steps"
    with open_ledger(home) as ledger:
        ledger.verify()


def test_an_entity_goes_on_from_task_to_task(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    home = home_of(tmp_path / "node", tiny_rows(40))
    plan = plan_of(privacy=PRIVACY | {"unit": "entity", "unit_field": "site"})
    reports = [ask(home, plan, round).content.config_records["report"] for round in (1, 2, 3, 4)]
    steps = [Segment(float(report["noise_multiplier"]), 0.125, 2) for report in reports]  # type: ignore[arg-type]
    assert 3.5 < epsilon(steps, DELTA) <= 4.0
    assert max(paid for _, paid in segments_of(home)) == epsilon(steps, DELTA)


@settings(max_examples=40, deadline=None)
@given(reads=st.lists(st.tuples(st.sets(st.integers(0, 11), min_size=1), st.booleans()), min_size=1, max_size=6))
def test_a_record_keeps_its_history_however_segments_are_parted(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[set[int], bool]]
) -> None:
    limits = Limits("example", Limit(100.0, DELTA))
    paid: dict[int, int] = {}
    with Ledger(tmp_path_factory.mktemp("ledger")) as ledger:
        for number, (found, apart) in enumerate(reads):
            numbers = set(ledger.assign("train", sorted(found), apart=apart))
            together = dict(zip(range(12), ledger.assign("train", range(12)), strict=True)) if apart else {}
            if apart:
                assert {one for one, segment in together.items() if segment in numbers} == found
            ledger.reserve("train", "r", str(number), number + 1, STEP, limits, numbers, as_of=ledger.split_at)
            for one in found:
                paid[one] = paid.get(one, 0) + 1
        of = dict(zip(range(12), ledger.assign("train", range(12)), strict=True))
        entries = ledger.entries()
        assert all(sum(of[one] in entry.charged for entry in entries) >= paid.get(one, 0) for one in range(12))
        if all(apart for _, apart in reads):
            assert all(sum(of[one] in entry.charged for entry in entries) == paid.get(one, 0) for one in range(12))
        ledger.verify()
        again = {segment.number: segment for segment in ledger.segments()}
    with Ledger(ledger.path.parent) as read:
        assert {segment.number: segment for segment in read.segments()} == again
        assert read.entries() == entries
