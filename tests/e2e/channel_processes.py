"""A coordinator and agents as processes that a test can kill: ``python channel_processes.py coordinator|agent HOME …``.

The coordinator sends one message to each node, with a payload down and one up, until it has all replies, and then writes
``result.json``. Whatever happens to it, a new one on the same home makes the same messages again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from lichen.client.connection import Connection, Credentials, Status
from lichen.client.mailbox import Mailbox
from lichen.common import records
from lichen.common.channel.spool import Spool
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.store import Store

RUN = 7


def payload(name: str, length: int) -> bytes:
    """A node's update: the same bytes whenever they are made."""
    return hashlib.shake_256(name.encode()).digest(length)


def with_payload(ref: records.PayloadRef, **fields: int | float) -> RecordDict:
    array = records.reference(ref)
    return RecordDict({"task": ConfigRecord(dict(fields)), "payload": ArrayRecord({"payload": array})})


def note(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text + "\n")


async def coordinator(home: Path, port: int, nodes: int, length: int, seconds: float) -> None:
    store = Store(home / "store.sqlite")
    fleet = FleetServer(store, Spool(home / "spool"))
    key, certificate, ca = ((home / name).read_bytes() for name in ("key.pem", "certificate.pem", "ca.pem"))
    bound = await fleet.start(f"127.0.0.1:{port}", key, certificate, ca)
    note(home / "ports", str(bound))
    grid = fleet.grid(RUN)

    def round_of() -> dict[str, str]:
        ref = fleet.spool.add_bytes(payload("model", length))
        ids = [node.node_id for node in store.nodes()]
        assert len(ids) == nodes
        messages = [grid.create_message(with_payload(ref, length=length, seconds=seconds), "train", node, "1") for node in ids]
        replies = grid.send_and_receive(messages)
        return {grid.name_of(reply.metadata.src_node_id): records.payload_refs(reply)[0].digest for reply in replies}

    result = await asyncio.to_thread(round_of)
    (home / "result.new").write_text(json.dumps({"replies": result, "at": time.time()}))
    (home / "result.new").rename(home / "result.json")
    await asyncio.sleep(60)


async def agent(home: Path, address: str, name: str) -> None:
    spool = Spool(home / "spool")

    async def handle(message: Message) -> Message:
        note(home / "handled", message.metadata.message_id)
        task = message.content["task"]
        await asyncio.sleep(float(task["seconds"]))
        ref = await asyncio.to_thread(spool.add_bytes, payload(name, int(task["length"])))
        return records.reply(message, with_payload(ref))

    def tell(status: Status) -> None:
        note(home / "status", f"{time.time()} {status.state}")

    credentials = Credentials(*((home / item).read_bytes() for item in ("ca.pem", "key.pem", "certificate.pem")))
    await Connection(address, lambda: credentials, Mailbox(home / "agent.sqlite"), spool, on_status=tell).run(handle)


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    if role == "coordinator":
        asyncio.run(coordinator(Path(directory), int(rest[0]), int(rest[1]), int(rest[2]), float(rest[3])))
    else:
        asyncio.run(agent(Path(directory), rest[0], rest[1]))
