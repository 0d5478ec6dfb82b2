"""The ClientApp with real replies: under privacy nothing leaves but noised tensors, declared constants and error numbers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from lichen.client import app as client_app
from lichen.client.app import app
from lichen.client.data import add_source, load
from lichen.client.ledger import Ledger
from lichen.client.ledger_book import Limit
from lichen.client.memory import is_out_of_memory
from lichen.client.policy import approve
from lichen.common import records, tasks
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import rounded
from lichen.common.plan import Plan, digest_of, parse_plan
from lichen.common.privacy.accounting import epsilon
from lichen.common.privacy.schedule import planned_steps
from lichen.common.records import Rule
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
DECLARED = 64
LIFE = Limit(8.0, 1e-5)
PRIVACY = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.125, "clip": 0.5}
# Texts and a name that must appear nowhere in a message.
SECRET = "Mrs Pemberton"


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(private: bool = True, **changes: Any) -> Plan:
        document = {**tiny_plan, "transfer": {"uplink": {"codec": "none"}}}
        if private:
            document["privacy"] = {**PRIVACY, **changes.pop("privacy", {})}
        return parse_plan({**document, **changes})

    return make


def write_home(home: Path, rows: list[dict[str, Any]], *, declared: int | None = DECLARED, fields: Any = None, **more: Any) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    data = home / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    add_source(home, data, fields=fields or {"text": "text", "label": "label"}, declared_size=declared, **more)
    return home


@pytest.fixture
def home(tmp_path: Path, tiny_rows: Rows) -> Path:
    return write_home(tmp_path / "node", tiny_rows(60), holdout=0.3)


def ask(
    home: Path,
    plan: Plan,
    round: int = 1,
    *,
    kind: str = records.TRAIN,
    simulated: bool = False,
    message_id: str = "",
    run: int = 7,
    config: dict[str, Any] | None = None,
    text: str = "",
    digest: str = "",
    **assigned: Any,
) -> Message:
    """The app's reply to what a coordinator would send, both through the wire's bytes."""
    text = text or plan.canonical_json()
    assignment = records.Assignment(plan=text, plan_sha256=digest or digest_of(text), round=round, **assigned)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan).start, None)
    message = records.build_message(
        content,
        run_id=run,
        message_id=message_id or f"{kind}-{round}",
        src_node_id=1,
        dst_node_id=2,
        message_type=kind,
        group_id=str(round),
    )
    node: dict[str, Any] = {"home": str(home), "name": "clinic-a"} | ({"simulated": True} if simulated else {}) | (config or {})
    context = Context(run_id=run, node_id=2, node_config=node, state=RecordDict(), run_config={})
    return records.message_from_bytes(records.message_to_bytes(app(records.message_from_bytes(records.message_to_bytes(message)), context)))


def report_of(message: Message) -> dict[str, Any]:
    assert not message.has_error(), message.error
    return dict(message.content.config_records["report"])


# --- what leaves ------------------------------------------------------------------------------------------------------------------


def leaves(message: Message) -> Iterator[tuple[str, str]]:
    """Everything in a reply that a client has put there: (place, name)."""
    if message.has_error():
        yield "error", "code"
        if message.error.reason:
            yield "error", "reason"
        return
    yield from records.message_items(message.content)


PERMITTED = {
    ("report", "format"),
    ("report", "client"),
    ("report", "round"),
    ("report", "steps"),
    ("report", "declared_size"),
    ("report", "noise_multiplier"),
    ("report", "sample_rate"),
    ("payload", "payload"),
}


def test_a_private_training_reply_holds_constants_and_noised_tensors_only(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    reply = ask(home, plan)
    assert set(leaves(reply)) == PERMITTED
    for record, key in leaves(reply):  # nothing without a rule
        if record == "report":
            rules = [item for item in records.TrainReport.model_fields[key].metadata if isinstance(item, Rule)]
            assert rules == [Rule.DECLARED]
    report = report_of(reply)
    # each value follows from the plan and what the owner declared
    assert (report["client"], report["round"], report["steps"], report["declared_size"]) == ("clinic-a", 1, 4, DECLARED)
    assert report["sample_rate"] == 0.125
    tensors = records.get_tensors(reply.content, None)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in workbench(plan).start.items()}
    # Flower's own envelope bears nothing of ours
    assert reply.metadata.group_id == "1"
    assert reply.metadata.message_type == records.TRAIN
    wire = records.message_to_bytes(reply)
    assert SECRET.encode() not in wire
    assert str(home).encode() not in wire


def test_the_report_is_the_same_whatever_the_rows(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    """No true size, no length, no count: two nodes with the same declaration say the same, byte for byte but for the tensors."""
    small = write_home(tmp_path / "small", tiny_rows(9, seed=1), holdout=0.0)
    large = write_home(tmp_path / "large", [{**row, "text": row["text"] * 3} for row in tiny_rows(200, seed=2)], holdout=0.0)
    replies = [ask(place, plan_of()) for place in (small, large)]
    assert report_of(replies[0]) == report_of(replies[1])
    assert len({records.payload_bytes(reply.content) for reply in replies}) == 1
    assert len({len(records.message_to_bytes(reply)) for reply in replies}) == 1
    updates = [records.get_tensors(reply.content, None) for reply in replies]
    assert any(not torch.equal(updates[0][name], updates[1][name]) for name in updates[0])


def test_a_private_evaluation_reply_holds_noised_whole_counts_only(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(evaluation={"federated_every": 1})
    reply = ask(home, plan, kind=records.EVALUATE)
    assert set(leaves(reply)) == {("report", key) for key in ("format", "client", "round", "counts", "noise_multiplier")}
    report = report_of(reply)
    # a fraction would tell which count the noise was added to
    assert all(count == int(count) for count in report["counts"])
    with Ledger(home) as ledger:
        (entry,) = ledger.entries()
    assert (entry.split, entry.segment.steps, entry.segment.sample_rate) == ("holdout", 1, 1.0)
    assert entry.segment.noise_multiplier == report["noise_multiplier"] > 0.5
    assert epsilon([entry.segment] * plan.rounds, 1e-5) <= 6.0


def test_the_counts_noise_has_its_size(home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(evaluation={"federated_every": 1})
    truth = np.array(
        report_of(ask(home, plan_of(False, evaluation={"federated_every": 1}), kind=records.EVALUATE, simulated=True))["counts"]
    )
    assert truth.sum() == len(load(home, "holdout", ("text", "label")))
    monkeypatch.setattr(client_app, "load_policy", lambda home: type("P", (), {"privacy": None})())
    noise = np.concatenate(
        [
            np.array(report_of(ask(home, plan, kind=records.EVALUATE, message_id=f"m{n}", run=n))["counts"]) - truth
            for n in range(60)  # each a run of its own
        ]
    )
    sigma = report_of(ask(home, plan, kind=records.EVALUATE, run=99))["noise_multiplier"]
    assert abs(noise.std() / math.hypot(sigma, 12**-0.5) - 1) < 4.5 / (2 * noise.size) ** 0.5
    assert abs(noise.mean()) < 4.5 * sigma / noise.size**0.5


def test_without_privacy_the_plain_fields_are_there(home: Path, plan_of: Callable[..., Plan]) -> None:
    (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n")
    plan = plan_of(False, evaluation={"federated_every": 1})
    report = report_of(ask(home, plan))
    assert report["examples"] == len(load(home, "train", ("text", "label")))
    assert 0 < report["train_loss"] < 2
    assert {"declared_size", "noise_multiplier", "sample_rate"}.isdisjoint(report)
    assert report_of(ask(home, plan, kind=records.EVALUATE))["loss_sum"] > 0
    assert not (home / "ledger.sqlite").exists()


# --- assignments ------------------------------------------------------------------------------------------------------------------


def test_fewer_steps_are_charged_as_such_with_the_noise_of_all(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(cohort={"size": 2, "assign": ["steps"]})
    report = report_of(ask(home, plan, steps=1))
    planned = planned_steps(plan, DECLARED)
    assert (report["steps"], report["noise_multiplier"]) == (1, planned.noise_multiplier)
    assert planned.steps > 1, "the noise would else be that of the fewer steps anyway"
    with Ledger(home) as ledger:
        (entry,) = ledger.entries()
    assert entry.segment == planned._replace(steps=1)


def test_more_steps_than_planned_are_not_taken(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(cohort={"size": 2, "assign": ["steps"]})
    assert report_of(ask(home, plan, steps=10**6))["steps"] == planned_steps(plan, DECLARED).steps


def test_fewer_steps_without_privacy(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(False, cohort={"size": 2, "assign": ["steps"]})
    usual, fewer = (report_of(ask(home, plan, simulated=True, **given)) for given in ({}, {"steps": 1}))
    assert (usual["steps"], fewer["steps"]) == (plan.local.steps, 1)


@pytest.mark.parametrize("private", [False, True])
def test_fewer_rows_at_once_give_the_same_update_but_for_rounding(home: Path, plan_of: Callable[..., Plan], private: bool) -> None:
    updates = [
        records.get_tensors(ask(home, plan_of(private), simulated=True, **given).content, None)
        for given in ({}, {"max_physical_batch_size": 1})
    ]
    for name, tensor in updates[0].items():
        # not value by value: AdamW makes much of a gradient that is nearly zero
        assert float((updates[1][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


def test_an_assignment_that_the_plan_does_not_permit_is_refused_before_it_is_charged(home: Path, plan_of: Callable[..., Plan]) -> None:
    bare_number(ask(home, plan_of(), steps=1), Code.POLICY_REFUSED)
    assert not (home / "ledger.sqlite").exists()


# --- getting ready, the probe, and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_who_gets_ready_has_model_and_rows_for_the_first_round_and_tells_nothing(
    home: Path, plan_of: Callable[..., Plan], private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n")
    assert not [*leaves(ask(home, plan_of(private), kind=records.PREPARE))]
    for name in ("load", "make_task"):
        monkeypatch.setattr(client_app if name == "load" else tasks, name, None)
    assert report_of(ask(home, plan_of(private)))["round"] == 1, "nothing is read or built again"
    if private:
        with Ledger(home) as ledger:
            assert [entry.run for entry in ledger.entries()] == ["7"], "the training alone was charged"


def test_who_can_not_get_ready_says_why_by_its_number(tmp_path: Path, home: Path, plan_of: Callable[..., Plan]) -> None:
    (tmp_path / "empty").mkdir()
    bare_number(ask(tmp_path / "empty", plan_of(), kind=records.PREPARE), Code.DATA_NOT_FOUND)
    (home / "policy.yaml").write_text("privacy: {max_epsilon: .1}\n")
    bare_number(ask(home, plan_of(), kind=records.PREPARE), Code.POLICY_REFUSED)


@pytest.mark.parametrize("private", [False, True])
def test_the_probe_tells_a_rounded_speed_and_reads_no_row(tmp_path: Path, plan_of: Callable[..., Plan], private: bool) -> None:
    (tmp_path / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n")  # a home without data
    reply = ask(tmp_path, plan_of(private), kind=records.PROBE)
    assert set(leaves(reply)) == {("report", "format"), ("report", "tokens_per_s")}
    assert report_of(reply)["tokens_per_s"] == rounded(report_of(reply)["tokens_per_s"])
    assert not (tmp_path / "ledger.sqlite").exists(), "nothing is charged"


def test_an_owner_can_keep_the_speed_in(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    (tmp_path / "policy.yaml").write_text("profile: false\n")
    bare_number(ask(tmp_path, plan_of(), kind=records.PROBE), Code.POLICY_REFUSED)


@pytest.mark.parametrize(
    ("config", "rows", "kept"),
    [({"retried": True}, 4, True), ({"retried": True}, 1, False), ({}, 4, False)],
    ids=["half", "least", "flower"],
)
def test_want_of_memory_keeps_the_reservation_where_it_is_begun_again(
    home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], rows: int, kept: bool
) -> None:
    """A number that leaves tells of the noised steps before it; one that the agent takes and asks anew does not leave."""
    plan = plan_of(cohort={"size": 2}, local={"steps": 4, "batch_size": 8, "max_physical_batch_size": rows, "learning_rate": 0.01})
    trainer = client_app.trainer_of(plan)
    taken = []

    def takes_too_much(*given: Any, **named: Any) -> Any:
        taken.append(given)
        if len(taken) == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer._private, "take", takes_too_much)
    bare_number(ask(home, plan, config=config), Code.WORKER_FAILED)
    assert len(taken) == 2, "a step was taken before"
    with Ledger(home) as ledger:
        (entry,) = ledger.entries()
    assert (entry.released_at is None) == kept
    monkeypatch.undo()
    assert not ask(home, plan, config=config).has_error()
    with Ledger(home) as ledger:
        assert len([*ledger.entries()]) == (1 if kept else 2)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "no"), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_want_of_memory_is_known_by_its_errors(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), OSError(2, "no such file"), LichenError(Code.INTERNAL, "x"))))


# --- failures ---------------------------------------------------------------------------------------------------------------------


def bare_number(reply: Message, code: Code) -> None:
    assert reply.has_error()
    assert set(leaves(reply)) == {("error", "code")}
    assert Code(reply.error.code) is code
    assert reply.error.reason in {None, ""}
    assert not reply.has_content()
    wire = records.message_to_bytes(reply)
    for text in (SECRET, "rows.jsonl", "ledger", "plague", "label", "float", "nan", "size"):
        assert text.encode() not in wire, text


def open_quote(home: Path, rows: list[dict[str, Any]]) -> None:
    """A row that takes the rest of its file with it: then the file is at fault."""
    write_home(home, rows)
    (home / "rows.jsonl").unlink()
    (home / "rows.csv").write_text('text,label\n"wheat,crop\n' + "corn,crop\n" * 9)
    manifest = home / "data.yaml"
    manifest.write_text(manifest.read_text().replace("rows.jsonl", "rows.csv"))


def missing_file(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows)
    (home / "rows.jsonl").unlink()


def no_data(home: Path, rows: list[dict[str, Any]]) -> None:
    home.mkdir()


def no_declared_size(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows, declared=None)


def too_large_for_delta(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows, declared=10**6)


def damaged_ledger(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows)
    (home / "ledger.sqlite").write_bytes(SECRET.encode() * 100)


def strict_policy(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows)
    (home / "policy.yaml").write_text("privacy: {max_epsilon: 0.5}\n")


def broken_policy(home: Path, rows: list[dict[str, Any]]) -> None:
    write_home(home, rows)
    (home / "policy.yaml").write_text(f"{SECRET}: 1\n")


@pytest.mark.parametrize(
    ("provoke", "code"),
    [
        (open_quote, Code.DATA_FORMAT),
        (missing_file, Code.DATA_NOT_FOUND),
        (no_data, Code.DATA_NOT_FOUND),
        (no_declared_size, Code.DATA_DECLARED_SIZE),
        (too_large_for_delta, Code.PLAN_UNSOUND),
        (damaged_ledger, Code.PRIVACY_HISTORY),
        (strict_policy, Code.POLICY_REFUSED),
        (broken_policy, Code.POLICY_INVALID),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_failures_leave_a_number_and_nothing_else(
    tmp_path: Path,
    tiny_rows: Rows,
    plan_of: Callable[..., Plan],
    caplog: pytest.LogCaptureFixture,
    provoke: Callable[..., None],
    code: Code,
) -> None:
    provoke(tmp_path / "node", tiny_rows(30))
    with caplog.at_level(logging.ERROR):
        bare_number(ask(tmp_path / "node", plan_of()), code)
    assert f"error {int(code)}" in caplog.text, "the owner reads the reason in the log"


BAD_ROWS = {
    "another label": json.dumps({"text": SECRET, "label": "plague"}),
    "no label": json.dumps({"text": SECRET}),
    "null": json.dumps({"text": None, "label": "crop"}),
    "empty": json.dumps({"text": "  ", "label": "crop"}),
    "a list": json.dumps({"text": [SECRET], "label": "crop"}),
    "no object": json.dumps([SECRET]),
    "no JSON": f'{{"text": "{SECRET}',
    "bytes": b'{"text": "\xff", "label": "crop"}'.decode("latin-1"),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("unit", ["example", "entity"])
def test_a_row_that_cannot_be_used_changes_nothing_that_leaves(
    tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture, bad: str, unit: str
) -> None:
    """Bit for bit, with the noise that a simulation repeats; wherever the row stands, first too, which else decides on types."""
    rows = [row | {"who": f"p{index % 9}"} for index, row in enumerate(tiny_rows(30))]
    home = write_home(tmp_path / "node", rows, fields={"text": "text", "label": "label", "who": "who"})
    plan = plan_of(privacy={"unit": unit} | ({"unit_field": "who"} if unit == "entity" else {}))
    expected = told(ask(home, plan, simulated=True))
    lines = (home / "rows.jsonl").read_bytes().splitlines()
    for place in (0, 15, 30):
        (home / "rows.jsonl").write_bytes(b"\n".join([*lines[:place], bad.encode("latin-1"), *lines[place:]]))
        with caplog.at_level(logging.WARNING):
            assert told(ask(home, plan, simulated=True)) == expected
        assert "1 rows can't be used" in caplog.text, "the owner is told"
        assert SECRET not in caplog.text
        caplog.clear()


def told(reply: Message) -> tuple[dict[str, Any], bytes]:
    """All that a reply says: its report and the update's bytes."""
    return report_of(reply), reply.content.array_records["payload"]["payload"].data


@pytest.mark.parametrize("text", ["", "\n\n", json.dumps({"text": SECRET, "label": "plague"})])
def test_no_row_that_can_be_used_is_no_error_either(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], text: str) -> None:
    """Else the only row of a node would show. What leaves is noise."""
    home = write_home(tmp_path / "node", tiny_rows(30))
    usual = records.message_to_bytes(ask(home, plan_of()))
    (home / "rows.jsonl").write_text(text)
    reply = ask(home, plan_of(), message_id="another")
    assert report_of(reply)["steps"] == 4
    assert abs(len(records.message_to_bytes(reply)) - len(usual)) < 16, "ids of other lengths"


def test_numbers_are_text_whatever_type_other_rows_have(tmp_path: Path, tiny_plan: dict[str, Any], tiny_rows: Rows) -> None:
    """A first row with a number would else make bad rows of all others."""
    plan = parse_plan({**tiny_plan, "task": {"labels": ["1", "2", "crop"], "max_length": 32}, "privacy": PRIVACY})
    home = write_home(tmp_path / "node", tiny_rows(30))
    (home / "rows.jsonl").write_text("\n".join(json.dumps({"text": "wheat", "label": label}) for label in (1, "2", 2, "crop", 1.5)))
    labels = [label for split in ("train", "holdout") for label in load(home, split, ("text", "label"), lenient=True).column("label")]
    assert sorted(labels) == ["1", "1.5", "2", "2", "crop"]
    assert [label for label in labels if workbench(plan).task.fault({"label": label})] == ["1.5"]


def test_without_privacy_a_bad_row_is_an_error_with_a_text(home: Path, plan_of: Callable[..., Plan]) -> None:
    (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n")
    with (home / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": None, "label": "crop"}) + "\n")
    reply = ask(home, plan_of(private=False))
    assert (reply.error.code, bool(reply.error.reason)) == (Code.DATA_ROW, True)


def test_an_unexpected_exception_leaves_a_number_too(home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(client_app, "load", explode)
    bare_number(ask(home, plan_of()), Code.INTERNAL)


def test_values_that_are_not_finite(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(local={"steps": 2, "batch_size": 8, "learning_rate": 3e38, "betas": [0.0, 0.9]})
    bare_number(ask(home, plan), Code.MODEL_NOT_TRAINED)


def test_a_failure_after_noised_steps_was_a_release(home: Path, plan_of: Callable[..., Plan]) -> None:
    """Whether training diverged is told by its number: asking for it again and again must not be free."""
    plan = plan_of(local={"steps": 2, "batch_size": 8, "learning_rate": 3e38, "betas": [0.0, 0.9]})
    for times in (1, 2):
        bare_number(ask(home, plan, message_id="same"), Code.MODEL_NOT_TRAINED)
        with Ledger(home) as ledger:
            assert len(ledger.entries()) == times
    bare_number(ask(home, plan, message_id="same"), Code.PRIVACY_BUDGET)  # σ was found for two rounds


def test_a_plan_of_an_older_coordinator_is_carried_out_if_its_text_has_the_digest(
    home: Path, plan_of: Callable[..., Plan], older_text: Callable[[Plan], str]
) -> None:
    plan, other = plan_of(), plan_of(rounds=3)
    text = older_text(plan)
    (home / "policy.yaml").write_text("approval: ask\n")
    bare_number(ask(home, plan, text=text), Code.POLICY_APPROVAL)
    approve(home, digest_of(text))
    report_of(ask(home, plan, text=text))
    bare_number(ask(home, plan, text=older_text(other), digest=digest_of(text), round=2), Code.POLICY_REFUSED)
    bare_number(ask(home, plan, text=text, digest=plan.sha256(), round=2), Code.POLICY_REFUSED)


def test_messages_that_are_none(home: Path, plan_of: Callable[..., Plan]) -> None:
    def send(content: RecordDict, kind: str = records.TRAIN) -> Message:
        message = records.build_message(content, run_id=7, message_id="m", src_node_id=1, dst_node_id=2, message_type=kind, group_id="1")
        context = Context(
            run_id=7, node_id=2, node_config={"home": str(home), "name": "clinic-a"}, state=RecordDict(), run_config={"simulated": True}
        )
        return app(message, context)  # type: ignore[no-any-return]

    plan = plan_of()
    assignment = {"format": 1, "plan": plan.canonical_json(), "plan_sha256": plan.sha256(), "round": 1}
    bare_number(send(RecordDict()), Code.INTERNAL)
    for change, code in (
        ({"plan": "{"}, Code.PLAN_UNREADABLE),
        ({"plan": "{}"}, Code.PLAN_INVALID),
        ({"round": "1"}, Code.FRAME_INVALID),
        ({"format": 9}, Code.FRAME_INVALID),
    ):
        from flwr.app import ConfigRecord

        bare_number(send(RecordDict({"assignment": ConfigRecord({**assignment, **change})})), code)
        bare_number(send(RecordDict({"assignment": ConfigRecord({**assignment, **change})}), records.EVALUATE), code)
    bare_number(send(RecordDict({"assignment": ConfigRecord(assignment)})), Code.FRAME_INVALID)  # no tensors
    content = RecordDict({"assignment": ConfigRecord(assignment)})
    records.put_tensors(content, {name: tensor * math.nan for name, tensor in workbench(plan).start.items()}, None)
    bare_number(send(content), Code.STATE_MISMATCH)
    with Ledger(home) as ledger:
        assert ledger.entries() == []


def test_a_refused_plan_tells_its_reason_only_where_it_is_not_private(home: Path, plan_of: Callable[..., Plan]) -> None:
    refused = ask(home, plan_of(False))
    assert refused.error.code == Code.POLICY_REFUSED  # nothing un-noised leaves by default
    assert "unnoised_updates_to_coordinator" in refused.error.reason


# --- accounting -------------------------------------------------------------------------------------------------------------------


def test_rounds_are_paid_and_the_budget_ends(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    for round in (1, 2):
        report_of(ask(home, plan, round))
    with Ledger(home) as ledger:
        assert [entry.segment.steps for entry in ledger.entries()] == [4, 4]
        spent = ledger.spent(1, LIFE)
    assert spent.bound == "pld"
    assert 5.9 < spent.epsilon <= 6.0
    bare_number(ask(home, plan, 3), Code.FRAME_INVALID)
    bare_number(ask(home, plan, 2, message_id="again"), Code.PRIVACY_BUDGET)
    # runs of other names have the life's budget against them, 8 by default: they pay by more noise
    noises = []
    while not (reply := ask(home, plan, 1, run=8 + len(noises))).has_error():
        noises.append(report_of(reply)["noise_multiplier"])
    bare_number(reply, Code.PRIVACY_BUDGET)
    assert noises
    assert min(noises) > planned_steps(plan, DECLARED).noise_multiplier
    with Ledger(home) as ledger:
        spent = ledger.spent(1, LIFE)
    assert spent.bound == "rdp-filter"
    assert 6.5 < spent.epsilon <= 8.0


def test_another_plan_under_the_same_message_id_pays(home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose training was cut short; then the same id with a plan of less noise."""
    monkeypatch.setattr(Ledger, "released", lambda *_, **__: None)
    report_of(ask(home, plan_of(privacy={"epsilon": 0.5}), message_id="same"))
    weak = report_of(ask(home, plan_of(privacy={"epsilon": 8.0}), message_id="same"))
    with Ledger(home) as ledger:
        assert [entry.segment.noise_multiplier for entry in ledger.entries()][1:] == [weak["noise_multiplier"]]
        assert ledger.spent(1, LIFE).epsilon <= 8.0


def test_noise_is_fresh_in_earnest_and_repeats_in_a_simulation(home: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    earnest = [records.get_tensors(ask(home, plan, message_id=f"m{n}").content, None) for n in (1, 2)]
    assert all(not torch.equal(earnest[0][name], earnest[1][name]) for name in earnest[0])
    simulated = [records.get_tensors(ask(home, plan, simulated=True, run=n).content, None) for n in (11, 12)]
    assert all(torch.equal(simulated[0][name], simulated[1][name]) for name in simulated[0])


def test_only_the_node_can_say_that_it_is_simulated(home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    original = client_app._source

    def watch(node: Any, *key: object) -> Any:
        source = original(node, *key)
        used.append(source.secret)
        return source

    monkeypatch.setattr(client_app, "_source", watch)
    report_of(ask(home, plan_of()))
    report_of(ask(home, plan_of(), simulated=True, run=8))
    assert used == [True, False]


# --- units and hold-outs -----------------------------------------------------------------------------------------------------------


def with_patients(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "who": f"p{number % 7}"} for number, row in enumerate(rows)]


def test_entities_are_units(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_home(
        tmp_path / "node", with_patients(tiny_rows(40)), fields={"text": "text", "label": "label", "patient": "who"}, holdout=0.0
    )
    plan = plan_of(privacy={"unit": "entity", "unit_field": "patient"})
    rows = client_app._rows(client_app.Node(context_of(home)), plan, "train", client_app.trainer_of(plan), 1, "1")
    owners = load(home, "train", ("patient",)).column("patient")
    assert len(rows.units) == 7
    assert sorted(row for unit in rows.units for row in unit) == list(range(40))
    assert all(len({owners[row] for row in unit}) == 1 for unit in rows.units)
    report_of(ask(home, plan))
    with Ledger(home) as ledger:
        assert [entry.unit for entry in ledger.entries()] == ["entity:patient"]
    # rows' ε can't be added to patients' ε
    bare_number(ask(home, plan_of(), run=8), Code.PRIVACY_BUDGET)


def context_of(home: Path) -> Context:
    return Context(run_id=1, node_id=2, node_config={"home": str(home), "name": "a"}, state=RecordDict(), run_config={})


def test_a_number_of_held_out_rows_would_couple_rows(tmp_path: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    fields = {"text": "text", "label": "label", "patient": "who"}
    home = write_home(tmp_path / "node", with_patients(tiny_rows(40)), fields=fields, holdout=10)
    bare_number(ask(home, plan_of(evaluation={"federated_every": 1}), kind=records.EVALUATE), Code.DATA_FIELD)
    bare_number(ask(home, plan_of(privacy={"unit": "entity", "unit_field": "patient"})), Code.DATA_FIELD)
    report_of(ask(home, plan_of()))  # one row more is still one training row more
    with Ledger(home) as ledger:
        assert [entry.split for entry in ledger.entries()] == ["train"]


def test_an_evaluation_that_the_plan_does_not_name_is_refused(home: Path, plan_of: Callable[..., Plan]) -> None:
    """The policy has judged the plan, not the message."""
    (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\nevaluation: false\n")
    for private in (True, False):
        reply = ask(home, plan_of(private), kind=records.EVALUATE)
        assert reply.error.code == Code.FRAME_INVALID
    every_second = plan_of(evaluation={"federated_every": 2})
    assert ask(home, every_second, kind=records.EVALUATE).error.code == Code.POLICY_REFUSED
    (home / "policy.yaml").unlink()
    bare_number(ask(home, every_second, 1, kind=records.EVALUATE), Code.FRAME_INVALID)
    report_of(ask(home, every_second, 2, kind=records.EVALUATE))


def test_rows_are_read_again_when_they_change(home: Path, tiny_rows: Rows, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(False)
    first = report_of(ask(home, plan, simulated=True))["examples"]
    assert report_of(ask(home, plan, simulated=True))["examples"] == first
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tiny_rows(120)) + "\n")
    assert report_of(ask(home, plan, simulated=True))["examples"] > first


def test_a_model_that_fails_its_check_fails_it_again(home: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.client import private_step

    def fail(*_: Any) -> None:
        raise LichenError(Code.PRIVACY_SELF_CHECK, SECRET)

    tasks.workbench.cache_clear()
    client_app.trainer_of.cache_clear()
    plan = plan_of(seed=5)
    monkeypatch.setattr(private_step, "self_check", fail)
    for _ in range(2):
        bare_number(ask(home, plan), Code.PRIVACY_SELF_CHECK)
    monkeypatch.undo()
    report_of(ask(home, plan))
    with Ledger(home) as ledger:
        assert len(ledger.entries()) == 1
