"""What travels: typed assignments and reports <-> Flower messages, and the privacy rule of every field.

This is the one file that touches Flower's serde and its message constructors (written against flwr 1.42), and the one that knows
whether a payload lies inside its message or beside it in a spool. It imports Flower when a message is made or read, so that an agent
without work does without its 30 MB.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from flwr.app import Array, ConfigRecord, Message, RecordDict

    from lichen.common.codec.codec import Codec, Payload
    from lichen.common.plan import Plan

INLINE = "lichen.safetensors.v1"
ENCODED = "lichen.codec.v1"
BY_REFERENCE = "lichen.ref.v1"
_DIGEST_BYTES = hashlib.sha256().digest_size
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REFERENCE_BYTES = _DIGEST_BYTES + 8
MOST = 2**40
"""More rows than a node can hold: a larger count is a mistake or an attack."""
TRAIN, EVALUATE = "train", "evaluate"
PREPARE = "query.prepare"
"""To load what a plan needs; an agent's own question to its worker, how fast it trains, is `PROBE`."""
PROBE = "query.probe"


class Rule(Enum):
    """Why a field may leave a node."""

    DECLARED = "a constant that the plan or the owner declares, or a function of such constants; it does not depend on the data"
    NOISED = "depends on the data; carries calibrated noise and is charged to the accountant"
    PLAIN = "depends on the data; sent only where the plan has no differential privacy (unit: none)"
    SUMMED = "depends on the data, un-noised; only where the plan has noise: central, whose coordinator releases a noised sum of it"
    ERROR = "an error number; under privacy without text"
    PROTOCOL = "the state of the connection: an id, a key, a version, an offset; it does not depend on the data"
    MACHINE = "what the machine and its link can do, measured without the data and rounded; the owner can keep it in"
    LEDGER = "how far the node's ledger is, hashed and signed: it tells that work was charged and that new rows came, and nothing of them"
    TIME = "when it was sent, which depends on how long the work took; neither noised nor hidden"


# The payload (the update itself) is NOISED under privacy: it is made of noised steps only. Under `noise: central` it is SUMMED.
PAYLOAD_RULE = Rule.NOISED
CENTRAL_PAYLOAD_RULE = Rule.SUMMED


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=_Record)


class Assignment(_Record):
    """What the coordinator asks of one node in one round. Data, never code."""

    format: Annotated[Literal[1], Rule.DECLARED] = 1
    plan: Annotated[str, Rule.DECLARED]
    plan_sha256: Annotated[str, Rule.DECLARED]
    round: Annotated[int, Rule.DECLARED]
    clip: Annotated[float | None, Field(gt=0), Rule.DECLARED] = None
    """Under `unit: client`: ℓ2 bound on the update; it follows from the plan and from what was released."""
    # For this node's hardware, where `cohort.assign` permits it (common/assignment.py); left out, the plan's own holds.
    rank: Annotated[int | None, Field(ge=1), Rule.DECLARED] = None
    """LoRA's, at most the plan's; α is scaled so that α / rank stays."""
    max_physical_batch_size: Annotated[int | None, Field(ge=1), Rule.DECLARED] = None
    """Rows at once, at most the plan's."""
    max_length: Annotated[int | None, Field(ge=4), Rule.DECLARED] = None
    """Tokens kept of each text, at most the plan's."""
    checkpointing: Annotated[bool | None, Rule.DECLARED] = None
    """Whether activations are computed again in the backward pass, and not kept."""
    precision: Annotated[Literal["float32", "bfloat16", "int8"] | None, Rule.DECLARED] = None
    """How the frozen base is kept."""
    steps: Annotated[int | None, Field(ge=1), Rule.DECLARED] = None
    """Most optimizer steps of this round. The noise stays that of all the plan's steps."""
    training: Annotated[int | None, Field(ge=1), Rule.DECLARED] = None
    """Under `mode: buffered`: how many times, with this one, the node was asked to train in the run; `round` is the step of the server that
    was under way."""
    seconds: Annotated[float | None, Field(gt=0), Rule.DECLARED] = None
    """Under `local.partial`: until the deadline, from when this came."""

    before: Annotated[bool, Rule.DECLARED] = False
    """Of an evaluation: before a batch of an online run begins, on its rows too, of which none was trained on."""

    @property
    def number(self) -> int:
        """Counts the node's trainings: never the same for two of them, so that draws and noise are others."""
        return self.round if self.training is None else self.training

    def read_plan(self) -> Plan:
        """The plan, if its text, as it came, has the digest by which policies and people know it.

        Raises:
            LichenError: POLICY_REFUSED; as `plan_from_json`.
        """
        from lichen.common.plan import digest_of, plan_from_json  # here, because an agent without work can do without its schema

        plan = plan_from_json(self.plan)
        if (digest := digest_of(self.plan)) != self.plan_sha256:
            raise LichenError(Code.POLICY_REFUSED, f"the plan's digest is {digest}, not {self.plan_sha256}", where=plan.name)
        return plan


def spend_time(message: Message, seconds: float) -> None:
    """Take what has passed since a message came off the time that its assignment leaves, if it says any; something is always left."""
    config = message.content.config_records.get("assignment") if message.has_content() else None
    if config is not None and isinstance(left := config.get("seconds"), float):
        config["seconds"] = max(left - seconds, 1e-3)


class TrainReport(_Record):
    """What a node says beside its update. Every field carries the rule by which it may leave (see `Rule`)."""

    format: Annotated[Literal[1], Rule.DECLARED] = 1
    client: Annotated[str, Rule.DECLARED]
    round: Annotated[int, Rule.DECLARED]
    rank: Annotated[int | None, Field(ge=1), Rule.DECLARED] = None
    """Of the adapter that was trained, where it is not the plan's."""
    steps: Annotated[int, Rule.DECLARED]
    """Under `unit: client` the plan's or the assignment's, or 0 where the plan counts epochs: the number would tell the true size. Under
    `local.partial`, which is without privacy only, those that there was time for."""
    declared_size: Annotated[int | None, Field(ge=1, le=MOST), Rule.DECLARED] = None
    noise_multiplier: Annotated[float | None, Rule.DECLARED] = None
    sample_rate: Annotated[float | None, Rule.DECLARED] = None
    examples: Annotated[int | None, Field(ge=1, le=MOST), Rule.PLAIN] = None
    train_loss: Annotated[float | None, Rule.PLAIN] = None
    within_clip: Annotated[bool | None, Rule.SUMMED] = None
    """Whether the update was within an adaptive clip before it was clipped."""


class EvaluateReport(_Record):
    """A node's hold-out scores: `Scores.counts`, flattened, and the summed loss."""

    format: Annotated[Literal[1], Rule.DECLARED] = 1
    client: Annotated[str, Rule.DECLARED]
    round: Annotated[int, Rule.DECLARED]
    counts: Annotated[list[Annotated[float, Field(ge=-MOST, le=MOST)]], Rule.NOISED]
    noise_multiplier: Annotated[float | None, Rule.DECLARED] = None
    loss_sum: Annotated[float | None, Rule.PLAIN] = None


class ProbeReport(_Record):
    """How fast a node trains a plan's model."""

    format: Annotated[Literal[1], Rule.DECLARED] = 1
    tokens_per_s: Annotated[int, Field(ge=1), Rule.MACHINE]
    """On made-up text; two significant digits."""


def check_round(round: int, rounds: int) -> None:
    """Refuse a round that the plan has not: what it leaves for later rounds would be less than nothing.

    Raises:
        LichenError: FRAME_INVALID.
    """
    if not 1 <= round <= rounds:
        raise LichenError(Code.FRAME_INVALID, f"round {round} of a plan of {rounds}", where="Assignment")


def check_release(report: TrainReport | EvaluateReport, *, private: bool, central: bool = False) -> None:
    """Refuse to let a field out that its rule keeps in.

    Raises:
        LichenError: INTERNAL, if a PLAIN field is set under differential privacy, a SUMMED one where the coordinator adds no noise, or
            a field has no rule.
    """
    for name, info in type(report).model_fields.items():
        rules = [item for item in info.metadata if isinstance(item, Rule)]
        if len(rules) != 1:
            raise LichenError(Code.INTERNAL, f"field {name!r} of {type(report).__name__} has no privacy rule")
        kept = (private and rules[0] is Rule.PLAIN) or (not central and rules[0] is Rule.SUMMED)
        if kept and getattr(report, name) is not None:
            raise LichenError(Code.INTERNAL, f"field {name!r} of {type(report).__name__} may not leave under this plan's privacy")


# --- records -----------------------------------------------------------------------------------------------------------------


def to_config(record: _Record) -> ConfigRecord:
    """A record as Flower's flat ConfigRecord, which holds no None: a field that is None stays out."""
    from flwr.app import ConfigRecord

    return ConfigRecord({key: value for key, value in record.model_dump().items() if value is not None})


def from_config(kind: type[R], config: Mapping[str, Any]) -> R:
    """The record that a peer sent, validated.

    Raises:
        LichenError: FRAME_INVALID, if a field is missing, unknown or of the wrong type.
    """
    try:
        return kind.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise LichenError(Code.FRAME_INVALID, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=kind.__name__) from None


# --- payloads ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PayloadRef:
    """A payload that lies in a spool as a file named by its digest."""

    digest: str
    """Hexadecimal SHA-256 of the bytes."""
    length: int
    """In bytes."""


@dataclass(frozen=True)
class ChainLink:
    """One step of a model: what is added to the model of one digest gives that of the next link, or the message's payload."""

    before: str
    """Hexadecimal SHA-256 of the model that it is added to."""
    added: PayloadRef
    """What is added, encoded by the plan's downlink codec."""


def put_tensors(content: RecordDict, tensors: Mapping[str, torch.Tensor], spool: Path | None, *, durable: bool = True) -> PayloadRef | None:
    """Add named tensors to a message as one safetensors payload: inline, or as a file of ``spool`` and a reference to it.

    The file is on the disk when this returns, unless it need not be ``durable``. The reference is returned, where there is one.
    """
    from flwr.app import Array, ArrayRecord
    from safetensors.torch import save

    ref = None
    if spool is None:
        data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
        array = Array(dtype="uint8", shape=(len(data),), stype=INLINE, data=data)
    else:
        ref = put_file(tensors, spool, durable=durable)
        array = reference(ref)
    content["payload"] = ArrayRecord({"payload": array})
    return ref


def put_update(
    content: RecordDict, update: Mapping[str, torch.Tensor], codec: Codec | None, seed: int, spool: Path | None, *, durable: bool = True
) -> None:
    """Add a client's update to a message, as `put_tensors` does, written by the plan's codec.

    Raises:
        LichenError: STATE_MISMATCH, if a value is not finite or out of the codec's range.
    """
    from flwr.app import Array, ArrayRecord

    if codec is None:
        put_tensors(content, update, spool, durable=durable)
        return
    if spool is None:
        data = codec.encoded(update, seed=seed)
        array = Array(dtype="uint8", shape=(len(data),), stype=ENCODED, data=data)
    else:
        array = reference(put_encoded(update, codec, seed, spool, durable=durable))
    content["payload"] = ArrayRecord({"payload": array})


def put_encoded(update: Mapping[str, torch.Tensor], codec: Codec, seed: int, spool: Path, *, durable: bool = True) -> PayloadRef:
    """Write an encoded update to a spool. Raises as `put_update`."""
    temporary = _temporary(spool)
    with temporary.open("wb") as file:
        codec.encode(update, file, seed=seed)
    return _kept(temporary, spool, durable=durable)


def get_update(content: RecordDict, spool: Path | None, codec: Codec | None, like: Mapping[str, torch.Tensor]) -> Payload:
    """A client's update: its length, form and digest are checked, and, where a codec wrote it, its values too.

    Args:
        content: the reply's.
        spool: where its payload lies.
        codec: the plan's.
        like: tensors whose names, shapes and types it must have.

    Raises:
        LichenError: as `get_tensors` and `Codec.open`; STATE_MISMATCH, if it is of other tensors.
    """
    from lichen.common.codec.layout import Layout
    from lichen.common.codec.plain import Tensors
    from lichen.common.model.adapter import check_fits

    if codec is None:
        tensors = get_tensors(content, spool)
        check_fits(tensors, like)
        return Tensors(tensors)
    array = _payload_array(content)
    if array is None:
        raise LichenError(Code.FRAME_INVALID, "the message has no payload")
    if array.stype == ENCODED:
        return codec.open(array.data, Layout.of(like))
    if spool is None or array.stype != BY_REFERENCE:
        raise LichenError(Code.FRAME_INVALID, "the payload is not an encoded update, or lies in a spool that this end has not")
    return codec.open(mapped(spool / _referred(array).digest), Layout.of(like))


def mapped(path: Path) -> mmap | bytes:
    """A file's bytes, memory-mapped.

    Raises:
        LichenError: PAYLOAD_CORRUPT, if it can't be read.
    """
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except ValueError:  # an empty file has no map
        return b""
    except OSError as error:
        raise LichenError(Code.PAYLOAD_CORRUPT, f"the payload can't be read: {error}") from None


def reference(ref: PayloadRef) -> Array:
    """The handle that stands in a message for a payload beside it: digest, then length in eight bytes.

    The length is not the array's shape, because Flower's messages hold a shape in 32 bits.
    """
    from flwr.app import Array

    data = bytes.fromhex(ref.digest) + ref.length.to_bytes(8, "big")
    return Array(dtype="uint8", shape=(len(data),), stype=BY_REFERENCE, data=data)


def put_file(tensors: Mapping[str, torch.Tensor], spool: Path, *, durable: bool = True) -> PayloadRef:
    """Write named tensors to a spool as a safetensors file."""
    from lichen.common.tensor_files import write_tensors

    temporary = _temporary(spool)
    write_tensors(temporary, tensors)
    return _kept(temporary, spool, durable=durable)


def _temporary(spool: Path) -> Path:
    return spool / f"{os.getpid()}.{threading.get_ident()}.tmp"


def _kept(temporary: Path, spool: Path, *, durable: bool) -> PayloadRef:
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if durable:
            os.fsync(file.fileno())
    ref = PayloadRef(digest, temporary.stat().st_size)
    temporary.replace(spool / digest)  # one that is there already is made new again, and so spared by the next collection
    return ref


def get_tensors(content: RecordDict, spool: Path | None) -> dict[str, torch.Tensor]:
    """The named tensors of a message's payload; those of a spooled one are memory-mapped.

    Raises:
        LichenError: FRAME_INVALID, if there is no payload or it is of another kind; PAYLOAD_CORRUPT, if it is no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    array = _payload_array(content)
    if array is None:
        raise LichenError(Code.FRAME_INVALID, "the message has no payload")
    try:
        if array.stype == INLINE:
            return dict(load(array.data))
        if array.stype == ENCODED:
            raise LichenError(Code.FRAME_INVALID, "the payload is encoded, and tensors were due")
        if spool is None:
            raise LichenError(Code.FRAME_INVALID, "the payload lies in a spool, and this end has none")
        return dict(load_file(spool / _referred(array).digest))
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a type that the format has and torch has not
        raise LichenError(Code.PAYLOAD_CORRUPT, f"the payload is not a safetensors file: {error}") from None


def payload_refs(message: Message) -> list[PayloadRef]:
    """The payloads that lie beside this message and must be there before it may be used."""
    if not message.has_content():
        return []
    array = _payload_array(message.content)
    if array is None or array.stype != BY_REFERENCE:
        return []
    return [_referred(array)]


def put_chain(content: RecordDict, links: Sequence[ChainLink]) -> None:
    """Add what was added to the model since, oldest first: a node that holds one of these models need not fetch the payload whole."""
    from flwr.app import ArrayRecord

    if links:
        content["chain"] = ArrayRecord({link.before: reference(link.added) for link in links})


def chain_of(message: Message) -> list[ChainLink]:
    """What a model that the node may hold needs to become the message's payload, oldest first; empty where there is none.

    Raises:
        LichenError: FRAME_INVALID, if it is none that lichen makes.
    """
    record = message.content.array_records.get("chain") if message.has_content() else None
    links = []
    for before, array in (record or {}).items():
        if array.stype != BY_REFERENCE or len(array.data) != _REFERENCE_BYTES or not _DIGEST.fullmatch(before):
            raise LichenError(Code.FRAME_INVALID, "the message's chain of models is not one that lichen makes")
        links.append(ChainLink(before, _referred(array)))
    return links


def offered_refs(message: Message) -> list[PayloadRef]:
    """All that lies beside this message: its payload, and what the node may fetch instead."""
    return [*payload_refs(message), *(link.added for link in chain_of(message))]


def payload_bytes(content: RecordDict) -> int:
    """The payload's length in bytes; 0 where there is none."""
    array = _payload_array(content)
    if array is None:
        return 0
    return _referred(array).length if array.stype == BY_REFERENCE else len(array.data)


def _payload_array(content: RecordDict) -> Array | None:
    record = content.array_records.get("payload")
    if record is None:
        return None
    array = record.get("payload")
    if (
        array is None
        or len(record) != 1
        or array.dtype != "uint8"
        or len(array.shape) != 1
        or array.stype not in {INLINE, ENCODED, BY_REFERENCE}
    ):
        raise LichenError(Code.FRAME_INVALID, "the message's payload is not one that lichen makes")
    if len(array.data) != array.shape[0] or (array.stype == BY_REFERENCE and len(array.data) != _REFERENCE_BYTES):
        raise LichenError(Code.PAYLOAD_CORRUPT, "the payload's length does not match its description")
    return array


def _referred(array: Array) -> PayloadRef:
    return PayloadRef(array.data[:_DIGEST_BYTES].hex(), int.from_bytes(array.data[_DIGEST_BYTES:], "big"))


# --- messages ----------------------------------------------------------------------------------------------------------------


def build_message(
    content: RecordDict,
    *,
    run_id: int,
    message_id: str,
    src_node_id: int,
    dst_node_id: int,
    message_type: str,
    group_id: str,
    ttl: float = 86400.0,
) -> Message:
    """A Flower message with the given metadata (outside a Flower process the shorter constructors fail)."""
    from flwr.app import Message, Metadata

    return Message(
        content,
        metadata=Metadata(
            run_id=run_id,
            message_id=message_id,
            src_node_id=src_node_id,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl,
            message_type=message_type,
        ),
    )


def reply(message: Message, content: RecordDict) -> Message:
    """The answer to ``message``."""
    from flwr.app import Message

    return Message(content, reply_to=message)


def error_reply(message: Message, code: int, reason: str = "") -> Message:
    """An answer that says by number that ``message`` could not be served. Under privacy ``reason`` must be empty."""
    from flwr.app import Error, Message

    return Message(Error(code=code, reason=reason), reply_to=message)


def message_to_bytes(message: Message) -> bytes:
    """A Flower message as bytes."""
    from flwr.common.serde import message_to_proto

    return bytes(message_to_proto(message).SerializeToString())


def message_from_bytes(data: bytes) -> Message:
    """A Flower message from bytes.

    Raises:
        LichenError: FRAME_INVALID, if they are none.
    """
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as MessageProto

    try:
        return message_from_proto(MessageProto.FromString(data))
    except Exception as error:  # protobuf's and flwr's own errors share no base
        raise LichenError(Code.FRAME_INVALID, f"not a Flower message: {type(error).__name__}") from None


def message_items(content: RecordDict) -> Iterator[tuple[str, str]]:
    """Every (record, field) of a message: what the test of privacy rules walks over."""
    for name, record in content.items():
        for key in record:
            yield name, key
