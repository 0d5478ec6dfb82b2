"""The privacy rule of every field that an agent may put on the channel, as `records` has them for what lies inside its messages.

A test lists the protobuf fields that an agent can send and fails on one that has no rule here.
"""

from __future__ import annotations

from collections.abc import Mapping

from lichen.common.records import PAYLOAD_RULE, Rule

RULES: Mapping[str, Rule] = {
    # fleet.proto, from the agent
    "Hello.protocol": Rule.PROTOCOL,
    "Hello.version": Rule.PROTOCOL,
    "Envelope.message_id": Rule.PROTOCOL,
    "Ack.message_id": Rule.PROTOCOL,
    "Chunk.digest": PAYLOAD_RULE,
    "Chunk.offset": Rule.PROTOCOL,
    "Chunk.data": PAYLOAD_RULE,
    "Chunk.tell": Rule.PROTOCOL,
    "Want.digest": Rule.PROTOCOL,  # of what the coordinator offered
    "Want.offset": Rule.PROTOCOL,
    "Stop.digest": Rule.PROTOCOL,
    "Missing.digest": PAYLOAD_RULE,
    "Bye.code": Rule.ERROR,
    "LedgerState.sequence": Rule.LEDGER,
    "LedgerState.head": Rule.LEDGER,
    "LedgerState.signature": Rule.LEDGER,
    "Profile.device": Rule.MACHINE,
    "Profile.memory_mb": Rule.MACHINE,
    "Profile.threads": Rule.MACHINE,
    "Profile.work": Rule.DECLARED,  # of the coordinator's own plan
    "Profile.tokens_per_s": Rule.MACHINE,  # on made-up text
    "Profile.rows_per_step": Rule.DECLARED,
    "Profile.download_kbit_s": Rule.MACHINE,
    "Profile.upload_kbit_s": Rule.MACHINE,
    "News.run_id": Rule.PROTOCOL,
    "News.rows": Rule.DECLARED,  # by the data's owner; that they came, the owner tells by putting them there
    # enrolment.proto
    "EnrolRequest.protocol": Rule.PROTOCOL,
    "EnrolRequest.secret": Rule.PROTOCOL,
    "EnrolRequest.csr": Rule.PROTOCOL,
    "RenewRequest.protocol": Rule.PROTOCOL,
    "RenewRequest.csr": Rule.PROTOCOL,
    # models.proto
    "FetchRequest.protocol": Rule.PROTOCOL,
    "FetchRequest.run_id": Rule.PROTOCOL,
    "FetchRequest.digest": Rule.PROTOCOL,
    "FetchRequest.offset": Rule.PROTOCOL,
    # Flower's message, in an envelope
    "Metadata.run_id": Rule.PROTOCOL,
    "Metadata.message_id": Rule.PROTOCOL,
    "Metadata.src_node_id": Rule.PROTOCOL,
    "Metadata.dst_node_id": Rule.PROTOCOL,
    "Metadata.src_task_id": Rule.PROTOCOL,
    "Metadata.dst_task_id": Rule.PROTOCOL,
    "Metadata.reply_to_message_id": Rule.PROTOCOL,
    "Metadata.group_id": Rule.PROTOCOL,
    "Metadata.message_type": Rule.PROTOCOL,
    "Metadata.ttl": Rule.TIME,  # what is left of the request's: Flower takes off the time since then
    "Metadata.created_at": Rule.TIME,
    "Error.code": Rule.ERROR,
    "Error.reason": Rule.PLAIN,
}
"""By `Message.field`. What holds other fields (a frame, an envelope, a record) has none: what lies in it has."""

CONTAINERS = frozenset({"Envelope.message", "Message.content"})
"""Bytes and records whose content has rules of its own: Flower's message, and in it the records of `records`."""
