"""What travels: a privacy rule on every field of every record, strict reading, payloads inline and beside, and no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, digest_of, parse_plan
from lichen.common.records import Assignment, EvaluateReport, ProbeReport, Rule, TrainReport

KINDS = records._Record.__subclasses__()
FULL: dict[type, dict[str, Any]] = {
    Assignment: {
        "format": 1,
        "plan": "{}",
        "plan_sha256": "0" * 64,
        "round": 1,
        "clip": 0.5,
        "rank": 2,
        "max_physical_batch_size": 4,
        "max_length": 16,
        "checkpointing": True,
        "precision": "int8",
        "steps": 3,
        "training": 3,
        "seconds": 7.5,
        "before": True,
    },
    TrainReport: {
        "format": 1,
        "client": "clinic-a",
        "round": 1,
        "rank": 2,
        "steps": 4,
        "declared_size": 32,
        "noise_multiplier": 1.5,
        "sample_rate": 0.25,
        "examples": 7,
        "train_loss": 0.5,
        "within_clip": True,
    },
    ProbeReport: {"format": 1, "tokens_per_s": 1200},
    EvaluateReport: {"format": 1, "client": "clinic-a", "round": 1, "counts": [1.0, -2.0], "noise_multiplier": 1.5, "loss_sum": 2.0},
}


def test_the_digest_is_of_the_plan_s_text_as_it_came(tiny_plan: dict[str, Any], older_text: Callable[[Plan], str]) -> None:
    plan = parse_plan(tiny_plan)
    other = parse_plan(tiny_plan | {"rounds": 3})
    for text in (plan.canonical_json(), older_text(plan)):
        assert Assignment(plan=text, plan_sha256=digest_of(text), round=1).read_plan() == plan
        for digest in (digest_of(text + " "), other.sha256(), digest_of(older_text(other)), ""):
            with pytest.raises(LichenError, match="digest") as caught:
                Assignment(plan=text, plan_sha256=digest, round=1).read_plan()
            assert caught.value.code is Code.POLICY_REFUSED
    with pytest.raises(LichenError, match="digest"):  # though it is the same plan
        Assignment(plan=older_text(plan), plan_sha256=plan.sha256(), round=1).read_plan()
    newer = json.dumps(json.loads(plan.canonical_json()) | {"novel": 1})
    with pytest.raises(LichenError, match="novel: unknown key") as caught:
        Assignment(plan=newer, plan_sha256=digest_of(newer), round=1).read_plan()
    assert caught.value.code is Code.PLAN_INVALID


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_every_record_has_one_privacy_rule(kind: type[records._Record]) -> None:
    for name, info in kind.model_fields.items():
        assert len([item for item in info.metadata if isinstance(item, Rule)]) == 1, f"{kind.__name__}.{name} has no privacy rule"
    assert set(FULL[kind]) == set(kind.model_fields), "a new field: give it a rule, and a place in these tests"


def test_what_depends_on_the_data_is_known() -> None:
    """The list that an auditor reads; whoever adds to it must have noised it, or keep it in."""
    by_data = {
        f"{kind.__name__}.{name}": rule
        for kind in KINDS
        for name, info in kind.model_fields.items()
        for rule in info.metadata
        if rule in {Rule.NOISED, Rule.PLAIN, Rule.SUMMED}
    }
    assert by_data == {
        "TrainReport.examples": Rule.PLAIN,
        "TrainReport.train_loss": Rule.PLAIN,
        "TrainReport.within_clip": Rule.SUMMED,
        "EvaluateReport.counts": Rule.NOISED,
        "EvaluateReport.loss_sum": Rule.PLAIN,
    }
    assert records.PAYLOAD_RULE is Rule.NOISED
    assert records.CENTRAL_PAYLOAD_RULE is Rule.SUMMED


@pytest.mark.parametrize("kind", [TrainReport, EvaluateReport], ids=lambda kind: kind.__name__)
def test_plain_fields_stay_in_under_privacy(kind: Any) -> None:
    plain = {name for name, info in kind.model_fields.items() if Rule.PLAIN in info.metadata}
    summed = {name for name, info in kind.model_fields.items() if Rule.SUMMED in info.metadata}
    public = {name: value for name, value in FULL[kind].items() if name not in plain | summed}
    records.check_release(kind(**{name: value for name, value in FULL[kind].items() if name not in summed}), private=False)
    records.check_release(kind(**public), private=True)
    for name in plain:
        for value in (FULL[kind][name], 0):  # zero is as telling as any number
            with pytest.raises(LichenError) as caught:
                records.check_release(kind.model_construct(**public, **{name: value}), private=True)
            assert caught.value.code is Code.INTERNAL
            assert name in caught.value.what


def test_summed_fields_go_only_to_a_coordinator_that_adds_noise() -> None:
    public: dict[str, Any] = {"client": "clinic-a", "round": 1, "steps": 1}
    for within in (True, False):
        report = TrainReport(**public, within_clip=within)
        records.check_release(report, private=True, central=True)
        for private in (True, False):
            with pytest.raises(LichenError) as caught:
                records.check_release(report, private=private)
            assert caught.value.code is Code.INTERNAL
    with pytest.raises(LichenError):  # the loss and the size stay in, whoever adds the noise
        records.check_release(TrainReport(**public, examples=7), private=True, central=True)


def test_a_field_without_a_rule_is_not_released() -> None:
    class Careless(TrainReport):
        median_length: int | None = None

    with pytest.raises(LichenError) as caught:
        records.check_release(Careless(client="a", round=1, steps=1), private=True)
    assert "median_length" in caught.value.what
    with pytest.raises(LichenError):
        records.check_release(Careless(client="a", round=1, steps=1), private=False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_records_survive_the_trip(kind: Any) -> None:
    record = kind(**FULL[kind])
    message = message_of(RecordDict({"report": records.to_config(record)}))
    again = records.message_from_bytes(records.message_to_bytes(message))
    assert records.from_config(kind, again.content.config_records["report"]) == record
    required = kind(**{name: FULL[kind][name] for name, info in kind.model_fields.items() if info.is_required()})
    assert None not in records.to_config(required).values()
    assert records.from_config(kind, records.to_config(required)) == required


@pytest.mark.parametrize(
    "change",
    [
        {"steps": None},
        {"steps": "4"},
        {"steps": True},
        {"steps": 4.0},
        {"client": 5},
        {"format": 2},
        {"loss": 1.0},
        {"counts": [1.0]},
    ],
)
def test_what_a_peer_sends_is_read_strictly(change: dict[str, Any]) -> None:
    config = {key: value for key, value in (FULL[TrainReport] | change).items() if value is not None}
    with pytest.raises(LichenError) as caught:
        records.from_config(TrainReport, ConfigRecord(config))
    assert caught.value.code is Code.FRAME_INVALID
    assert next(iter(change)) in str(caught.value)


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(LichenError) as caught:
        records.from_config(TrainReport, {**FULL[TrainReport], "client": ["a secret"]})
    assert "secret" not in str(caught.value)


# --- payloads -------------------------------------------------------------------------------------------------------------------


def message_of(content: RecordDict) -> Any:
    return records.build_message(
        content, run_id=3, message_id="m" * 32, src_node_id=1, dst_node_id=2, message_type=records.TRAIN, group_id="1"
    )


TENSORS = {"b.weight": torch.randn(3, 4), "a.bias": torch.tensor([math.pi]), "none": torch.zeros(0, 2)}


@pytest.mark.parametrize("spooled", [False, True])
def test_tensors_survive_the_trip_bit_for_bit(tmp_path: Path, spooled: bool) -> None:
    spool = tmp_path if spooled else None
    content = RecordDict()
    records.put_tensors(content, TENSORS, spool)
    message = records.message_from_bytes(records.message_to_bytes(message_of(content)))
    found = records.get_tensors(message.content, spool)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    refs = records.payload_refs(message)
    assert [ref.length for ref in refs] == ([records.payload_bytes(content)] if spooled else [])
    if spooled:
        assert [path.name for path in tmp_path.iterdir()] == [refs[0].digest]
        assert hashlib.sha256((tmp_path / refs[0].digest).read_bytes()).hexdigest() == refs[0].digest
        assert len(records.message_to_bytes(message)) < 1000, "the tensors lie beside"
    again = RecordDict()
    records.put_tensors(again, TENSORS, spool)
    assert again["payload"] == content["payload"]


def array(**change: Any) -> RecordDict:
    entry = {"dtype": "uint8", "shape": (4,), "stype": records.INLINE, "data": b"abcd"} | change
    return RecordDict({"payload": ArrayRecord({"payload": Array(**entry)})})


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (RecordDict(), Code.FRAME_INVALID),
        (RecordDict({"payload": ArrayRecord()}), Code.FRAME_INVALID),
        (array(stype="numpy.ndarray"), Code.FRAME_INVALID),  # Flower's own, which unpickles on some paths
        (array(dtype="float32"), Code.FRAME_INVALID),
        (array(shape=(2, 2)), Code.FRAME_INVALID),
        (array(shape=(5,)), Code.PAYLOAD_CORRUPT),
        (array(), Code.PAYLOAD_CORRUPT),
        (array(stype=records.BY_REFERENCE), Code.PAYLOAD_CORRUPT),
        (array(stype=records.BY_REFERENCE, data=b"x" * 32), Code.PAYLOAD_CORRUPT),
        (array(data=b"\x80\x04\x95" + b"x" * 29, shape=(32,)), Code.PAYLOAD_CORRUPT),  # as a pickle begins
        (array(data=b"\xff" * 8 + b"{}", shape=(10,)), Code.PAYLOAD_CORRUPT),  # a header of 16 EiB
        (
            RecordDict(
                {"payload": ArrayRecord({name: Array(dtype="uint8", shape=(1,), stype=records.INLINE, data=b"a") for name in "ab"})}
            ),
            Code.FRAME_INVALID,
        ),
    ],
)
def test_payloads_that_are_none(tmp_path: Path, content: RecordDict, code: Code) -> None:
    with pytest.raises(LichenError) as caught:
        records.get_tensors(content, tmp_path)
    assert caught.value.code is code


def test_a_payload_in_a_spool_that_this_end_has_not() -> None:
    with pytest.raises(LichenError) as caught:
        records.get_tensors(array(stype=records.BY_REFERENCE, shape=(40,), data=b"x" * 40), None)
    assert caught.value.code is Code.FRAME_INVALID


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_payload_never_pass(data: bytes) -> None:
    with pytest.raises(LichenError):
        records.get_tensors(array(data=data, shape=(len(data),)), None)


# --- messages -------------------------------------------------------------------------------------------------------------------


def test_messages_and_replies() -> None:
    message = message_of(RecordDict({"assignment": ConfigRecord({"round": 1})}))
    again = records.message_from_bytes(records.message_to_bytes(message))
    assert (again.metadata.run_id, again.metadata.message_id, again.metadata.dst_node_id, again.metadata.group_id) == (3, "m" * 32, 2, "1")
    answer = records.reply(again, RecordDict({"report": ConfigRecord({"steps": 4})}))
    assert (answer.metadata.reply_to_message_id, answer.metadata.src_node_id, answer.metadata.dst_node_id) == ("m" * 32, 2, 1)
    assert list(records.message_items(answer.content)) == [("report", "steps")]
    failed = records.message_from_bytes(records.message_to_bytes(records.error_reply(again, 44)))
    assert failed.has_error()
    assert (failed.error.code, failed.error.reason or "") == (44, "")
    assert records.payload_refs(failed) == []


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=200))
def test_bytes_that_are_no_message_are_refused_or_harmless(data: bytes) -> None:
    with contextlib.suppress(LichenError):  # and no other
        records.message_to_bytes(records.message_from_bytes(data))


def test_records_load_no_torch() -> None:
    import subprocess

    code = "import sys, lichen.common.records; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"


def test_a_reference_holds_lengths_beyond_what_a_shape_can() -> None:
    ref = records.PayloadRef("ab" * 32, 5 * 2**40)
    content = RecordDict({"payload": ArrayRecord({"payload": records.reference(ref)})})
    message = records.build_message(content, run_id=1, message_id="m", src_node_id=1, dst_node_id=2, message_type="train", group_id="1")
    back = records.message_from_bytes(records.message_to_bytes(message))
    assert records.payload_refs(back) == [ref]
    assert records.payload_bytes(back.content) == ref.length
