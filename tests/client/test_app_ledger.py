"""Rows, files, homes and the ledger together: what a real training message charges, and which rows it reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lichen.client import app as client_app
from lichen.client.app import app
from lichen.client.data import add_source
from lichen.client.ledger import Ledger, open_ledger
from lichen.client.ledger_book import Limit
from lichen.common import records
from lichen.common.errors import Code
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import epsilon
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
PRIVACY = {"unit": "example", "epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.125}
LIFE = Limit(8.0, 1e-5)
FIELDS = {"text": "text", "label": "label"}


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        privacy = {**PRIVACY, **changes.pop("privacy", {})}
        return parse_plan({**tiny_plan, "privacy": privacy, "local": {**tiny_plan["local"], "steps": 2}, **changes})

    return make


def write_home(home: Path, rows: list[dict[str, Any]], *, holdout: float = 0.3, fields: dict[str, str] | None = None) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    write_rows(home, rows)
    add_source(home, home / "rows.jsonl", fields=fields or FIELDS, declared_size=64, holdout=holdout)
    return home


def write_rows(home: Path, rows: list[dict[str, Any]]) -> None:
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def unlike(rows: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """Rows of which no two, and none of another word's, have one text."""
    return [{**row, "text": f"{row['text']} {word}{number}"} for number, row in enumerate(rows)]


def ask(home: Path, plan: Plan, run: int = 1, round: int = 1, kind: str = records.TRAIN) -> Message:
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan).start, None)
    about = {"src_node_id": 1, "dst_node_id": 2, "message_type": kind, "group_id": str(round)}
    message = records.build_message(content, run_id=run, message_id=f"{run}-{kind}-{round}", **about)
    return app(message, context(home, run))  # type: ignore[no-any-return]


def context(home: Path, run: int = 1) -> Context:
    return Context(run_id=run, node_id=2, node_config={"home": str(home), "name": "a"}, state=RecordDict(), run_config={})


def spent(home: Path) -> list[float]:
    """ε of each data segment."""
    with open_ledger(home) as ledger:
        return [ledger.spent(segment.number, LIFE).epsilon for segment in ledger.segments()]


def records_of(home: Path) -> list[tuple[str, int]]:
    with open_ledger(home) as ledger:
        return [(segment.split, segment.records) for segment in ledger.segments()]


def test_rows_that_are_moved_from_the_hold_out_to_training_take_their_history_along(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]
) -> None:
    """The hole that the first ledger had: the owner changes --holdout between two runs."""
    home = write_home(tmp_path / "home", unlike(tiny_rows(60), "x"))
    plan = plan_of(evaluation={"federated_every": 1})
    assert not ask(home, plan).has_error()
    assert not ask(home, plan, kind=records.EVALUATE).has_error()
    (train, held), first = records_of(home), spent(home)
    assert train[1] + held[1] == 60
    add_source(home, home / "rows.jsonl", fields=FIELDS, declared_size=64, holdout=0.0)
    assert not ask(home, plan, run=2).has_error()
    assert records_of(home) == [train, held]  # no new segment: every row stays where it was first read
    assert all(after > before for after, before in zip(spent(home), first, strict=True))
    with Ledger(home) as ledger:
        assert [sorted(entry.charged) for entry in ledger.entries()] == [[1], [2], [1, 2]]
        moved = [entry.segment for entry in ledger.entries() if 2 in entry.charged]
        assert ledger.spent(2, LIFE).epsilon > epsilon(moved, 1e-5)  # of an evaluation and a training, by the filter


@pytest.mark.parametrize("kind", [records.TRAIN, records.EVALUATE])
def test_nothing_that_is_told_follows_from_which_labels_are_here(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], kind: str
) -> None:
    """A plan's labels choose rows as a task does: a row of none of them is charged all the same, and may be one that has nothing left."""
    rows = unlike(tiny_rows(60), "x")
    answers = []
    for name, kept in (("with", rows), ("without", [row for row in rows if row["label"] != "crop"])):
        home = write_home(tmp_path / name, kept)
        (home / "policy.yaml").write_text("format: 1\nprivacy: {max_epsilon: 6.0}\n")
        probe = {"labels": ["crop", "zz"], "max_length": 32}
        runs = [(probe, 2.0), (probe, 2.0), (None, 4.0), (None, 4.0), (probe, 2.0), (probe, 4.0)]
        for run, (task, most) in enumerate(runs):
            changes = {"privacy": {"epsilon": most}, "evaluation": {"federated_every": 1}, "rounds": 1} | ({"task": task} if task else {})
            reply = ask(home, plan_of(**changes), run=run, kind=kind)
            report = {} if reply.has_error() else dict(reply.content.config_records["report"])
            report.pop("counts", None)
            answers.append((report, reply.has_error() and reply.error.code))
    assert answers[: len(runs)] == answers[len(runs) :]
    assert {code for _, code in answers} >= {False, Code.PRIVACY_BUDGET}


@pytest.mark.parametrize("kind", [records.TRAIN, records.EVALUATE])
@pytest.mark.parametrize("round", [-1, 0, 3, 2**40])
def test_a_round_that_the_plan_has_not_is_refused_and_costs_nothing(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], round: int, kind: str
) -> None:
    """«Round 3 of 2» would leave less than no steps ahead, and the bound for life would count them off."""
    home = write_home(tmp_path / "home", unlike(tiny_rows(30), "x"))
    reply = ask(home, plan_of(rounds=2, evaluation={"federated_every": 1}), round=round, kind=kind)
    assert reply.error.code == Code.FRAME_INVALID
    assert not (home / "ledger.sqlite").exists()


@pytest.mark.parametrize("change", ["order", "format", "space", "label", "copied", "another column's name"])
def test_rows_that_are_exported_again_are_the_same_records(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LICHEN_LEDGER", str(tmp_path / "ledger"))
    rows = unlike(tiny_rows(30), "x")
    home = write_home(tmp_path / "home", rows, holdout=0.0)
    assert not ask(home, plan_of()).has_error()
    if change == "order":
        write_rows(home, rows[::-1])
    elif change == "format":
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(rows)
        (home / "data.yaml").unlink()
        add_source(home, tmp_path / "rows.csv", fields=FIELDS, declared_size=64, holdout=0.0)
    elif change == "space":
        write_rows(home, [{**row, "text": f" {row['text'].replace(' ', '  ')}\n"} for row in rows])
    elif change == "label":  # corrected, say
        write_rows(home, [{**row, "label": "crop"} for row in rows])
    elif change == "copied":  # another home, on the same rows
        home = write_home(tmp_path / "other", rows, holdout=0.0)
    else:
        renamed = [{"body": row["text"], "topic": row["label"], "more": number} for number, row in enumerate(rows)]
        write_rows(home, renamed)
        add_source(home, home / "rows.jsonl", fields={"text": "body", "label": "topic", "id": "more"}, declared_size=64, holdout=0.0)
    assert not ask(home, plan_of(), run=2).has_error()
    assert records_of(home) == [("train", 30)]
    with open_ledger(home) as ledger:
        assert [entry.run for entry in ledger.entries()] == ["1", "2"]


def test_rows_that_arrive_train_when_the_old_ones_are_spent(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    old, new = unlike(tiny_rows(40), "old"), unlike(tiny_rows(20), "new")
    home = write_home(tmp_path / "home", [*old, old[0]], holdout=0.0)
    plan = plan_of(privacy={"epsilon": 8.0}, rounds=2)
    for round in (1, 2):
        assert not ask(home, plan, 1, round).has_error()
    assert ask(home, plan, run=2).error.code == Code.PRIVACY_BUDGET
    write_rows(home, [*old, *new])
    assert not ask(home, plan, run=2).has_error()
    assert records_of(home) == [("train", 40), ("train", 20)]
    with Ledger(home) as ledger:
        assert sorted(ledger.entries()[-1].charged) == [2]
    rows = client_app._rows(client_app.Node(context(home)), plan, "train", client_app.trainer_of(plan), 1, "1")
    assert rows.readable_units(frozenset({2})) == [[row] for row in range(40, 60)]


def test_an_entity_that_is_written_in_several_ways_is_one_unit(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    names = ["Jos\u00e9", "Jose\u0301", "Ann Lee", " Ann  Lee", "Ann\u00a0Lee", "Eve"]
    rows = [row | {"patient": name} for row, name in zip(unlike(tiny_rows(6), "x"), names, strict=True)]
    home = write_home(tmp_path / "home", rows, holdout=0.0, fields={**FIELDS, "patient": "patient"})
    plan = plan_of(privacy={"unit": "entity", "unit_field": "patient"})
    read = client_app._rows(client_app.Node(context(home)), plan, "train", client_app.trainer_of(plan), 1, "1")
    assert read.units == [[0, 1], [2, 3, 4], [5]]


def test_an_entity_brings_its_rows_and_its_own_history(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    rows = [{**row, "who": number % 5} for number, row in enumerate(unlike(tiny_rows(30), "x"))]
    fields = FIELDS | {"patient": "who"}
    home = write_home(tmp_path / "home", rows, holdout=0.0, fields=fields)
    plan = plan_of(privacy={"unit": "entity", "unit_field": "patient"})
    assert not ask(home, plan).has_error()
    assert records_of(home) == [("train", 35)]  # rows, and patients
    # new rows of an old patient, old rows under new names, and a new patient
    more = [{**row, "who": who} for row, who in zip(unlike(tiny_rows(6), "y"), [0, 0, 0, 7, 7, 7], strict=True)]
    write_rows(home, [*more, *({**row, "who": 9} for row in rows[:6])])
    read = client_app._rows(client_app.Node(context(home)), plan, "train", client_app.trainer_of(plan), 1, "1")
    assert dict(zip((tuple(unit) for unit in read.units), read.read_from, strict=True)) == {
        (0, 1, 2): {1, 2},
        (3, 4, 5): {2},
        tuple(range(6, 12)): {1, 2},
    }
    assert read.readable_units(frozenset({2})) == [[3, 4, 5]]


def test_an_evaluation_reads_no_row_that_is_spent(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write_home(tmp_path / "home", unlike(tiny_rows(60), "x"), holdout=0.5)
    plan = plan_of(evaluation={"federated_every": 1})
    node, trainer = client_app.Node(context(home)), client_app.trainer_of(plan)
    before = len(client_app._rows(node, plan, "holdout", trainer, 1, "1").units)
    with Ledger(home) as ledger:
        ledger.write_off("home")
    assert ask(home, plan, kind=records.EVALUATE).error.code == Code.PRIVACY_BUDGET
    write_rows(home, [*unlike(tiny_rows(60), "x"), *unlike(tiny_rows(30), "y")])
    seen: list[int] = []
    score = trainer.task.score

    def counted(network: Any, data: Any, size: int, rows: list[int]) -> Any:
        seen.append(len(rows))
        return score(network, data, size, rows)

    monkeypatch.setattr(trainer.task, "score", counted)
    assert not ask(home, plan, kind=records.EVALUATE).has_error()
    assert seen == [len(client_app._rows(node, plan, "holdout", trainer, 1, "1").units) - before]
    assert 0 < seen[0] < before


def test_what_is_reported_is_declared_whatever_the_rows(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    """Two nodes of one history, one with a row more: they report the same."""
    told = []
    for name, count in (("a", 40), ("b", 41)):
        home = write_home(tmp_path / name, unlike(tiny_rows(count), "x"), holdout=0.0)
        runs = [ask(home, plan_of(privacy={"epsilon": 6.0}, rounds=1), run=run) for run in (1, 2, 3)]
        told.append([dict(reply.content.config_records["report"]) for reply in runs if not reply.has_error()])
    assert told[0] == told[1]
    assert told[0][0]["noise_multiplier"] < told[0][-1]["noise_multiplier"]


def test_reading_is_one_pass_and_a_later_one_writes_nothing(tmp_path: Path) -> None:
    count = 50_000
    with Ledger(tmp_path) as ledger:
        ledger.assign("train", range(count))
        before = ledger.verify()
        changes = ledger._db.total_changes
        ledger.assign("train", range(count, -1, -1)[1:])
        assert (ledger.verify(), ledger._db.total_changes) == (before, changes)
        assert ledger.segments()[0].records == count
