"""The channel over real mutual TLS on loopback: payloads, broken streams, hostile peers, revocation."""

from __future__ import annotations

import asyncio
import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from lichen.client.connection import Connection, Credentials
from lichen.client.mailbox import Mailbox
from lichen.common import records
from lichen.common.channel import framing
from lichen.common.channel.fleet_pb2 import Ack, AgentFrame, Chunk, CoordinatorFrame, Envelope, Hello, Missing, Receipt, Seen, Want, Welcome
from lichen.common.channel.spool import Spool
from lichen.common.channel.transfer import CHUNK
from lichen.common.errors import Code, LichenError
from lichen.common.pki import Authority, fingerprint, make_csr, make_key
from lichen.coordinator.fleet import FleetServer, GrpcGrid
from lichen.coordinator.store import Store
from lichen.simulations.benchmarks.slow_link import SlowLink

MB = 1 << 20
QUICK = framing.Timing(heartbeat=0.1, dead=1.0, handshake=2.0)
RUN = 7


def content(**fields: Any) -> RecordDict:
    return RecordDict({"task": ConfigRecord(fields)})


def with_payload(ref: records.PayloadRef, **fields: Any) -> RecordDict:
    array = records.reference(ref)
    return RecordDict({"task": ConfigRecord(fields), "payload": ArrayRecord({"payload": array})})


def ref_of(data: bytes) -> records.PayloadRef:
    return records.PayloadRef(hashlib.sha256(data).hexdigest(), len(data))


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Agent:
    """A real agent's connection, on the test's loop."""

    def __init__(self, world: World, name: str, address: str | None = None, timing: framing.Timing = framing.Timing()) -> None:  # noqa: B008
        home = world.home / name
        home.mkdir(exist_ok=True)
        self.spool = Spool(home / "spool")
        self.mailbox = Mailbox(home / "agent.sqlite")
        self.handled: list[str] = []
        self.gate: asyncio.Event | None = None
        self.payload = b""
        self.unique = 0
        self._world = world
        self.connection = world.on_loop(self._make(address or world.address, world.credentials(name), timing))
        self.running: Future[None] = asyncio.run_coroutine_threadsafe(self.connection.run(self.handle), world.loop)

    async def _make(self, address: str, credentials: Credentials, timing: framing.Timing) -> Connection:
        return Connection(address, lambda: credentials, self.mailbox, self.spool, timing=timing)

    async def handle(self, message: Message) -> Message:
        self.handled.append(message.metadata.message_id)
        if self.gate is not None:
            await self.gate.wait()
        task = message.content["task"]
        if task.get("fail") == "policy":
            raise LichenError(Code.POLICY_REFUSED, "a secret of this node")
        if task.get("fail") == "bug":
            raise ValueError("a row of this node's data")
        if self.unique:
            self.payload = hashlib.shake_256(message.metadata.message_id.encode()).digest(self.unique)
        if self.payload:
            return records.reply(message, with_payload(await asyncio.to_thread(self.spool.add_bytes, self.payload)))
        return records.reply(message, content(node=message.metadata.dst_node_id))

    def hold(self) -> None:
        """Let handling wait until `let_go`."""

        async def make() -> None:
            self.gate = asyncio.Event()

        self._world.on_loop(make())

    def let_go(self) -> None:
        assert self.gate is not None
        self._world.loop.call_soon_threadsafe(self.gate.set)

    def stop(self) -> None:
        self._world.loop.call_soon_threadsafe(self.connection.stop)
        try:
            self.running.result(10)
        finally:
            self.mailbox.close()


class Raw:
    """An enrolled agent that sends what it likes."""

    def __init__(self, world: World, name: str, *, hello: bool = True) -> None:
        ca, key, certificate = world.credentials(name)
        self._channel = grpc.secure_channel(world.address, grpc.ssl_channel_credentials(ca, key, certificate))
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = self._channel.stream_stream(framing.METHOD, None, None)(iter(self._out.get, None))
        if hello:
            self.send(AgentFrame(hello=Hello(protocol=framing.PROTOCOL, version="9")))
            self.welcome = self.read("welcome").welcome

    def send(self, frame: AgentFrame | bytes) -> None:
        self._out.put(frame if isinstance(frame, bytes) else frame.SerializeToString())

    def read(self, kind: str) -> CoordinatorFrame:
        """The next frame of that kind; others are passed over."""
        for data in self._call:
            frame = CoordinatorFrame.FromString(data)
            if frame.WhichOneof("frame") == kind:
                return frame
        raise AssertionError(f"the stream ended before a {kind} came")

    def ends_with(self) -> tuple[grpc.StatusCode, int | None]:
        """The status and the error number with which the coordinator ends the stream."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self._call:
                pass
        error: Any = caught.value
        number = dict(error.trailing_metadata() or ()).get("lichen-error")
        return error.code(), int(number) if number else None

    def close(self) -> None:
        self._out.put(None)
        self._channel.close()


class World:
    """A coordinator on a loop of its own, and what is needed to enrol agents with it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.authority = Authority.create(home / "pki")
        self.store = Store(home / "store.sqlite")
        self.spool = Spool(home / "spool")
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._credentials: dict[str, Credentials] = {}
        self._closers: list[Callable[[], object]] = []
        self.fleet = self.serve(framing.Timing())

    def serve(self, timing: framing.Timing) -> FleetServer:
        fleet = FleetServer(self.store, self.spool, timing=timing)
        key, certificate = self.authority.issue_server(["127.0.0.1"])
        self.address = f"127.0.0.1:{self.on_loop(fleet.start('127.0.0.1:0', key, certificate, self.authority.ca_pem))}"
        self._closers.append(lambda: self.on_loop(fleet.stop(0)))
        return fleet

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def credentials(self, name: str) -> Credentials:
        if name not in self._credentials:
            key = make_key()
            certificate = self.authority.sign_csr(make_csr(key, name), name, "node")
            self.store.add_node(name, fingerprint(certificate))
            self._credentials[name] = Credentials(self.authority.ca_pem, key, certificate)
        return self._credentials[name]

    def node_id(self, name: str) -> int:
        self.credentials(name)
        node = self.store.node_by_name(name)
        assert node is not None
        return node.node_id

    def agent(self, name: str = "a", **options: Any) -> Agent:
        agent = Agent(self, name, **options)
        self._closers.append(lambda: agent.running.done() or agent.stop())
        return agent

    def proxy(self, **options: Any) -> tuple[SlowLink, str]:
        proxy = SlowLink(self.address, **options)
        self._closers.append(lambda: self.on_loop(proxy.stop()))
        return proxy, self.on_loop(proxy.start())

    def raw(self, name: str = "a", **options: Any) -> Raw:
        raw = Raw(self, name, **options)
        self._closers.append(raw.close)
        return raw

    def grid(self) -> GrpcGrid:
        return self.fleet.grid(RUN)

    def close(self) -> None:
        for closer in reversed(self._closers):
            closer()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_messages_go_out_and_replies_come_back_to_several_threads(world: World) -> None:
    agents = [world.agent(name) for name in ("a", "b", "c")]
    nodes = world.grid().wait_for_nodes(3, 10)
    assert sorted(world.grid().name_of(node) for node in nodes) == ["a", "b", "c"]
    answers: dict[int, list[Message]] = {}

    def round_of(number: int) -> None:
        grid = world.grid()
        messages = [grid.create_message(content(), "train", node, str(number)) for node in nodes]
        answers[number] = grid.send_and_receive(messages, timeout=20)

    threads = [threading.Thread(target=round_of, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for replies in answers.values():
        assert sorted(int(reply.content["task"]["node"]) for reply in replies) == nodes
    assert all(len(set(agent.handled)) == len(agent.handled) == 5 for agent in agents)
    wait_until(lambda: all(agent.mailbox.counts() == (0, 0) for agent in agents))


def test_a_message_made_again_has_the_same_id_and_the_same_reply(world: World) -> None:
    agent = world.agent()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    first = grid.send_and_receive([grid.create_message(content(x=1), "train", node, "1")], timeout=10)
    again = grid.send_and_receive([world.grid().create_message(content(x=2), "train", node, "1")], timeout=10)
    other = grid.create_message(content(), "evaluate", node, "1")
    assert [records.message_to_bytes(item) for item in first] == [records.message_to_bytes(item) for item in again]
    assert len(agent.handled) == 1
    assert other.metadata.message_id not in agent.handled


def test_payloads_cross_complete_both_ways_and_the_same_one_only_once(world: World) -> None:
    down, up = os.urandom(5 * MB + 17), os.urandom(4 * MB + 3)
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    agent.payload = up
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    ref = world.spool.add_bytes(down)
    (reply,) = grid.send_and_receive([grid.create_message(with_payload(ref), "train", node, "1")], timeout=20)
    assert records.payload_refs(reply) == [ref_of(up)]
    assert world.spool.path(ref_of(up).digest).read_bytes() == up
    assert agent.spool.path(ref.digest).read_bytes() == down
    assert all(8 * MB > way > 4 * MB for way in world.fleet.traffic())
    before = proxy.up, proxy.down
    (reply,) = grid.send_and_receive([grid.create_message(with_payload(ref), "train", node, "2")], timeout=20)
    assert records.payload_refs(reply) == [ref_of(up)]
    assert proxy.up - before[0] < 20_000
    assert proxy.down - before[1] < 20_000


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_payload_goes_on_at_its_offset_when_the_stream_breaks(world: World, way: str) -> None:
    data = os.urandom(12 * MB)
    proxy, address = world.proxy()
    setattr(proxy, f"cut_{way}", 7 * MB)
    agent = world.agent(address=address)
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    if way == "up":
        agent.payload = data
        sent = content()
    else:
        sent = with_payload(world.spool.add_bytes(data))
    (reply,) = grid.send_and_receive([grid.create_message(sent, "train", node, "1")], timeout=20)
    assert not reply.has_error()
    assert (world.spool if way == "up" else agent.spool).path(ref_of(data).digest).read_bytes() == data
    assert getattr(proxy, f"cut_{way}") == float("inf")
    # What was in flight when the stream broke is sent twice: the windows of TLS, HTTP/2 and the relay, not what had arrived.
    assert 12 * MB < getattr(proxy, way) < 16 * MB
    assert len(agent.handled) == 1


def test_a_message_delivered_twice_is_handled_once_and_goes_on_while_the_stream_is_broken(world: World) -> None:
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    agent.hold()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    ids = grid.push_messages([grid.create_message(content(), "train", node, "1")])
    wait_until(lambda: agent.handled)
    for _ in range(3):
        began, before = time.monotonic(), agent.connection.status
        world.loop.call_soon_threadsafe(proxy.cut)
        wait_until(lambda before=before: agent.connection.status is not before and agent.connection.status.state == "connected")
        assert time.monotonic() - began < 2.0
    agent.let_go()
    assert len(list(grid.replies(ids, 10))) == 1
    assert agent.handled == ids


def test_a_stream_that_breaks_all_the_time_loses_nothing_and_repeats_nothing(world: World) -> None:
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    agent.unique = 2 * MB
    proxy.rate = 20 * MB
    refs = [world.spool.add_bytes(os.urandom(MB)) for _ in range(12)]
    ids = grid.push_messages(grid.create_message(with_payload(ref), "train", node, str(n)) for n, ref in enumerate(refs))
    chance = random.Random(5)
    cuts = 0
    while len(grid.pull_messages(ids)) < len(ids):
        assert cuts < 300, "no progress"
        cuts += 1
        wait_until(lambda: agent.connection.status.state == "connected")
        time.sleep(chance.uniform(0.02, 0.6))
        world.loop.call_soon_threadsafe(proxy.cut)
    assert cuts > 3
    assert sorted(agent.handled) == sorted(ids)
    assert not any(reply.has_error() for reply in grid.pull_messages(ids))
    wait_until(lambda: agent.mailbox.counts() == (0, 0))


def test_replies_stored_while_the_coordinator_was_unreachable_come_later(world: World) -> None:
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    agent.hold()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    ids = grid.push_messages([grid.create_message(content(), "train", node, str(number)) for number in range(3)])
    wait_until(lambda: len(agent.mailbox.unhandled()) == 3)
    proxy.frozen = True
    agent.let_go()
    wait_until(lambda: agent.mailbox.counts() == (0, 3))
    world.loop.call_soon_threadsafe(proxy.cut)
    proxy.frozen = False
    assert len(list(grid.replies(ids, 10))) == 3
    assert sorted(agent.handled) == sorted(ids)


def test_a_small_message_is_not_held_up_by_a_large_payload(world: World) -> None:
    proxy, address = world.proxy()
    world.agent("slow", address=address)
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    proxy.rate = 10 * MB
    large = grid.push_messages([grid.create_message(with_payload(world.spool.add_bytes(os.urandom(20 * MB))), "train", node, "large")])
    wait_until(lambda: proxy.down > 6 * MB)
    began = time.monotonic()
    (reply,) = grid.send_and_receive([grid.create_message(content(), "query", node, "small")], timeout=20)
    assert not grid.pull_messages(large)
    assert time.monotonic() - began < 1.0
    assert not reply.has_error()
    proxy.rate = float("inf")
    assert len(list(grid.replies(large, 20))) == 1


def test_a_peer_that_reads_nothing_costs_little_memory(world: World) -> None:
    raw = world.raw()
    grid = world.grid()
    ref = world.spool.add_bytes(os.urandom(100 * MB))
    grid.push_messages([grid.create_message(with_payload(ref), "train", world.node_id("a"), "1")])
    raw.read("envelope")
    before = psutil.Process().memory_info().rss
    raw.send(AgentFrame(want=Want(digest=bytes.fromhex(ref.digest))))
    time.sleep(1.5)
    assert psutil.Process().memory_info().rss - before < 24 * MB
    digest, offset = hashlib.sha256(), 0
    while offset < ref.length:
        chunk = raw.read("chunk").chunk
        assert chunk.offset == offset
        digest.update(chunk.data)
        offset += len(chunk.data)
        if chunk.tell:
            raw.send(AgentFrame(seen=Seen()))
    assert digest.hexdigest() == ref.digest


def test_withdrawn_messages_are_dropped_unless_begun(world: World) -> None:
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    agent.hold()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    begun, online, offline, kept = grid.push_messages([grid.create_message(content(), "train", node, str(n)) for n in range(4)])
    wait_until(lambda: agent.handled == [begun] and len(agent.mailbox.unhandled()) == 4)
    assert grid.cancel([online, "f" * 32]) == [online]
    wait_until(lambda: len(agent.mailbox.unhandled()) == 3)
    proxy.frozen = True
    world.loop.call_soon_threadsafe(proxy.cut)
    grid.cancel([begun, offline])
    proxy.frozen = False
    wait_until(lambda: len(agent.mailbox.unhandled()) == 2)
    agent.let_go()
    assert [reply.metadata.reply_to_message_id for reply in grid.replies([kept, begun], 2.0)] == [kept]
    assert agent.handled == [begun, kept]
    wait_until(lambda: agent.mailbox.counts() == (0, 0))


def test_a_reply_that_is_withdrawn_on_its_way_is_sent_no_further(world: World) -> None:
    proxy, address = world.proxy()
    agent = world.agent(address=address)
    agent.payload = os.urandom(30 * MB)
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    proxy.rate = 10 * MB
    ids = grid.push_messages([grid.create_message(content(), "train", node, "1")])
    wait_until(lambda: proxy.up > 3 * MB)
    assert grid.cancel(ids) == ids
    wait_until(lambda: agent.mailbox.counts() == (0, 0), 5)
    time.sleep(0.3)
    assert proxy.up < 15 * MB
    proxy.rate = float("inf")
    (reply,) = grid.send_and_receive([grid.create_message(content(), "train", node, "2")], timeout=20)
    assert records.payload_refs(reply) == [ref_of(agent.payload)]
    assert proxy.up < 36 * MB  # it went on where it had been stopped
    (again,) = grid.send_and_receive([grid.create_message(content(), "train", node, "1")], timeout=20)
    assert agent.handled == [*ids, reply.metadata.reply_to_message_id]
    assert records.payload_refs(again) == records.payload_refs(reply)


def test_a_handler_s_error_is_told_by_number_only(world: World) -> None:
    world.agent()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    for fail, code in (("policy", Code.POLICY_REFUSED), ("bug", Code.INTERNAL)):
        (reply,) = grid.send_and_receive([grid.create_message(content(fail=fail), "train", node, fail)], timeout=10)
        assert reply.error.code == code
        assert not reply.error.reason


def test_a_wait_ends_in_time_and_when_it_is_interrupted(world: World) -> None:
    grid = world.grid()
    node = world.node_id("offline")
    message = grid.create_message(content(), "train", node, "1")
    began = time.monotonic()
    assert grid.send_and_receive([message], timeout=0.3) == []
    assert 0.3 <= time.monotonic() - began < 1.0
    threading.Timer(0.2, grid.interrupt, [LichenError(Code.RUN_STOPPED, "stopped")]).start()
    for _ in range(2):
        with pytest.raises(LichenError) as caught:
            grid.send_and_receive([message], timeout=10)
        assert caught.value.code is Code.RUN_STOPPED


def test_payloads_go_when_their_messages_are_released(world: World) -> None:
    agent = world.agent()
    agent.payload = b"update" * 1000
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    ref = world.spool.add_bytes(b"model" * 1000)
    message = grid.create_message(with_payload(ref), "train", node, "1")
    grid.send_and_receive([message], timeout=10)
    assert world.fleet.collect(min_age=-1) == 0
    grid.release([message.metadata.message_id])
    assert world.fleet.collect({ref.digest}, min_age=-1) == 6000
    assert world.spool.has(ref.digest)


def test_a_message_whose_payload_is_not_there_is_refused_before_it_is_sent(world: World) -> None:
    grid = world.grid()
    node = world.node_id("a")
    for broken in (with_payload(ref_of(b"not here")), content(big="x" * (framing.MAX_ENVELOPE + 1))):
        with pytest.raises(LichenError) as caught:
            grid.push_messages([grid.create_message(broken, "train", node, "1")])
        assert caught.value.code is Code.FRAME_INVALID
    assert world.store.outstanding(node) == []


# Peers that are not what they should be


def test_revoking_a_node_ends_its_stream_at_once_and_who_waits_for_it_is_told(world: World) -> None:
    agent = world.agent()
    agent.hold()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    (message_id,) = grid.push_messages([grid.create_message(content(), "train", node, "1")])
    wait_until(lambda: agent.handled)
    began = time.monotonic()
    world.fleet.revoke("a")
    with pytest.raises(LichenError) as caught:
        agent.running.result(5)
    assert time.monotonic() - began < 3.0
    assert caught.value.code is Code.CERTIFICATE_REVOKED
    assert grid.get_node_ids() == []
    (reply,) = grid.replies([message_id], 5)
    assert reply.error.code == Code.CERTIFICATE_REVOKED
    (reply,) = grid.send_and_receive([grid.create_message(content(), "train", node, "2")], timeout=5)
    assert reply.error.code == Code.CERTIFICATE_REVOKED


def test_a_second_agent_with_the_same_certificate_replaces_the_first(world: World) -> None:
    first = world.agent()
    grid = world.grid()
    (node,) = grid.wait_for_nodes(1, 10)
    second = world.raw()
    with pytest.raises(LichenError) as caught:
        first.running.result(5)
    assert caught.value.code is Code.AGENT_IN_USE
    assert grid.get_node_ids() == [node]
    grid.push_messages([grid.create_message(content(), "train", node, "1")])
    second.read("envelope")


def test_no_certificate_and_one_of_another_authority_are_refused(world: World) -> None:
    other = Authority.create(world.home / "other")
    key = make_key()
    foreign = other.sign_csr(make_csr(key, "a"), "a", "node")
    for credentials in (
        grpc.ssl_channel_credentials(world.authority.ca_pem),
        grpc.ssl_channel_credentials(world.authority.ca_pem, key, foreign),
        grpc.ssl_channel_credentials(other.ca_pem, *world.credentials("a")[1:]),
    ):
        with grpc.secure_channel(world.address, credentials) as channel:
            call: Any = channel.stream_stream(framing.METHOD, None, None)(iter([]), timeout=5)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert world.fleet.connected() == []


def test_an_address_in_use_is_told_by_number(world: World) -> None:
    key, certificate = world.authority.issue_server(["127.0.0.1"])
    with pytest.raises(LichenError) as caught:
        world.on_loop(FleetServer(world.store, world.spool).start(world.address, key, certificate, world.authority.ca_pem))
    assert caught.value.code is Code.SERVICE_UNREACHABLE


def test_an_agent_of_another_protocol_is_told_so(world: World) -> None:
    raw = world.raw(hello=False)
    raw.send(AgentFrame(hello=Hello(protocol=framing.PROTOCOL + 1, version="9.0")))
    assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.PROTOCOL_VERSION)


def test_a_silent_peer_is_given_up_on_both_ends(world: World) -> None:
    world.fleet = world.serve(QUICK)
    raw = world.raw("silent")
    began = time.monotonic()
    wait_until(lambda: world.fleet.connected() == [], 5)
    assert 0.9 < time.monotonic() - began < 3.0
    raw.close()
    proxy, address = world.proxy()
    agent = world.agent(address=address, timing=QUICK)
    wait_until(world.fleet.connected)
    time.sleep(1.5)  # longer than a silence may be: heartbeats hold the stream
    assert agent.connection.status.state == "connected"
    proxy.frozen = True
    began = time.monotonic()
    wait_until(lambda: agent.connection.status.state != "connected" and world.fleet.connected() == [], 5)
    assert time.monotonic() - began < 3.0
    world.loop.call_soon_threadsafe(proxy.cut)
    proxy.frozen = False
    wait_until(lambda: agent.connection.status.state == "connected", 5)


def test_an_agent_that_says_nothing_at_all_is_shut_out(world: World) -> None:
    world.fleet = world.serve(QUICK)
    raw = world.raw(hello=False)
    with pytest.raises(AssertionError):
        raw.read("welcome")


PAYLOAD = b"z" * 300_000
DIGEST = hashlib.sha256(PAYLOAD).digest()


def replying(world: World, raw: Raw, **changed: Any) -> tuple[str, bytes]:
    """Give the raw agent a message, and make its reply with `PAYLOAD`."""
    grid = world.grid()
    grid.push_messages([grid.create_message(content(), "train", world.node_id("a"), "1")])
    envelope = raw.read("envelope").envelope
    message = records.message_from_bytes(envelope.message)
    length = changed.pop("length", len(PAYLOAD))
    reply = records.reply(message, with_payload(records.PayloadRef(DIGEST.hex(), length)))
    return envelope.message_id, records.message_to_bytes(reply)


CHUNKS: dict[str, Chunk] = {
    "an offset beyond the length": Chunk(digest=DIGEST, offset=10**12, data=b"z"),
    "an offset that leaves a gap": Chunk(digest=DIGEST, offset=1, data=b"z"),
    "another payload": Chunk(digest=b"\x00" * 32, offset=0, data=b"z"),
    "a chunk too long": Chunk(digest=DIGEST, offset=0, data=b"z" * (framing.MAX_CHUNK + 1)),
    "an empty chunk": Chunk(digest=DIGEST, offset=0),
    "a digest too short": Chunk(digest=DIGEST[:31], offset=0, data=b"z"),
}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_a_chunk_that_was_not_asked_for_ends_the_stream(world: World, chunk: Chunk) -> None:
    raw = world.raw()
    message_id, reply = replying(world, raw)
    raw.send(AgentFrame(envelope=Envelope(message_id=message_id, message=reply)))
    assert raw.read("want").want == Want(digest=DIGEST)
    raw.send(AgentFrame(chunk=chunk))
    assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.FRAME_INVALID)
    assert not world.spool.has(DIGEST.hex())
    assert world.grid().pull_messages([message_id]) == []


FRAMES: dict[str, bytes | AgentFrame] = {
    "bytes that are no frame": b"\xff" * 50,
    "an empty frame": b"",
    "a second hello": AgentFrame(hello=Hello(protocol=framing.PROTOCOL, version="1")),
    "a name too long": AgentFrame(ack=Ack(message_id="a" * 10_000)),
    "a path for a name": AgentFrame(ack=Ack(message_id="../../../etc/passwd")),
    "a reply that is no message": AgentFrame(envelope=Envelope(message_id="0" * 32, message=b"\xff\xff")),
    "a chunk out of nothing": AgentFrame(chunk=Chunk(digest=DIGEST, data=b"z")),
    "a chunk seen that was not sent": AgentFrame(seen=Seen()),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_a_frame_that_is_not_the_protocol_s_ends_the_stream(world: World, frame: bytes | AgentFrame) -> None:
    raw = world.raw()
    message_id, _ = replying(world, raw)
    if isinstance(frame, AgentFrame) and frame.WhichOneof("frame") == "envelope":
        frame = AgentFrame(envelope=Envelope(message_id=message_id, message=frame.envelope.message))
    raw.send(frame)
    assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.FRAME_INVALID)


def test_a_reply_in_another_s_name_or_to_another_message_ends_the_stream(world: World) -> None:
    for number, forge in enumerate(("node", "message")):
        raw = world.raw()
        grid = world.grid()
        grid.push_messages([grid.create_message(content(), "train", world.node_id("a"), str(number))])
        envelope = raw.read("envelope").envelope
        forged = records.build_message(
            content(),
            run_id=RUN,
            message_id="0" * 32 if forge == "message" else envelope.message_id,
            src_node_id=1,
            dst_node_id=world.node_id("b") if forge == "node" else world.node_id("a"),
            message_type="train",
            group_id="1",
        )
        data = records.message_to_bytes(records.reply(forged, content()))
        raw.send(AgentFrame(envelope=Envelope(message_id=envelope.message_id, message=data)))
        assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.FRAME_INVALID)
        assert grid.pull_messages([envelope.message_id]) == []
        world.store.release([envelope.message_id], time.time())


def test_a_reply_to_a_message_of_another_node_is_not_taken(world: World) -> None:
    grid = world.grid()
    message = grid.create_message(content(), "train", world.node_id("b"), "1")
    grid.push_messages([message])
    raw = world.raw("a")
    data = records.message_to_bytes(records.reply(message, content()))
    raw.send(AgentFrame(envelope=Envelope(message_id=message.metadata.message_id, message=data)))
    assert raw.read("receipt").receipt == Receipt(message_id=message.metadata.message_id, stored=False)
    assert grid.pull_messages([message.metadata.message_id]) == []


def test_a_payload_is_given_only_to_whom_a_message_with_it_was_sent(world: World) -> None:
    ref = world.spool.add_bytes(os.urandom(1000))
    raw = world.raw("a")
    raw.send(AgentFrame(want=Want(digest=bytes.fromhex(ref.digest))))
    assert raw.read("missing").missing == Missing(digest=bytes.fromhex(ref.digest))
    grid = world.grid()
    grid.push_messages([grid.create_message(with_payload(ref), "train", world.node_id("a"), "1")])
    raw.read("envelope")
    raw.send(AgentFrame(want=Want(digest=bytes.fromhex(ref.digest), offset=900)))
    assert len(raw.read("chunk").chunk.data) == 100
    raw.send(AgentFrame(want=Want(digest=bytes.fromhex(ref.digest), offset=1001)))
    assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.FRAME_INVALID)


def test_a_corrupt_payload_is_refused_and_a_node_that_has_no_better_one_is_answered_for(world: World) -> None:
    for attempt in range(3):
        raw = world.raw()
        message_id, reply = replying(world, raw)
        raw.send(AgentFrame(envelope=Envelope(message_id=message_id, message=reply)))
        assert raw.read("want").want == Want(digest=DIGEST)
        for offset in range(0, len(PAYLOAD), CHUNK):
            raw.send(AgentFrame(chunk=Chunk(digest=DIGEST, offset=offset, data=b"y" * min(CHUNK, len(PAYLOAD) - offset))))
        if attempt < 2:
            assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.PAYLOAD_CORRUPT)
        else:
            raw.read("receipt")
        assert not world.spool.has(DIGEST.hex())
    (answer,) = world.grid().replies([message_id], 5)
    assert answer.error.code == Code.PAYLOAD_CORRUPT


def test_a_payload_that_its_sender_has_lost_becomes_an_error_reply(world: World) -> None:
    raw = world.raw()
    message_id, reply = replying(world, raw)
    raw.send(AgentFrame(envelope=Envelope(message_id=message_id, message=reply)))
    raw.read("want")
    raw.send(AgentFrame(missing=Missing(digest=DIGEST)))
    (answer,) = world.grid().replies([message_id], 5)
    assert answer.error.code == Code.PAYLOAD_CORRUPT


def test_a_payload_longer_than_any_disk_is_refused(world: World) -> None:
    raw = world.raw()
    message_id, reply = replying(world, raw, length=2**63)
    raw.send(AgentFrame(envelope=Envelope(message_id=message_id, message=reply)))
    assert raw.ends_with() == (grpc.StatusCode.PERMISSION_DENIED, Code.FRAME_INVALID)


# A coordinator that is not what it should be


class Script:
    """A coordinator that follows a script: it takes replies, and sends what the test says."""

    def __init__(self, world: World) -> None:
        self.node_id = world.node_id("a")
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.frames: list[CoordinatorFrame] = []
        self.chunk: Chunk | None = None  # the answer to a want
        self._world = world

    async def start(self) -> str:
        key, certificate = self._world.authority.issue_server(["127.0.0.1"])
        credentials = grpc.ssl_server_credentials([(key, certificate)], self._world.authority.ca_pem, require_client_auth=True)
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(self._attach)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(framing.SERVICE, {"Attach": handler}),))
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _attach(self, frames: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        welcome = Welcome(protocol=framing.PROTOCOL, version="1", node_id=self.node_id, name="a", outstanding=[ID])
        await context.write(CoordinatorFrame(welcome=welcome).SerializeToString())
        for frame in self.frames:
            await context.write(frame.SerializeToString())
        async for data in frames:
            frame = AgentFrame.FromString(data)
            if frame.WhichOneof("frame") == "want" and self.chunk:
                await context.write(CoordinatorFrame(chunk=self.chunk).SerializeToString())
            if frame.WhichOneof("frame") == "envelope":
                self.replies.put(data)
                return  # without a receipt


ID = "ab" * 16


@pytest.fixture
def script(world: World) -> Iterator[tuple[Script, str]]:
    script = Script(world)
    address = world.on_loop(script.start())
    yield script, address
    world.on_loop(script.stop())


def envelope_to(node_id: int, record: RecordDict, message_id: str = ID) -> CoordinatorFrame:
    message = records.build_message(
        record, run_id=RUN, message_id=message_id, src_node_id=1, dst_node_id=node_id, message_type="train", group_id="1"
    )
    return CoordinatorFrame(envelope=Envelope(message_id=ID, message=records.message_to_bytes(message)))


def test_a_reply_that_was_not_receipted_is_sent_again_as_the_same_bytes(world: World, script: tuple[Script, str]) -> None:
    coordinator, address = script
    coordinator.frames = [envelope_to(coordinator.node_id, content())]
    agent = world.agent(address=address)
    first, second, third = (coordinator.replies.get(timeout=10) for _ in range(3))
    assert first == second == third
    assert agent.handled == [ID]


@pytest.mark.parametrize(
    "frame",
    [
        envelope_to(1, content()),
        envelope_to(2, content(), message_id="cd" * 16),
        CoordinatorFrame(chunk=Chunk(digest=DIGEST, data=b"z")),
        CoordinatorFrame(welcome=Welcome(protocol=framing.PROTOCOL, version="1", node_id=5, name="a")),
        CoordinatorFrame(),
    ],
    ids=[
        "a message to another node",
        "a message under another's id",
        "a chunk out of nothing",
        "a second welcome",
        "an empty frame",
    ],
)
def test_an_agent_leaves_a_coordinator_that_breaks_the_protocol(world: World, script: tuple[Script, str], frame: CoordinatorFrame) -> None:
    coordinator, address = script
    coordinator.frames = [frame]
    agent = world.agent(address=address)
    wait_until(lambda: (error := agent.connection.status.error) is not None and error.code is Code.FRAME_INVALID)
    assert agent.handled == []
    assert agent.mailbox.unhandled() == []


def test_an_agent_that_is_sent_corrupt_payloads_says_so_in_the_end(world: World, script: tuple[Script, str]) -> None:
    coordinator, address = script
    coordinator.frames = [envelope_to(coordinator.node_id, with_payload(records.PayloadRef(DIGEST.hex(), 1000)))]
    coordinator.chunk = Chunk(digest=DIGEST, data=b"y" * 1000)
    agent = world.agent(address=address)
    reply = AgentFrame.FromString(coordinator.replies.get(timeout=10)).envelope
    assert records.message_from_bytes(reply.message).error.code == Code.PAYLOAD_CORRUPT
    assert agent.handled == []
    assert not agent.spool.has(DIGEST.hex())
