"""The round over a real grid in one process: honest, hostile and late clients, what the result tells, and what follows a crash."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.schedule import planned_evaluation, planned_steps
from lichen.common.result import Metrics, Result, read_result, schema
from lichen.coordinator.app import OwnData
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.engine import InProcessGrid
from scripted_clients import (
    DECLARED,
    PRIVATE,
    SIZES,
    Answer,
    Federation,
    answer,
    close,
    expected,
    failing,
    honest,
    plan_from,
    report_of,
    update_of,
)

QUOTE = "patient Jane Doe has"

# --- clients that do as they like ---


def reporting(**changes: Any) -> Answer:
    """Honest but for some fields of the report; None leaves a field out."""

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        report = report_of(plan, assignment, name) | changes
        update = update_of(records.get_tensors(message.content, None), name, assignment.round)
        return answer(message, {key: value for key, value in report.items() if value is not None}, update)

    return act


def updating(change: Callable[[State], State]) -> Answer:
    """Honest but for the update."""

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        update = change(update_of(records.get_tensors(message.content, None), name, assignment.round))
        return answer(message, report_of(plan, assignment, name), update)

    return act


def sending(array: Array | None) -> Answer:
    """Honest but for the payload as it lies in the message."""

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        content = RecordDict({"report": ConfigRecord(report_of(plan, assignment, name))})
        if array is not None:
            content["payload"] = ArrayRecord({"payload": array})
        return records.reply(message, content)

    return act


def evaluating(**changes: Any) -> Answer:
    """Honest in training; these fields in the evaluation's report, None to leave one out."""

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        found = honest(plan, assignment, message, name)
        if message.metadata.message_type == records.TRAIN:
            return found
        report = dict(found.content.config_records["report"]) | changes
        return answer(message, {key: value for key, value in report.items() if value is not None}, None)

    return act


def raw(data: bytes, length: int | None = None, stype: str = records.INLINE, dtype: str = "uint8") -> Array:
    return Array(dtype=dtype, shape=(len(data) if length is None else length,), stype=stype, data=data)


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def in_turn(actors: Iterable[Answer]) -> Answer:
    """Each round as another."""
    listed = list(actors)
    return lambda plan, assignment, message, name: listed[assignment.round - 1](plan, assignment, message, name)


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    return lambda **changes: plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 0.3}, changes)


# --- honest clients ---


def test_rounds_of_honest_clients_give_the_weighted_mean_and_a_whole_result(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=3)
    federation = Federation(tmp_path, plan)
    result = federation.run()
    close(federation.model(), expected(plan, 3, SIZES))
    assert (result.status, result.error, result.engine, result.seed, result.plan_sha256) == (
        "finished",
        None,
        "inprocess",
        1,
        plan.sha256(),
    )
    assert [(told.round, told.participants, told.failed, told.errors) for told in result.rounds] == [(n, 3, 0, {}) for n in (1, 2, 3)]
    assert [told.train_loss for told in result.rounds] == [0.5] * 3
    assert result.parameters == sum(tensor.numel() for tensor in federation.model().values())
    assert federation.asked == [("train", n, name) for n in (1, 2, 3) for name in SIZES]

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    document = json.loads((tmp_path / "result.json").read_text())
    assert lines == document["rounds"]
    for name in ("plan.yaml", "report.html", "model/adapter_config.json", "model/adapter_model.safetensors", "checkpoints"):
        assert (tmp_path / name).exists(), name

    # the contract's keys are all there, and what does not apply is null
    keys = "format run_id status plan_sha256 engine seed versions seconds rounds final privacy transfer continual"
    assert set(keys.split()) <= document.keys()
    of_round = "round participants failed train_loss validation uplink_bytes downlink_bytes seconds"
    assert set(of_round.split()) <= lines[0].keys()
    assert {"unit", "adjacency", "delta", "max_epsilon", "clients"} <= document["privacy"].keys()
    assert document["transfer"].keys() == {"uplink_bytes", "downlink_bytes", "bits_per_parameter", "ratio_to_fp32"}
    assert (document["final"], document["continual"], lines[0]["validation"]) == (None, None, None)
    statement = document["privacy"].pop("statement")
    assert (statement["private"], statement["clients"]) == (False, {})
    assert statement["summary"].startswith("No differential privacy")
    assert document["privacy"] == {
        "unit": "none",
        "adjacency": None,
        "delta": None,
        "max_epsilon": None,
        "noise": None,
        "clients": {},
        "central": None,
    }

    up, down = (sum(line[key] for line in lines) for key in ("uplink_bytes", "downlink_bytes"))
    assert (result.transfer.uplink_bytes, result.transfer.downlink_bytes) == (up, down)
    assert result.transfer.bits_per_parameter == pytest.approx(8 * up / (9 * (result.parameters or 0)))
    assert result.transfer.ratio_to_fp32 == pytest.approx((result.transfer.bits_per_parameter or 0) / 32)


def test_the_schema_describes_the_result_and_nothing_else_fits(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    Federation(tmp_path, plan_of()).run()
    document, described = json.loads((tmp_path / "result.json").read_text()), json.loads(schema())

    def check(value: Any, rule: dict[str, Any], where: str) -> None:
        if "$ref" in rule:
            rule = described["$defs"][rule["$ref"].rsplit("/", 1)[1]]
        if "anyOf" in rule:
            rule = next(option for option in rule["anyOf"] if (option.get("type") == "null") == (value is None))
            return check(value, rule, where)
        if rule.get("type") == "object" and "properties" in rule:
            assert value.keys() <= rule["properties"].keys(), where
            assert set(rule.get("required", ())) <= value.keys(), where
            for key, inner in value.items():
                check(inner, rule["properties"][key], f"{where}.{key}")
        if "enum" in rule:
            assert value in rule["enum"], where
        if rule.get("type") == "array":
            for index, inner in enumerate(value):
                check(inner, rule["items"], f"{where}[{index}]")
        return None

    assert described["additionalProperties"] is False
    check(document, described, "result")


def test_private_rounds_tell_each_clients_epsilon_and_no_loss(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2, privacy=PRIVATE)
    result = Federation(tmp_path, plan).run()
    segment = planned_steps(plan, DECLARED)
    spent = [epsilon([segment] * n, plan.privacy.delta) for n in (1, 2)]
    assert [told.train_loss for told in result.rounds] == [None, None]
    assert [told.epsilon for told in result.rounds] == pytest.approx(spent)
    assert result.privacy.clients.keys() == SIZES.keys()
    for client in result.privacy.clients.values():
        assert (client.epsilon, client.epsilon_sum, client.segments) == (spent[1], spent[1], {"train": spent[1]})
        assert (client.steps, client.noise_multiplier, client.sample_rate) == (2 * segment.steps, segment.noise_multiplier, 0.25)
    assert (result.privacy.unit, result.privacy.adjacency, result.privacy.delta) == ("example", "add/remove", 1e-3)
    assert result.privacy.max_epsilon == spent[1] <= plan.privacy.epsilon
    assert result.privacy.noise == "seeded: not private"


def test_under_privacy_weights_are_the_declared_sizes(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(privacy=PRIVATE)
    federation = Federation(tmp_path, plan, {"client-0": reporting(examples=10**6, train_loss=1.0)})  # it tells more than it may
    result = federation.run()
    close(federation.model(), expected(plan, 1, SIZES))
    assert result.rounds[0].train_loss is None


# --- clients whose budget ends ---


def test_who_has_nothing_left_is_not_asked_again_and_the_run_goes_on(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=4, privacy=PRIVATE, cohort={"size": 3, "minimum": 2, "deadline_s": 30})
    spent = in_turn([honest, failing(Code.PRIVACY_BUDGET), honest, honest])
    federation = Federation(tmp_path, plan, {"client-1": spent})
    began = time.monotonic()
    result = federation.run()
    assert time.monotonic() - began < 30  # nobody waits for a third node, which is there
    assert [(told.participants, told.failed) for told in result.rounds] == [(3, 0), (2, 1), (2, 0), (2, 0)]
    assert [round for _, round, name in federation.asked if name == "client-1"] == [1, 2]
    assert result.privacy.clients["client-1"].steps == planned_steps(plan, DECLARED).steps


def test_who_has_nothing_left_is_known_after_a_crash(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=3, privacy=PRIVATE)

    def killed(*_: Any) -> Message:
        raise KeyboardInterrupt

    actors = {"client-1": in_turn([failing(Code.PRIVACY_BUDGET), honest, honest]), "client-0": in_turn([honest, killed, honest])}
    with pytest.raises(KeyboardInterrupt):
        Federation(tmp_path, plan, actors).run()
    again = Federation(tmp_path, plan)
    assert [told.participants for told in again.run().rounds] == [2, 2, 2]
    assert {name for _, _, name in again.asked} == {"client-0", "client-2"}


def test_the_minimum_holds_when_budgets_end(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    ends = in_turn([failing(Code.PRIVACY_BUDGET)])
    federation = Federation(tmp_path, plan_of(rounds=2, privacy=PRIVATE, cohort={"minimum": 1}), {"client-0": ends, "client-1": ends})
    assert federation.run().rounds[1].participants == 1
    every = Federation(tmp_path / "all", plan_of(rounds=2, privacy=PRIVATE, cohort={"minimum": 2}), {"client-0": ends, "client-1": ends})
    every.fails(Code.COHORT_TOO_SMALL)


def test_a_hold_out_without_budget_does_not_end_the_training(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        evaluates = message.metadata.message_type == records.EVALUATE
        return (failing(Code.PRIVACY_BUDGET) if evaluates else honest)(plan, assignment, message, name)

    federation = Federation(tmp_path, plan_of(rounds=2, privacy=PRIVATE, evaluation={"federated_every": 1}), {"client-2": act})
    assert [told.participants for told in federation.run().rounds] == [3, 3]
    assert [(kind, round) for kind, round, name in federation.asked if name == "client-2"] == [("train", 1), ("evaluate", 1), ("train", 2)]


@pytest.mark.parametrize(("noise", "steps", "used"), [(2.0, 0, 3), (1.0, -1, 3), (3.9, -1, 3), (0.98, 0, 2), (1.0, 1, 2), (4.2, 0, 2)])
def test_more_noise_or_fewer_steps_are_as_good_as_the_plan(
    tmp_path: Path, plan_of: Callable[..., Plan], noise: float, steps: int, used: int
) -> None:
    plan = plan_of(privacy=PRIVATE)
    planned = planned_steps(plan, DECLARED)
    told = {"noise_multiplier": noise * planned.noise_multiplier, "steps": planned.steps + steps}
    result = Federation(tmp_path, plan, {"client-0": reporting(**told)}).run()
    assert result.rounds[0].participants == used
    if used == 3:
        own = epsilon([Segment(told["noise_multiplier"], planned.sample_rate, told["steps"])], plan.privacy.delta)
        assert result.privacy.clients["client-0"].epsilon == own < result.privacy.max_epsilon


# --- hostile clients ---

WRONG = next(iter(SIZES))
FLOATS = '{"a":{"dtype":"%s","shape":[2],"data_offsets":[0,%d]}}'
HOSTILE: dict[str, tuple[Answer, Code]] = {
    "a name more": (updating(lambda update: update | {"backdoor": torch.ones(1)}), Code.STATE_MISMATCH),
    "a name less": (updating(lambda update: dict(list(update.items())[1:])), Code.STATE_MISMATCH),
    "no tensors": (updating(lambda update: {}), Code.STATE_MISMATCH),
    "shapes": (updating(lambda update: {name: tensor.reshape(1, *tensor.shape) for name, tensor in update.items()}), Code.STATE_MISMATCH),
    "64 bits": (updating(lambda update: {name: tensor.double() for name, tensor in update.items()}), Code.STATE_MISMATCH),
    "NaN": (updating(lambda update: {name: tensor * float("nan") for name, tensor in update.items()}), Code.STATE_MISMATCH),
    "infinity": (updating(lambda update: {name: tensor / 0 for name, tensor in update.items()}), Code.STATE_MISMATCH),
    "no payload": (sending(None), Code.FRAME_INVALID),
    "an empty payload": (sending(raw(b"")), Code.PAYLOAD_CORRUPT),
    "garbage": (sending(raw(b"\x80\x04garbage" * 9)), Code.PAYLOAD_CORRUPT),
    "a header longer than the file": (sending(raw(b"\xff" * 8 + b"{}")), Code.PAYLOAD_CORRUPT),
    "a length that lies": (sending(raw(b"1234", length=2**40)), Code.PAYLOAD_CORRUPT),
    "a type that torch has not": (sending(raw(header(FLOATS % ("F4", 1), b"\0"))), Code.PAYLOAD_CORRUPT),
    "a type that nobody has": (sending(raw(header(FLOATS % ("F7", 8), b"\0" * 8))), Code.PAYLOAD_CORRUPT),
    "a reference to a spool that is not": (sending(raw(b"\0" * 40, stype=records.BY_REFERENCE)), Code.FRAME_INVALID),
    "another kind of payload": (sending(raw(b"cos\nsystem\n", stype="pickle")), Code.FRAME_INVALID),
    "floats for bytes": (sending(raw(b"1234", length=1, dtype="float32")), Code.FRAME_INVALID),
    "another's name": (reporting(client="client-1"), Code.FRAME_INVALID),
    "a name of nobody": (reporting(client="\x1b[31mroot\n"), Code.FRAME_INVALID),
    "no name": (reporting(client=None), Code.FRAME_INVALID),
    "another round": (reporting(round=2), Code.FRAME_INVALID),
    "an unknown field": (reporting(address="Main Street 1"), Code.FRAME_INVALID),
    "a newer format": (reporting(format=2), Code.FRAME_INVALID),
    "text for steps": (reporting(steps="four"), Code.FRAME_INVALID),
    "no weight": (reporting(examples=None), Code.FRAME_INVALID),
    "weight 0": (reporting(examples=0), Code.FRAME_INVALID),
    "negative weight": (reporting(examples=-(10**6)), Code.FRAME_INVALID),
    "huge weight": (reporting(examples=2**62), Code.FRAME_INVALID),
    "weight by a float": (reporting(examples=1e300), Code.FRAME_INVALID),
    "a declared size for a weight": (reporting(examples=None, declared_size=10), Code.FRAME_INVALID),
    "no report": (lambda plan, assignment, message, name: records.reply(message, RecordDict()), Code.FRAME_INVALID),
    "an error": (failing(int(Code.DATA_LABEL), "label 7 is none"), Code.DATA_LABEL),
    "an error that nobody knows": (failing(2**31 - 1), Code.INTERNAL),
    "a negative error": (failing(-5), Code.INTERNAL),
    "error 0": (failing(0), Code.INTERNAL),
}


def test_a_hostile_reply_is_that_clients_failure_and_moves_nothing(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=len(HOSTILE))
    federation = Federation(tmp_path, plan, {WRONG: in_turn(act for act, _ in HOSTILE.values())})
    result = federation.run()
    found = {what: told.errors for what, told in zip(HOSTILE, result.rounds, strict=True)}
    assert found == {what: {WRONG: int(code)} for what, (_, code) in HOSTILE.items()}
    assert {(told.participants, told.failed) for told in result.rounds} == {(2, 1)}
    assert result.status == "finished"
    close(federation.model(), expected(plan, len(HOSTILE), SIZES.keys() - {WRONG}))


def test_the_sum_without_a_refused_update_is_the_same_to_the_bit(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def one_infinity(update: State) -> State:
        update[sorted(update)[-1]].view(-1)[-1] = float("inf")
        return update

    refused = Federation(tmp_path / "refused", plan_of(), {"client-1": updating(one_infinity)})
    absent = Federation(tmp_path / "absent", plan_of(), {"client-1": failing(int(Code.DATA_LABEL))})
    told, other = (federation.run().rounds[0] for federation in (refused, absent))
    assert told.errors == {"client-1": int(Code.STATE_MISMATCH)}
    assert (told.participants, told.failed, told.uplink_bytes, told.train_loss) == (2, 1, other.uplink_bytes, other.train_loss)
    left, right = refused.model(), absent.model()
    assert all(torch.equal(left[name], right[name]) for name in left)


NOT_THE_PLANS: list[dict[str, Any]] = [
    {"noise_multiplier": None},
    {"noise_multiplier": 0.0},
    {"noise_multiplier": 1e-3},
    {"noise_multiplier": float("nan")},
    {"noise_multiplier": -1.0},
    {"noise_multiplier": 1e300},
    {"sample_rate": None},
    {"sample_rate": 5.0},
    {"sample_rate": -0.25},
    {"sample_rate": 1e-9},
    {"steps": 0},
    {"steps": -4},
    {"steps": 10**15},
    {"declared_size": None},
    {"declared_size": 0},
    {"declared_size": -32},
    {"declared_size": 2**62},
]


def test_a_private_report_that_is_not_the_plans_is_refused(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=len(NOT_THE_PLANS), privacy=PRIVATE)
    federation = Federation(tmp_path, plan, {WRONG: in_turn(reporting(**changes) for changes in NOT_THE_PLANS)})
    result = federation.run()
    found = [(str(changes), told.errors) for changes, told in zip(NOT_THE_PLANS, result.rounds, strict=True)]
    assert found == [(str(changes), {WRONG: int(Code.FRAME_INVALID)}) for changes in NOT_THE_PLANS]
    assert result.privacy.clients.keys() == SIZES.keys() - {WRONG}
    assert result.privacy.max_epsilon is not None
    assert 0.9 * plan.privacy.epsilon < result.privacy.max_epsilon <= plan.privacy.epsilon
    close(federation.model(), expected(plan, plan.rounds, SIZES.keys() - {WRONG}))


def test_fewer_steps_than_planned_are_what_a_budget_near_its_end_grants(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = Federation(tmp_path, plan_of(privacy=PRIVATE), {WRONG: reporting(steps=1)}).run()
    assert result.rounds[0].participants == 3
    assert result.privacy.clients[WRONG].steps == 1


def test_an_update_that_left_its_node_is_paid_for_even_if_it_was_useless(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(privacy=PRIVATE)
    result = Federation(tmp_path, plan, {WRONG: updating(lambda update: {})}).run()
    assert result.rounds[0].errors == {WRONG: int(Code.STATE_MISMATCH)}
    assert result.privacy.clients[WRONG].epsilon == epsilon([planned_steps(plan, DECLARED)], 1e-3)


def test_under_privacy_no_text_of_an_error_is_kept(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    federation = Federation(tmp_path, plan_of(privacy=PRIVATE), {WRONG: failing(int(Code.DATA_ROW), QUOTE)})
    assert federation.run().rounds[0].errors == {WRONG: int(Code.DATA_ROW)}
    assert QUOTE not in federation.texts()


def test_too_few_usable_updates_fail_the_run_by_number(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(privacy=PRIVATE)
    federation = Federation(tmp_path, plan, {"client-0": failing(int(Code.DATA_ROW), QUOTE), "client-1": updating(lambda update: {})})
    result = federation.fails(Code.COHORT_TOO_SMALL)
    assert result.status == "failed"
    assert result.error is not None
    assert "usable updates: 1, cohort.minimum is 2" in result.error
    assert str(int(Code.DATA_ROW)) in result.error
    assert QUOTE not in federation.texts()
    assert (result.final, result.rounds) == (None, [])
    # two updates left their nodes before the round failed
    assert result.privacy.clients.keys() == {"client-1", "client-2"}
    assert result.privacy.max_epsilon == epsilon([planned_steps(plan, DECLARED)], 1e-3)
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "report.html").exists()


def test_a_failed_round_can_be_done_again_by_the_same_clients(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2)
    broken = Federation(tmp_path, plan)
    broken.actors = dict.fromkeys(SIZES, failing(int(Code.INTERNAL)))
    broken.fails(Code.COHORT_TOO_SMALL)
    mended = Federation(tmp_path, plan)
    result = mended.run()
    assert (result.status, result.error, len(result.rounds)) == ("finished", None, 2)
    close(mended.model(), expected(plan, 2, SIZES))


# --- the cohort ---


def trained(federation: Federation) -> list[list[str]]:
    rounds = sorted({round for _, round, _ in federation.asked})
    return [[name for kind, number, name in federation.asked if (kind, number) == ("train", round)] for round in rounds]


def test_the_cohort_follows_from_the_seed_and_changes_with_the_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def cohorts(where: str, seed: int) -> list[list[str]]:
        federation = Federation(tmp_path / where, plan_of(rounds=8, seed=seed, cohort={"size": 2, "minimum": 1}))
        federation.run()
        return trained(federation)

    first = cohorts("a", 1)
    assert first == cohorts("b", 1)
    assert first != cohorts("c", 2)
    assert all(len(names) == 2 for names in first)
    assert len({tuple(names) for names in first}) > 1


class Shuffled(InProcessGrid):
    """The same clients under other ids, as nodes have in a deployment."""

    def __init__(self, client_app: ClientApp, homes: list[Path], run_id: int) -> None:
        super().__init__(client_app, list(reversed(homes)), run_id)


def test_the_cohort_is_drawn_by_name_not_by_id(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=6, cohort={"size": 1, "minimum": 1})
    plain, other = Federation(tmp_path / "a", plan), Federation(tmp_path / "b", plan, grid=Shuffled)
    plain.run(), other.run()
    assert trained(plain) == trained(other)


def test_the_cohort_of_a_round_that_was_begun_is_asked_again(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2, cohort={"size": 1, "minimum": 1})
    drawn = Federation(tmp_path / "a", plan)
    drawn.run()
    began = Federation(tmp_path / "b", plan)
    other = next(name for name in SIZES if name not in trained(drawn)[0])
    node = next(node for node in began.grid.get_node_ids() if began.grid.name_of(node) == other)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "cohort.json").write_text(json.dumps({"round": 1, "nodes": [node]}))
    began.run()
    assert trained(began) == [[other], trained(drawn)[1]]


def test_too_few_nodes_are_waited_for_and_then_told(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    federation = Federation(tmp_path, plan_of(cohort={"size": 5, "minimum": 4, "deadline_s": 0.4}))
    began = time.monotonic()
    result = federation.fails(Code.COHORT_TOO_SMALL)
    assert 0.4 <= time.monotonic() - began < 30
    assert "3 nodes are connected, cohort.minimum is 4" in (result.error or "")
    assert federation.asked == []


def test_fewer_nodes_than_wished_but_enough_go_on(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = Federation(tmp_path, plan_of(cohort={"size": 5, "minimum": 3, "deadline_s": 0.2})).run()
    assert result.rounds[0].participants == 3


class Late(InProcessGrid):
    """Its first client never answers in time."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        assert timeout == 0.3
        return [reply for reply in super().send_and_receive(messages) if self.name_of(reply.metadata.src_node_id) != WRONG]


@pytest.mark.parametrize("private", [False, True])
def test_a_late_node_is_left_out_and_not_waited_for_a_second_time(tmp_path: Path, plan_of: Callable[..., Plan], private: bool) -> None:
    plan = plan_of(evaluation={"federated_every": 1}, **({"privacy": PRIVATE} if private else {}))
    federation = Federation(tmp_path, plan, grid=Late)
    (told,) = federation.run().rounds
    assert (told.participants, told.failed, told.errors) == (2, 1, {WRONG: None})
    assert [name for kind, _, name in federation.asked if kind == "evaluate"] == ["client-1", "client-2"]
    close(federation.model(), expected(plan, 1, SIZES.keys() - {WRONG}))


class Machines(InProcessGrid):
    """Its clients are machines of their own, which may tell what they can do."""

    def profile_of(self, node: int) -> None:
        return None


def test_machines_get_ready_before_the_first_round_and_who_can_not_is_asked_all_the_same(
    tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    def unready(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        act = failing(Code.MODEL_NOT_FOUND) if message.metadata.message_type == records.PREPARE else honest
        return act(plan, assignment, message, name)

    federation = Federation(tmp_path, plan_of(rounds=2), {WRONG: unready}, grid=Machines)
    assert [(told.participants, told.errors) for told in federation.run().rounds] == [(3, {}), (3, {})]
    kinds = [(kind, number) for kind, number, _ in federation.asked]
    assert kinds == [(records.PREPARE, 1)] * 3 + [(records.TRAIN, 1)] * 3 + [(records.TRAIN, 2)] * 3


def test_a_first_round_that_takes_the_first_to_come_does_not_wait_until_all_are_ready(
    tmp_path: Path, plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation = Federation(tmp_path, plan_of(cohort={"size": 2, "oversample": 1.5}), grid=Machines)
    assert federation.run().rounds[0].participants == 2
    assert "round 1: 2 of 3 nodes are ready" in caplog.text


# --- federated evaluation ---


def test_hold_outs_are_added_up(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = Federation(tmp_path, plan_of(rounds=3, evaluation={"federated_every": 2})).run()
    assert [told.federated is None for told in result.rounds] == [True, False, True]
    assert result.rounds[1].federated is not None
    assert result.rounds[1].federated["accuracy"] == pytest.approx(5 / 15)
    assert result.rounds[1].federated["loss"] == pytest.approx(27 / 45)


NO_COUNTS: list[dict[str, Any]] = [
    {"counts": [1.0] * 8},
    {"counts": [1.0] * 10},
    {"counts": []},
    {"counts": [float("nan")] * 9},
    {"counts": [float("inf")] + [0.0] * 8},
    {"counts": [1.7e308] * 9},
    {"counts": None},
    {"client": "client-1"},
    {"round": 0},
    {"patient": "Jane"},
]


def test_a_hostile_evaluation_is_left_out_of_the_sum(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=len(NO_COUNTS), evaluation={"federated_every": 1})
    result = Federation(tmp_path, plan, {WRONG: in_turn(evaluating(**changes) for changes in NO_COUNTS)}).run()
    found = [(str(changes), told.errors) for changes, told in zip(NO_COUNTS, result.rounds, strict=True)]
    assert found == [(str(changes), {WRONG: int(Code.FRAME_INVALID)}) for changes in NO_COUNTS]
    assert {(told.participants, told.failed) for told in result.rounds} == {(3, 0)}
    assert {round((told.federated or {}).get("loss") or 0, 6) for told in result.rounds} == {18 / 30}


def test_a_loss_that_is_no_number_is_null(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    actors = {WRONG: evaluating(loss_sum=float("nan")), "client-1": reporting(train_loss=float("nan"))}
    federation = Federation(tmp_path, plan_of(evaluation={"federated_every": 1}), {WRONG: actors[WRONG]})
    (told,) = federation.run().rounds
    assert told.federated is not None
    assert told.federated["loss"] is None
    assert Federation(tmp_path / "2", plan_of(), {"client-1": actors["client-1"]}).run().rounds[0].train_loss is None


def test_all_evaluations_may_fail_and_the_round_stands(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    actors = dict.fromkeys(SIZES, evaluating(counts=[1.0]))
    (told,) = Federation(tmp_path, plan_of(evaluation={"federated_every": 1}), actors).run().rounds
    assert (told.participants, told.federated) == (3, None)


def test_private_evaluations_are_charged_to_the_hold_out(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2, privacy=PRIVATE, evaluation={"federated_every": 1})
    result = Federation(tmp_path, plan).run()
    train = epsilon([planned_steps(plan, DECLARED)] * 2, 1e-3)
    held_out = epsilon([planned_evaluation(plan)] * 2, 1e-3)
    for client in result.privacy.clients.values():
        assert client.segments == {"train": train, "holdout": held_out}
        assert (client.epsilon, client.epsilon_sum) == (max(train, held_out), train + held_out)
    assert result.privacy.max_epsilon == max(train, held_out) <= plan.privacy.epsilon
    assert result.rounds[0].federated is not None
    assert "loss" not in result.rounds[0].federated


def test_a_private_evaluation_without_the_plans_noise_is_refused(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    noises = (None, 0.0, 0.01, float("nan"))
    plan = plan_of(rounds=len(noises), privacy=PRIVATE, evaluation={"federated_every": 1})
    result = Federation(tmp_path, plan, {WRONG: in_turn(evaluating(noise_multiplier=noise) for noise in noises)}).run()
    assert [told.errors for told in result.rounds] == [{WRONG: int(Code.FRAME_INVALID)}] * len(noises)
    assert "holdout" not in result.privacy.clients[WRONG].segments


# --- scores, beside the next round ---


class Apart(InProcessGrid):
    """Its clients do without the coordinator's model, as those in other processes do."""

    works_here = False  # type: ignore[assignment]


Score = Callable[[int, State], Metrics | None]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], None]:
    """Score models by a function of how many were scored before, and the model."""

    def use(score: Score) -> None:
        done: list[int] = []

        def validation(self: OwnData, state: State) -> Metrics | None:
            done.append(1)
            return score(len(done), state)

        monkeypatch.setattr(OwnData, "validation", validation)
        monkeypatch.setattr(OwnData, "has_validation", True)

    return use


def size_of(state: State) -> Metrics:
    """A score that tells models apart, to the last bit and in any order of their tensors."""
    return {"accuracy": math.fsum(value**2 for tensor in state.values() for value in tensor.flatten().tolist())}


def untimed(result: Result) -> dict[str, Any]:
    """All but what no two runs have in common."""
    found = result.model_dump()
    for told in [found, *found["rounds"]]:
        told["seconds"] = None
    return found


SCORED: dict[str, Any] = {"rounds": 4, "privacy": PRIVATE, "evaluation": {"federated_every": 2}}


@pytest.mark.parametrize("every", [1, 3])
def test_scores_made_beside_the_rounds_are_those_made_between_them(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], every: int
) -> None:
    scoring(lambda _, state: size_of(state))
    plan = plan_of(**SCORED | {"evaluation": {"federated_every": 2, "every": every}})
    between = Federation(tmp_path / "between", plan).run()
    beside = Federation(tmp_path / "beside", plan, grid=Apart).run()
    assert untimed(between) == untimed(beside)
    assert [told.validation is None for told in beside.rounds] == [every > 1, every > 1, False, False]
    lines = [json.loads(line) for line in (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [json.loads(told.model_dump_json()) for told in beside.rounds]


def test_what_a_round_spends_is_computed_beside_it(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two rounds an accountant would hold the next up."""
    scoring(lambda _, state: size_of(state))
    asked: dict[str, list[int]] = {}

    def noted(history: list[Segment], delta: float) -> float:
        asked.setdefault(threading.current_thread().name, []).append(sum(segment.steps for segment in history))
        return epsilon(history, delta)

    monkeypatch.setattr("lichen.coordinator.telling.epsilon", noted)
    plan = plan_of(rounds=3, privacy=PRIVATE)
    steps = planned_steps(plan, DECLARED).steps
    Federation(tmp_path / "all", plan, grid=Apart).run()
    assert asked.pop("scoring") == [2 * steps] * len(SIZES) + [3 * steps] * len(SIZES)
    for few, grid in (("two of three", Apart), ("not beside", InProcessGrid)):
        changes = {"cohort": {"size": 2, "minimum": 2, "deadline_s": 30}} if grid is Apart else {}
        Federation(tmp_path / few, plan_of(rounds=3, privacy=PRIVATE, seed=2, **changes), grid=grid).run()
    assert asked.pop("scoring") == [2 * steps] * 2, "as long as only two are known"
    assert asked.keys() == {threading.current_thread().name}


class Watched(Apart):
    """Says when a round is asked for."""

    begun: dict[str, threading.Event]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = list(messages)
        self.begun[asked[0].metadata.group_id].set()
        return list(super().send_and_receive(asked))


def test_the_next_round_begins_before_the_score_is_there_and_lines_are_told_in_order(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None]
) -> None:
    federation = Federation(tmp_path, plan_of(rounds=3), grid=Watched)
    federation.grid.begun = begun = {str(number): threading.Event() for number in (1, 2, 3)}  # type: ignore[attr-defined]
    told: list[int] = []

    def score(number: int, state: State) -> Metrics:
        if number < 3:
            assert begun[str(number + 1)].wait(20)
        if number == 1:
            time.sleep(0.5)  # longer than the second round
            assert not begun["3"].is_set(), "no more than one model waits for its score"
        told.append(len(RunDirectory(tmp_path, federation.plan).load_rounds(3)))
        return size_of(state)

    scoring(score)
    result = federation.run()
    assert told[:3] == [0, 1, 2]
    assert [line.round for line in result.rounds] == [1, 2, 3]
    assert all(line.validation for line in result.rounds)
    assert (result.rounds[0].seconds or 0) < 0.5, "a round's seconds are without its score"


@pytest.mark.parametrize("grid", [InProcessGrid, Apart])
@pytest.mark.parametrize("fails", [1, 2, 4])
def test_a_crash_between_checkpoint_and_score_loses_neither(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], grid: type[InProcessGrid], fails: int
) -> None:
    plan = plan_of(**SCORED)
    scoring(lambda _, state: size_of(state))
    whole = Federation(tmp_path / "whole", plan).run()

    def score(number: int, state: State) -> Metrics:
        if number == fails:
            raise MemoryError("killed")
        return size_of(state)

    scoring(score)
    federation = Federation(tmp_path / "killed", plan, grid=grid)
    with pytest.raises(MemoryError, match="killed"):
        federation.run()
    left = read_result(federation.out)
    assert (left.status, left.error) == ("failed", "MemoryError: killed")
    assert [told.round for told in left.rounds] == list(range(1, fails))
    asked = len(federation.asked)
    assert untimed(federation.run()) == untimed(whole)
    assert all(round > fails for _, round, _ in federation.asked[asked:]), "what was done is not done again"


def test_a_score_that_fails_is_not_hidden_by_a_round_that_fails_and_the_other_way_round(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], caplog: pytest.LogCaptureFixture
) -> None:
    def score(number: int, state: State) -> Metrics:
        raise ValueError("no score")

    class Both(Apart, Broken):
        error = LichenError(Code.RUN_STOPPED, "by the operator")

    scoring(score)
    result = Federation(tmp_path, plan_of(rounds=3), grid=Both).fails(Code.RUN_STOPPED)
    assert (result.status, result.rounds) == ("stopped", [])
    assert "no score" in caplog.text


def test_what_was_spent_stays_told_if_a_run_fails_before_its_last_round_is_scored(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    scoring(lambda number, state: size_of(state) if number == 1 else fail())
    federation = Federation(tmp_path, plan_of(rounds=2, privacy=PRIVATE), grid=Apart)
    with pytest.raises(RuntimeError):
        federation.run()
    spent = epsilon([planned_steps(federation.plan, DECLARED)] * 2, 1e-3)
    assert read_result(tmp_path).privacy.max_epsilon == spent
    monkeypatch.setattr(OwnData, "__init__", fail)
    with pytest.raises(RuntimeError):
        federation.run()
    assert (read_result(tmp_path).privacy.max_epsilon, len(read_result(tmp_path).rounds)) == (spent, 1)


# --- the end of a run, and what comes after an interruption ---


def test_the_final_model_is_the_mean_of_the_last_rounds(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=4, aggregation={"average_last": 3})
    federation = Federation(tmp_path, plan)
    federation.run()
    models = [expected(plan, rounds, SIZES) for rounds in (2, 3, 4)]
    close(federation.model(), {name: sum(model[name] for model in models) / 3 for name in models[0]})


class Broken(InProcessGrid):
    """Raises when the second round is asked for."""

    error: BaseException

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = list(messages)
        if asked[0].metadata.group_id == "2":
            raise self.error
        return list(super().send_and_receive(asked))


ENDS = [
    (LichenError(Code.INTERRUPTED, "shutting down"), "running"),
    (LichenError(Code.RUN_STOPPED, "by the operator"), "stopped"),
    (LichenError(Code.ROUND_FAILED, "nothing came"), "failed"),
    (KeyboardInterrupt(), "stopped"),
    (RuntimeError("boom"), "failed"),
]


@pytest.mark.parametrize(("error", "status"), ENDS, ids=lambda value: str(value).split("\n")[0])
def test_however_a_run_ends_its_rounds_are_told_and_it_goes_on_to_the_same_model(
    tmp_path: Path, plan_of: Callable[..., Plan], error: BaseException, status: str
) -> None:
    plan = plan_of(
        rounds=3,
        privacy=PRIVATE,
        evaluation={"federated_every": 1},
        aggregation={"optimizer": "fedavgm", "momentum": 0.5, "average_last": 3},
    )
    undisturbed = Federation(tmp_path / "a", plan)
    whole = undisturbed.run()

    broken = Federation(tmp_path / "b", plan, grid=Broken)
    broken.grid.error = error
    with pytest.raises(type(error)):
        broken.run()
    result = read_result(tmp_path / "b")
    assert (result.status, len(result.rounds)) == (status, 1)
    assert result.privacy.max_epsilon == whole.rounds[0].epsilon
    assert (result.error is None) == (status == "running")

    resumed = Federation(tmp_path / "b", plan)
    again = resumed.run()
    assert (again.status, again.error) == ("finished", None)
    assert [told.round for told in again.rounds] == [1, 2, 3]
    assert {round for _, round, _ in resumed.asked} == {2, 3}
    assert again.privacy == whole.privacy
    for name, tensor in resumed.model().items():
        assert torch.equal(tensor, undisturbed.model()[name])
    assert again.transfer == whole.transfer


def test_a_finished_run_that_is_run_again_asks_nobody(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    first = Federation(tmp_path, plan).run()
    again = Federation(tmp_path, plan)
    second = again.run()
    assert again.asked == []
    assert second.rounds == first.rounds
    close(again.model(), expected(plan, 1, SIZES))
