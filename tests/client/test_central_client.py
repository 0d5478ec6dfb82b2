"""A node under client-level privacy: it must have opted in, clips, tells next to nothing, and pays for the whole run at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lichen.client.app import app
from lichen.client.data import add_source
from lichen.client.ledger import open_ledger
from lichen.client.ledger_book import Limit
from lichen.client.policy import load_policy
from lichen.client.trainer import Trainer
from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.clipping import clipped
from lichen.common.privacy.schedule import planned_central
from lichen.common.tasks import workbench

CENTRAL = {"unit": "client", "noise": "central", "epsilon": 6.0, "delta": 1e-5, "clip": 0.01}
LIFE = Limit(8.0, 1e-5)
OPTED_IN = "unnoised_updates_to_coordinator: allow\nprivacy: {require: [example, client]}\n"


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(local: dict[str, Any] | None = None, **privacy: Any) -> Plan:
        as_it_is = {"uplink": {"codec": "none"}}
        sections = {"cohort": {"size": 20, "population": 40}, "privacy": CENTRAL | privacy, "transfer": as_it_is}
        return parse_plan(tiny_plan | sections | ({"local": local} if local else {}))

    return make


@pytest.fixture
def home(tmp_path: Path, tiny_rows: Callable[..., list[dict[str, Any]]]) -> Path:
    home = tmp_path / "node"
    home.mkdir()
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(30)))
    add_source(home, home / "rows.jsonl", fields={"text": "text", "label": "label"}, declared_size=None)
    (home / "policy.yaml").write_text(OPTED_IN)
    return home


def ask(home: Path, plan: Plan, round: int = 1, *, run: int = 7, clip: float | None = None) -> Message:
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round, clip=clip)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan).start, None)
    message = records.build_message(
        content, run_id=run, message_id=f"m{round}", src_node_id=1, dst_node_id=2, message_type=records.TRAIN, group_id=str(round)
    )
    context = Context(run_id=run, node_id=2, node_config={"home": str(home), "name": "ward-3"}, state=RecordDict(), run_config={})
    return app(message, context)  # type: ignore[no-any-return]


def refused(reply: Message, code: Code) -> None:
    assert reply.has_error()
    assert (Code(reply.error.code), reply.error.reason or "") == (code, "")


@pytest.mark.parametrize(
    ("policy", "keys"),
    [
        ("", {"privacy.require", "unnoised_updates_to_coordinator"}),
        ("privacy: {require: [client]}\n", {"unnoised_updates_to_coordinator"}),
        ("unnoised_updates_to_coordinator: allow\n", {"privacy.require"}),
        (OPTED_IN + "min_cohort: 2\n", {"min_cohort"}),  # no secret cohort has a least size
        (OPTED_IN.replace("]}", "], max_epsilon: 5}"), {"privacy.max_epsilon"}),
    ],
)
def test_an_owner_who_has_not_opted_in_sends_nothing(home: Path, plan_of: Callable[..., Plan], policy: str, keys: set[str]) -> None:
    (home / "policy.yaml").write_text("format: 1\n" + policy)
    plan = plan_of()
    with pytest.raises(LichenError) as caught:
        load_policy(home).check(plan, plan.sha256(), datetime(2026, 1, 5, 12))
    assert caught.value.code is Code.POLICY_REFUSED
    known = {"privacy.require", "unnoised_updates_to_coordinator", "min_cohort", "privacy.max_epsilon"}
    assert {key for key in known if f"; {key} permits" in caught.value.what} == keys
    refused(ask(home, plan), Code.POLICY_REFUSED)
    assert not (home / "ledger.sqlite").exists()


def test_what_leaves_is_a_clipped_update_and_constants(home: Path, plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        reply = ask(home, plan_of())
    assert "promised by the coordinator" in caplog.text
    assert dict(reply.content.config_records["report"]) == {"format": 1, "client": "ward-3", "round": 1, "steps": 4}
    assert set(reply.content) == {"report", "payload"}
    assert clipped(records.get_tensors(reply.content, None), 1.0)[1] == pytest.approx(0.01, rel=1e-5)
    told = clipped(records.get_tensors(ask(home, plan_of(), 2, clip=0.002).content, None), 1.0)[1]
    assert told == pytest.approx(0.002, rel=1e-5), "the assignment's clip holds"


def test_epochs_do_not_tell_the_true_size(home: Path, plan_of: Callable[..., Plan]) -> None:
    reply = ask(home, plan_of({"epochs": 1, "batch_size": 4, "learning_rate": 0.01}))
    assert dict(reply.content.config_records["report"])["steps"] == 0


@pytest.mark.parametrize(("clip", "within"), [(1e-4, False), (1e4, True)])
def test_under_an_adaptive_clip_one_bit_more(home: Path, plan_of: Callable[..., Plan], clip: float, within: bool) -> None:
    report = dict(ask(home, plan_of(adaptive_clip={}), clip=clip).content.config_records["report"])
    assert report == {"format": 1, "client": "ward-3", "round": 1, "steps": 4, "within_clip": within}


def test_the_first_round_pays_for_the_run_and_a_second_run_must_fit(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    for round in (1, 2, 2):
        assert not ask(home, plan, round).has_error()
    with open_ledger(home) as ledger:
        (entry,) = ledger.entries()
        assert (entry.unit, entry.segment) == ("client", planned_central(plan).segment)
        assert 5.9 < ledger.spent(1, LIFE).epsilon <= 6.0
    refused(ask(home, plan_of(clip=0.7)), Code.PRIVACY_BUDGET)  # another plan under this run's name
    refused(ask(home, plan, run=8), Code.PRIVACY_BUDGET)  # 6 and 6 is more than the life's 8
    assert not ask(home, plan_of(epsilon=1.0), run=9).has_error()
    with open_ledger(home) as ledger:
        assert [entry.run for entry in ledger.entries()] == ["7", "9"], "what was refused is not charged"
        assert ledger.spent(1, LIFE).epsilon <= 8.0


def test_what_was_spent_for_rows_is_not_added_to_what_is_spent_for_clients(
    home: Path, plan_of: Callable[..., Plan], tiny_plan: dict[str, Any]
) -> None:
    rows = parse_plan(tiny_plan | {"privacy": {"unit": "example", "epsilon": 1.0}})
    (home / "data.yaml").unlink()
    add_source(home, home / "rows.jsonl", fields={"text": "text", "label": "label"}, declared_size=32)
    assert not ask(home, rows, run=5).has_error()
    refused(ask(home, plan_of()), Code.PRIVACY_BUDGET)


@pytest.mark.parametrize("method", ["sequential", "replay"])
def test_each_task_of_a_stream_is_trained_on_its_own_rows_and_each_row_pays_for_the_run(
    home: Path, plan_of: Callable[..., Plan], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]
    document = plan_of().model_dump(mode="json")
    continual = {"method": method, "stream": stream, "replay": {"share": 0.5}}
    plan = parse_plan(document | {"rounds": 4, "continual": continual})
    trained: list[int] = []
    original = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, job: trained.append(len(job.data)) or original(self, job))
    for round in (1, 2, 3, 4):
        assert not ask(home, plan, round).has_error()
    with open_ledger(home) as ledger:
        old, new = (segment.records for segment in ledger.segments())
        assert trained[:2] == [old] * 2
        assert trained[2] == trained[3] >= new
        assert (trained[2] > new) == (method == "replay")
        assert [entry.segment for entry in ledger.entries()] == [planned_central(plan).segment] * 2
        assert all(5.9 < ledger.spent(segment.number, LIFE).epsilon <= 6.0 for segment in ledger.segments())
