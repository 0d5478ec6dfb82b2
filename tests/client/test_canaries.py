"""Canaries at the client: by fair coins of the node's own, kept in its home alone, units like any other, and only where policy permits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from scipy import stats

from lichen.client import canaries
from lichen.client.app import app
from lichen.client.data import add_source, load
from lichen.client.trainer import Trainer
from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.randomness import SecretSource, SeededSource
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
COUNT = 60


@pytest.fixture
def plan(tiny_plan: dict[str, Any]) -> Plan:
    return plan_of(tiny_plan)


def plan_of(document: dict[str, Any], **privacy: Any) -> Plan:
    asked = {"unit": "example", "epsilon": 6.0, "sample_rate": 0.125, "clip": 0.5, "audit": {"canaries": COUNT}} | privacy
    return parse_plan({**document, "privacy": asked})


@pytest.fixture
def home(tmp_path: Path, tiny_rows: Rows) -> Path:
    home = tmp_path / "node"
    home.mkdir()
    rows = [row | {"who": f"p{index % 10}"} for index, row in enumerate(tiny_rows(30))]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    fields = {"text": "text", "label": "label", "who": "who"}
    add_source(home, home / "rows.jsonl", fields=fields, declared_size=64, holdout=0.1)
    (home / "policy.yaml").write_text("canaries: true\n")
    return home


def ask(home: Path, plan: Plan, round: int = 1, *, run: int = 7) -> Message:
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan).start, None)
    message = records.build_message(
        content,
        run_id=run,
        message_id=f"{run}-{round}",
        src_node_id=1,
        dst_node_id=2,
        message_type=records.TRAIN,
        group_id=str(round),
    )
    context = Context(run_id=run, node_id=2, node_config={"home": str(home), "name": "clinic-a"}, state=RecordDict(), run_config={})
    return app(message, context)


def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[list[int]], int]]:
    """What the trainer is given from now on: rows, units, declared size."""
    given: list[tuple[Any, list[list[int]], int]] = []
    real = Trainer.train_private

    def watch(self: Trainer, start: Any, data: Any, units: Any, segment: Any, declared_size: int, *rest: Any) -> Any:
        given.append((data, [list(unit) for unit in units], declared_size))
        return real(self, start, data, units, segment, declared_size, *rest)

    monkeypatch.setattr(Trainer, "train_private", watch)
    return given


def test_those_that_the_coin_lets_in_are_units_of_their_own(home: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    given = trained_on(monkeypatch)
    reply = ask(home, plan)
    assert not reply.has_error(), reply.error
    kept = canaries.read(home, "7")
    assert kept is not None
    assert (kept.client, kept.count) == ("clinic-a", COUNT)
    ((data, units, declared),) = given
    rows = len(data) - len(kept.included)
    assert units[rows:] == [[row] for row in range(rows, len(data))]
    assert all(max(unit) < rows for unit in units[:rows])
    assert declared == 64, "the denominator follows the declared size, whatever was added"
    made = workbench(plan).task.made_up(COUNT, canaries.key(plan, "clinic-a")).select(kept.included)
    assert [ids.tolist() for ids in data.tokens[rows:]] == [ids.tolist() for ids in made.tokens]
    assert data.labels[rows:].tolist() == made.labels.tolist()


def test_the_coin_is_tossed_once_a_run_and_its_outcome_never_leaves(home: Path, plan: Plan) -> None:
    first, second, other = ask(home, plan, 1), ask(home, plan, 2), ask(home, plan, 1, run=8)
    path = home / "canaries" / "7.json"
    assert path.stat().st_mode & 0o777 == 0o600
    kept, another = canaries.read(home, "7"), canaries.read(home, "8")
    assert kept is not None
    assert another is not None
    assert kept.included != another.included
    replies = {len(records.message_to_bytes(reply)) for reply in (first, second, other) if not reply.has_error()}
    assert len(replies) == 1, "nothing in a reply grows with what was let in"
    assert set(dict(first.content.config_records["report"])) == {
        "format",
        "client",
        "round",
        "steps",
        "declared_size",
        "noise_multiplier",
        "sample_rate",
    }


def test_a_canary_among_entities_is_an_entity(home: Path, tiny_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = trained_on(monkeypatch)
    plan = plan_of(tiny_plan, unit="entity", unit_field="who")
    assert not ask(home, plan).has_error()
    kept = canaries.read(home, "7")
    assert kept is not None
    ((data, units, _),) = given
    people = len(set(load(home, "train", ("who",)).column("who")))
    assert len(units) == people + len(kept.included)
    assert units[people:] == [[row] for row in range(len(data) - len(kept.included), len(data))]


def test_by_default_no_plan_may_add_them(home: Path, plan: Plan) -> None:
    (home / "policy.yaml").unlink()
    reply = ask(home, plan)
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason or "") == (Code.POLICY_REFUSED, "")
    assert not (home / "canaries").exists()


def test_coins_are_fair_and_independent_of_place(tmp_path: Path, tiny_plan: dict[str, Any]) -> None:
    many = plan_of(tiny_plan, audit={"canaries": 20_000})
    kept = canaries.keep(tmp_path, many, "1", "a", SecretSource())
    assert stats.binomtest(len(kept.included), 20_000, 0.5).pvalue > 1e-7
    assert stats.binomtest(sum(index % 2 for index in kept.included), len(kept.included), 0.5).pvalue > 1e-7
    assert canaries.keep(tmp_path, many, "1", "a", SecretSource()) == kept


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "client": "a", "count": 60, "included": [60]}', "\xff"])
def test_a_damaged_file_is_refused_and_not_drawn_again(tmp_path: Path, plan: Plan, text: str) -> None:
    (tmp_path / "canaries").mkdir()
    (tmp_path / "canaries" / "1.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LichenError) as caught:
        canaries.keep(tmp_path, plan, "1", "a", SeededSource("x"))
    assert caught.value.code is Code.PRIVACY_HISTORY


def test_those_of_another_number_are_not_mistaken_for_this_runs(tmp_path: Path, plan: Plan, tiny_plan: dict[str, Any]) -> None:
    canaries.keep(tmp_path, plan, "1", "a", SeededSource("x"))
    fewer = plan_of(tiny_plan, audit={"canaries": 5})
    for changed, name in ((fewer, "a"), (plan, "b")):
        with pytest.raises(LichenError) as caught:
            canaries.keep(tmp_path, changed, "1", name, SeededSource("x"))
        assert caught.value.code is Code.PRIVACY_HISTORY


def test_no_canaries_no_file(home: Path, tiny_plan: dict[str, Any]) -> None:
    (home / "policy.yaml").unlink()
    assert not ask(home, plan_of(tiny_plan, audit={})).has_error()
    assert not (home / "canaries").exists()
