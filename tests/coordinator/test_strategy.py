"""The round over a real grid in one process: honest and hostile clients, what the result tells, and what follows a crash."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, digest_of
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.schedule import planned_evaluation, planned_steps
from lichen.common.result import read_result, schema
from scripted_clients import (
    DECLARED,
    PRIVATE,
    SIZES,
    Answer,
    Broken,
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


# --- the end of a run, and what comes after an interruption ---


def test_the_final_model_is_the_mean_of_the_last_rounds(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=4, aggregation={"average_last": 3})
    federation = Federation(tmp_path, plan)
    federation.run()
    models = [expected(plan, rounds, SIZES) for rounds in (2, 3, 4)]
    close(federation.model(), {name: sum(model[name] for model in models) / 3 for name in models[0]})


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


def test_a_run_goes_on_with_the_text_that_it_began_with(
    tmp_path: Path, plan_of: Callable[..., Plan], older_text: Callable[[Plan], str]
) -> None:
    plan, sent = plan_of(rounds=2), set[tuple[str, str]]()
    text = older_text(plan)

    def keep(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        sent.add((assignment.plan, assignment.plan_sha256))
        return honest(plan, assignment, message, name)

    federation = Federation(tmp_path, plan, dict.fromkeys(SIZES, keep))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(json.loads(text)))
    result = federation.run()
    assert (result.status, result.plan_sha256) == ("finished", digest_of(text))
    assert sent == {(text, digest_of(text))}


def test_a_finished_run_that_is_run_again_asks_nobody(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    first = Federation(tmp_path, plan).run()
    again = Federation(tmp_path, plan)
    second = again.run()
    assert again.asked == []
    assert second.rounds == first.rounds
    close(again.model(), expected(plan, 1, SIZES))
