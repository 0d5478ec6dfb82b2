"""The field test: every protobuf field that an agent can send has a privacy rule, and what is sent keeps to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import Message as FlowerMessage
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from lichen.common import records
from lichen.common.channel import enrolment_pb2, fleet_pb2, models_pb2
from lichen.common.channel.rules import CONTAINERS, RULES
from lichen.common.records import PAYLOAD_RULE, Rule

SENT = {
    "lichen.fleet.v1.Fleet": fleet_pb2.AgentFrame.DESCRIPTOR,
    "lichen.enrolment.Enrolment": enrolment_pb2.EnrolRequest.DESCRIPTOR,
    "lichen.enrolment.Renewal": enrolment_pb2.RenewRequest.DESCRIPTOR,
    "lichen.models.v1.Models": models_pb2.FetchRequest.DESCRIPTOR,
}
"""What an agent sends, by service."""


def leaves(message: Descriptor) -> Iterator[str]:
    """`Message.field` of every field that holds a value, also of the messages inside."""
    for field in message.fields:
        name = f"{message.name}.{field.name}"
        if field.message_type is not None and name not in CONTAINERS:
            yield from leaves(field.message_type)
        else:
            yield name


def missing(*messages: Descriptor) -> set[str]:
    """Fields without a rule."""
    return {name for message in messages for name in leaves(message)} - set(RULES) - CONTAINERS


def test_every_field_that_an_agent_can_send_has_a_rule() -> None:
    sent = (*SENT.values(), FlowerMessage.DESCRIPTOR)
    assert not missing(*sent), "a new field: give it a rule in common/channel/rules.py"
    there = {name for message in sent for name in leaves(message)}
    assert set(RULES) | CONTAINERS == there, "a rule for a field that is no more"


def test_no_service_was_forgotten() -> None:
    for module in (fleet_pb2, enrolment_pb2, models_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for service in file.service:
            name = f"{file.package}.{service.name}"
            for method in service.method:
                assert method.input_type.removeprefix(".") == SENT[name].full_name


def test_a_field_without_a_rule_is_found() -> None:
    """The coordinator's own frames have fields that no agent sends, and so no rule."""
    assert {"Welcome.name", "Welcome.node_id", "Cancel.message_ids", "Receipt.stored"} <= missing(fleet_pb2.CoordinatorFrame.DESCRIPTOR)


def test_what_depends_on_the_data_is_known() -> None:
    """What an auditor reads: the update, numbers of errors, how far the ledger is, times of sending. No loss, count or load."""
    by_data = {name: rule for name, rule in RULES.items() if rule not in {Rule.PROTOCOL, Rule.DECLARED, Rule.MACHINE}}
    assert by_data == {
        "Chunk.data": PAYLOAD_RULE,
        "Chunk.digest": PAYLOAD_RULE,
        "Missing.digest": PAYLOAD_RULE,
        "Bye.code": Rule.ERROR,
        **dict.fromkeys(("LedgerState.sequence", "LedgerState.head", "LedgerState.signature"), Rule.LEDGER),
        "Error.code": Rule.ERROR,
        "Error.reason": Rule.PLAIN,
        "Metadata.created_at": Rule.TIME,
        "Metadata.ttl": Rule.TIME,
    }


def test_what_tells_of_the_machine_is_the_profile_and_no_more() -> None:
    """What an owner keeps in by `profile: false`; of new data by `online: false`."""
    of_the_profile = {f"Profile.{field.name}" for field in fleet_pb2.Profile.DESCRIPTOR.fields}
    assert {name for name, rule in RULES.items() if rule in {Rule.DECLARED, Rule.MACHINE}} == of_the_profile | {"News.rows"}


def test_heartbeats_hold_nothing() -> None:
    assert not fleet_pb2.Heartbeat.DESCRIPTOR.fields


@pytest.mark.parametrize("failed", [False, True])
def test_a_replys_wire_form_has_no_field_beyond(failed: bool) -> None:
    """Flower's own constructors fill in the envelope: each field that is set there has a rule, and plain ones are not set."""
    asked = records.build_message(
        RecordDict(), run_id=3, message_id="m" * 32, src_node_id=1, dst_node_id=2, message_type=records.TRAIN, group_id="1"
    )
    reply = records.error_reply(asked, 50) if failed else records.reply(asked, RecordDict({"report": ConfigRecord({"steps": 4})}))
    wire = FlowerMessage.FromString(records.message_to_bytes(reply))
    found = {f"Metadata.{field.name}" for field, _ in wire.metadata.ListFields()}
    found |= {f"Error.{field.name}" for field, _ in wire.error.ListFields()}
    assert found <= set(RULES)
    assert "Error.reason" not in found
    assert ("Error.code" in found) is failed
    assert wire.metadata.group_id == asked.metadata.group_id, "what the coordinator said, and no more"
