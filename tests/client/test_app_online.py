"""A client in an online run: what fails before the first step loses no rows, and what a run has read is not new to another."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lichen.client.app import app
from lichen.client.arrivals import Arrivals, new_rows
from lichen.client.data import add_source
from lichen.client.ledger import Ledger
from lichen.client.ledger_book import Limit
from lichen.common import records
from lichen.common.errors import Code
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.schedule import evaluations, planned_evaluation
from lichen.common.tasks import workbench
from lichen.common.tasks.text_classification import TextClassification

Rows = Callable[..., list[dict[str, Any]]]
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.5}
ONLINE = {"mode": "online", "online": {"rounds": 2}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n")
    add_source(tmp_path, tmp_path / "inbox", fields={"text": "text", "label": "label"}, declared_size=32, holdout=0.3, watch=True)
    return tmp_path


def deliver(home: Path, file: str, rows: list[dict[str, Any]]) -> None:
    (home / "inbox" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask(home: Path, plan: Plan, round: int, run: int = 1, kind: str = records.TRAIN, *, before: bool = False, look: int = 0) -> Message:
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round, before=before)
    content = RecordDict({"assignment": records.to_config(assignment)})
    start: State = workbench(plan).start
    records.put_tensors(content, start, None)
    message = records.build_message(
        content,
        run_id=run,
        message_id=f"{run:016d}{round:014d}{look}{int(before)}",
        src_node_id=1,
        dst_node_id=2,
        message_type=kind,
        group_id=str(round),
    )
    return app(message, Context(run, 2, {"home": str(home), "name": "node"}, RecordDict(), {}))


def new(home: Path, plan: Plan, run: str = "1") -> int:
    with Arrivals(home) as arrivals:
        return len(new_rows(home, plan, run, arrivals).rows)


def test_what_fails_before_the_first_step_loses_no_rows(home: Path, tiny_plan: dict[str, Any], tiny_rows: Rows) -> None:
    plan = parse_plan(tiny_plan | {"rounds": 4, "continual": ONLINE})
    deliver(home, "one.jsonl", tiny_rows(30))
    deliver(home, "two.jsonl", [{"text": "a", "label": "typo"}])
    assert ask(home, plan, 1).error.code == Code.DATA_LABEL
    (home / "inbox" / "two.jsonl").unlink()
    assert new(home, plan) == 30
    assert not ask(home, plan, 1).has_error()
    assert new(home, plan) == 0
    deliver(home, "two.jsonl", tiny_rows(20, 1))
    reply = ask(home, plan, 2)
    report = records.from_config(records.TrainReport, reply.content.config_records["report"])
    assert report.examples is not None
    assert report.examples <= 30, "what came since is of the next batch"
    assert ask(home, plan, 3).content.config_records["report"]["examples"] <= 20
    (home / "inbox" / "two.jsonl").unlink()
    assert ask(home, plan, 4).error.code == Code.DATA_EMPTY, "its rows are gone"


def test_rows_of_past_batches_are_let_go_of(
    home: Path, tiny_plan: dict[str, Any], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parse_plan(tiny_plan | {"rounds": 4, "continual": ONLINE | {"online": {"rounds": 1}}, "evaluation": {"federated_every": 1}})
    encoded = list[weakref.ref[object]]()
    encode = TextClassification.encode

    def noted(task: TextClassification, columns: Any) -> Any:
        encoded.append(weakref.ref(found := encode(task, columns)))
        return found

    monkeypatch.setattr(TextClassification, "encode", noted)
    for round in range(1, 5):
        deliver(home, f"{round}.jsonl", tiny_rows(30, round))
        for kind in (records.TRAIN, records.EVALUATE) * 2:
            assert not ask(home, plan, round, kind=kind).has_error()
    gc.collect()
    assert len(encoded) == 8, "what a round has read is kept for its next message"
    assert [one() is not None for one in encoded] == [False] * 6 + [True] * 2


def test_in_private_batches_a_segment_is_read_in_the_rounds_of_one(home: Path, tiny_plan: dict[str, Any], tiny_rows: Rows) -> None:
    scored = {"evaluation": {"federated_every": 2}, "privacy": PRIVATE}
    plan = parse_plan(tiny_plan | {"rounds": 4, "continual": ONLINE} | scored)
    rows = tiny_rows(90, 7)
    deliver(home, "one.jsonl", rows[:40])
    before = ask(home, plan, 1, kind=records.EVALUATE, before=True)
    assert len(before.content.config_records["report"]["counts"]) == 9
    assert new(home, plan) > 0, "to score is not to train"
    for round in (1, 2):
        assert not ask(home, plan, round).has_error()
    assert not ask(home, plan, 2, kind=records.EVALUATE).has_error()
    assert ask(home, plan, 2, kind=records.EVALUATE, before=True).error.code == Code.FRAME_INVALID
    deliver(home, "again.jsonl", rows[:40][::-1])
    assert ask(home, plan, 3).error.code == Code.DATA_EMPTY
    deliver(home, "two.jsonl", rows[20:90])
    before = ask(home, plan, 3, kind=records.EVALUATE, before=True)
    assert len(before.content.config_records["report"]["counts"]) == 18
    for round in (3, 4):
        assert not ask(home, plan, round).has_error()
    with Ledger(home) as ledger:
        by_segment: dict[int, set[int]] = {}
        for entry in ledger.entries():
            for number in entry.charged if entry.split == "train" else ():
                by_segment.setdefault(number, set()).add((entry.round - 1) // 2)
        assert len(by_segment) == 2
        assert all(len(batches) == 1 for batches in by_segment.values())
        assert sum(entry.split == "holdout" for entry in ledger.entries()) == 3


def test_looks_that_are_planned_have_budget_for_life_and_the_plans_noise(home: Path, tiny_plan: dict[str, Any], tiny_rows: Rows) -> None:
    online = {"mode": "online", "online": {"rounds": 2, "drift": 0.1, "looks": 3}}
    plan = parse_plan(tiny_plan | {"rounds": 4, "continual": online, "evaluation": {"federated_every": 2}, "privacy": PRIVATE})
    life = f"privacy: {{max_epsilon: {PRIVATE['epsilon']}, max_delta: {PRIVATE['delta']}}}\n"
    (home / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n" + life)
    deliver(home, "one.jsonl", tiny_rows(40))
    looks = [ask(home, plan, 1, kind=records.EVALUATE, before=True)]
    assert not any(ask(home, plan, round).has_error() for round in (1, 2))
    looks.append(ask(home, plan, 2, kind=records.EVALUATE))
    deliver(home, "two.jsonl", tiny_rows(40, 1))
    looks += [ask(home, plan, 3, kind=records.EVALUATE, before=True, look=look) for look in range(3)]
    assert not any(ask(home, plan, round).has_error() for round in (3, 4))
    looks.append(ask(home, plan, 4, kind=records.EVALUATE))
    noise = [look.content.config_records["report"]["noise_multiplier"] for look in looks]
    assert noise == [planned_evaluation(plan).noise_multiplier] * evaluations(plan)
    with Ledger(home) as ledger:
        charged = [entry.charged for entry in ledger.entries() if entry.split == "holdout"]
        assert charged[0] <= charged[-1], "none had noise alone"
        assert [len(own) for own in charged] == [1, 1, 2, 2, 2, 2]
        assert all(ledger.spent(number, Limit(8.0, 1e-5)).epsilon <= 8.0 for number in charged[-1])


def test_what_an_ordinary_run_has_read_is_not_new_later(home: Path, tiny_plan: dict[str, Any], tiny_rows: Rows) -> None:
    deliver(home, "one.jsonl", tiny_rows(30))
    online = parse_plan(tiny_plan | {"rounds": 4, "continual": ONLINE})
    assert new(home, online, "2") == 30
    assert not ask(home, parse_plan(tiny_plan), 1, run=1).has_error()
    with Arrivals(home) as arrivals:
        left = new_rows(home, online, "2", arrivals)
    assert left == (0, [], []), "held-out rows alone make no batch"
    assert ask(home, online, 1, run=2).error.code == Code.DATA_EMPTY
    (home / "arrivals.sqlite").write_bytes(b"damaged" * 1000)
    reply = ask(home, online, 1, run=2)
    assert reply.error.code == Code.OUTPUT_UNUSABLE
