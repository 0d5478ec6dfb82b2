"""Bad links, counted in bytes: what breaks goes on at its offset, what is there is not sent again, a slow peer is no dead one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from lichen.client.connection import Connection, Credentials, Status
from lichen.client.enrolment import Identity, join, load_identity
from lichen.client.fetch import fetch_model
from lichen.client.mailbox import Mailbox
from lichen.common import records
from lichen.common.channel import framing, retry
from lichen.common.channel.spool import Spool
from lichen.common.channel.transfer import CHUNK, Window
from lichen.common.errors import Code, LichenError
from lichen.common.pki import Authority
from lichen.coordinator.enrolment import EnrolmentService, make_invite
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.models import ModelService
from lichen.coordinator.store import Store
from lichen.simulations.benchmarks.slow_link import HttpProxy, SlowLink

KB = 1024
RUN = 5
SLOW = {"rate": 8000.0, "delay": 0.5}  # 64 kbit/s
OVERHEAD = 30 * KB  # TLS handshakes, envelopes, HTTP/2


def with_payload(ref: records.PayloadRef) -> RecordDict:
    from flwr.app import ArrayRecord

    return RecordDict({"payload": ArrayRecord({"payload": records.reference(ref)})})


class Agent:
    """A real connection whose replies have a payload, in the test's loop; ``made`` counts them."""

    def __init__(self, home: Path, address: str, identity: Identity, length: int, timing: framing.Timing) -> None:
        self.home = home
        self.spool = Spool(home / "spool")
        self.mailbox = Mailbox(home / "agent.sqlite")
        self.made = 0
        self.length = length
        self.statuses: list[Status] = []
        credentials = Credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
        self.connection = Connection(address, lambda: credentials, self.mailbox, self.spool, timing=timing, on_status=self.statuses.append)
        self.task = asyncio.create_task(self.connection.run(self.handle))

    async def handle(self, message: Message) -> Message:
        self.made += 1
        data = hashlib.shake_256(message.metadata.message_id.encode()).digest(self.length)
        return records.reply(message, with_payload(await asyncio.to_thread(self.spool.add_bytes, data)))

    def connected(self) -> list[Status]:
        return [status for status in self.statuses if status.state == "connected"]

    async def stop(self) -> None:
        self.connection.stop()
        await asyncio.wait_for(self.task, 20)
        self.mailbox.close()


class Coordinator:
    """A fleet's listener and an enrolment listener, that can go down and come back on the same port."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.authority = Authority.create(home / "pki")
        self.store = Store(home / "store.sqlite")
        self.spool = Spool(home / "spool")
        self.port = 0
        self.agents: list[Agent] = []
        self.links: list[SlowLink] = []

    async def start(self, timing: framing.Timing | None = None) -> None:
        self.fleet = FleetServer(self.store, self.spool, timing=timing)
        self.enrolment = EnrolmentService(self.store, self.authority)
        key, certificate = self.authority.issue_server(["127.0.0.1", "localhost", "coordinator.test"])
        others = (self.enrolment.renewal_handler(), ModelService(self.store, self.home / "runs").handler())
        self.enrolment_port = await self.enrolment.start("127.0.0.1:0", key, certificate)
        self.port = await self.fleet.start(f"127.0.0.1:{self.port}", key, certificate, self.authority.ca_pem, *others)

    async def stop(self) -> None:
        await self.fleet.stop(0)
        await self.enrolment.stop()

    async def link(self, link: SlowLink) -> str:
        self.links.append(link)
        return await link.start()

    async def enrol(self, name: str) -> Identity:
        invite = make_invite(self.store, self.authority, name, f"127.0.0.1:{self.port}", f"127.0.0.1:{self.enrolment_port}")
        return await asyncio.to_thread(join, invite, self.home / name)

    async def agent(self, address: str, *, name: str = "a", length: int = 100 * KB, timing: framing.Timing | None = None) -> Agent:
        agent = Agent(self.home / name, address, await self.enrol(name), length, timing or framing.Timing())
        self.agents.append(agent)
        return agent

    async def ask(self, group: str, payload: bytes | None = None, timeout: float = 60.0) -> Message:
        """One message to the one node that is there, and its reply."""
        ids = await self.push(group, payload)
        (reply,) = await asyncio.to_thread(lambda: list(self.fleet.grid(RUN).replies(ids, timeout)))
        assert not reply.has_error()
        return reply

    async def push(self, group: str, payload: bytes | None = None) -> list[str]:
        """Only send the message."""
        grid = self.fleet.grid(RUN)
        (node,) = await asyncio.to_thread(grid.wait_for_nodes, 1, 30)
        content = RecordDict() if payload is None else with_payload(await asyncio.to_thread(self.spool.add_bytes, payload))
        return grid.push_messages([grid.create_message(content, "train", node, group)])

    async def close(self) -> None:
        for agent in self.agents:
            if not agent.task.done():
                await agent.stop()
        for link in self.links:
            await link.stop()
        await self.stop()
        self.store.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


def running(coordinator: Coordinator, scenario: Any) -> None:
    """Run a scenario with the coordinator up, and take everything down again."""

    async def run() -> None:
        await coordinator.start()
        try:
            await scenario
        finally:
            await coordinator.close()

    asyncio.run(run())


async def until(condition: Any, seconds: float = 30.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


# What breaks goes on


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_payload_that_breaks_at_several_places_is_sent_once_and_a_little_more(coordinator: Coordinator, way: str) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", rate=200 * KB, delay=0.01)
        agent = await coordinator.agent(await coordinator.link(link), length=800 * KB if way == "up" else 1)
        payload = os.urandom(800 * KB) if way == "down" else None
        asking = asyncio.create_task(coordinator.ask("1", payload))
        for place in (150, 300, 500, 700):
            setattr(link, f"cut_{way}", place * KB)
            await until(lambda: getattr(link, f"cut_{way}") == float("inf"))
        await asking
        assert agent.made == 1
        assert getattr(link, way) < 800 * KB + 4 * 64 * KB + OVERHEAD  # a cut loses what was on its way

    running(coordinator, scenario())


def test_a_coordinator_that_restarts_in_mid_upload_goes_on_at_the_offset(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", rate=200 * KB)
        agent = await coordinator.agent(await coordinator.link(link), length=800 * KB)
        await coordinator.push("1")
        await until(lambda: link.up > 600 * KB)
        await coordinator.stop()
        await coordinator.start()
        await coordinator.ask("1")
        assert agent.made == 1
        second, chunk = 200 * KB, 128 * KB  # what has come is written once a second, and of a chunk nothing before all of it has come
        assert link.up < 800 * KB + second + chunk + OVERHEAD < 600 * KB + 800 * KB

    running(coordinator, scenario())


def test_an_upload_whose_receipt_was_lost_is_acknowledged_and_not_sent_again(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", rate=200 * KB)
        agent = await coordinator.agent(await coordinator.link(link), length=800 * KB)
        asking = asyncio.create_task(coordinator.ask("1"))
        await until(lambda: link.up > 770 * KB)
        link.frozen_down = True
        await asking
        assert agent.mailbox.counts() == (0, 1)
        before = link.up
        link.cut()
        link.frozen_down = False
        await until(lambda: agent.mailbox.counts() == (0, 0))
        assert link.up - before < OVERHEAD
        assert agent.made == 1

    running(coordinator, scenario())


def test_what_has_come_over_a_slow_link_is_in_the_file_before_a_block_is_full(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", rate=40 * KB)
        await coordinator.agent(await coordinator.link(link), length=120 * KB)
        asking = asyncio.create_task(coordinator.ask("1"))
        await until(lambda: link.up > 100 * KB)
        (part,) = coordinator.spool.directory.glob("*.part")
        assert 30 * KB < part.stat().st_size < 120 * KB
        await asking

    running(coordinator, scenario())


def test_a_model_is_fetched_over_a_link_that_breaks_more_often_than_there_are_attempts(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        directory = coordinator.home / "runs" / "1"
        (directory / "model").mkdir(parents=True)
        (directory / "plan.yaml").write_text("name: x\n")
        (directory / "model" / "weights.safetensors").write_bytes(os.urandom(600 * KB))
        run_id = 1
        coordinator.store.add_run(run_id, "{}", "1")
        coordinator.store.set_run_status(run_id, "finished")
        identity = await coordinator.enrol("a")
        link = SlowLink(f"127.0.0.1:{coordinator.port}", rate=400 * KB)
        address = await coordinator.link(link)
        there = Identity(**{**vars(identity), "coordinator": address})
        fetching = asyncio.create_task(asyncio.to_thread(fetch_model, there, coordinator.home / "models"))
        for place in (60, 140, 220, 300, 380, 460, 540):
            link.cut_down = place * KB
            await until(lambda: link.cut_down == float("inf"))
        fetched = await fetching
        assert (fetched.model / "weights.safetensors").read_bytes() == (directory / "model" / "weights.safetensors").read_bytes()
        assert link.down < 600 * KB + 7 * 64 * KB + OVERHEAD

    running(coordinator, scenario())


# Slow is not dead


def test_a_round_over_64_kbit_with_loss_needs_one_connection(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", loss=0.05, **SLOW)
        agent = await coordinator.agent(await coordinator.link(link), length=25 * KB)
        await coordinator.ask("1", os.urandom(25 * KB))
        assert (len(agent.connected()), link.connections, agent.made) == (1, 1, 1)
        assert link.up + link.down < 50 * KB + OVERHEAD

    running(coordinator, scenario())


def test_a_slow_peer_is_kept_and_a_dead_one_found_in_time(coordinator: Coordinator) -> None:
    timing = framing.Timing(heartbeat=0.7, dead=3.5, handshake=20.0)

    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.port}", **SLOW)
        await coordinator.stop()
        await coordinator.start(timing)
        agent = await coordinator.agent(await coordinator.link(link), length=60 * KB, timing=timing)
        began = time.monotonic()
        await coordinator.ask("1")
        assert time.monotonic() - began > 2 * timing.dead  # silent all the while, but for chunks
        assert len(agent.connected()) == 1
        link.forget()
        seconds = await until(lambda: agent.statuses[-1].state != "connected" and not coordinator.fleet.connected())
        assert timing.dead - 2 * timing.heartbeat < seconds < timing.dead + 2.0
        await until(lambda: len(agent.connected()) == 2)

    running(coordinator, scenario())


def on_its_way(rate: float, delay: float, seconds: float, window: Window, now: float = 0.0) -> tuple[list[int], int, float]:
    """Send over a link that is thought up: the chunks, the most that was on its way at the end, and when that was."""
    chunks, travelling, most = [], [], 0
    free, until, ahead = now, now + seconds, 0
    while now < until:
        while (length := window.length(now)) and now < until:
            chunks.append(length)
            ahead += length
            free = max(free, now) + length / rate
            travelling.append((free + 2 * delay, length, window.sent(length, last=False, now=now)))
        due, length, told = travelling.pop(0)
        now = due
        ahead -= length
        most = max(most, ahead) if now > until - seconds / 4 else 0
        if told:
            window.seen(now)
    for now, _, told in travelling:
        if told:
            window.seen(now)
    return chunks, most, now


@pytest.mark.parametrize(("rate", "delay"), [(8e3, 0.5), (1e5, 0.3), (1e6, 0.05), (1e6, 0.4)])
def test_a_link_is_kept_busy_and_little_is_ahead(rate: float, delay: float) -> None:
    chunks, most, _ = on_its_way(rate, delay, 60.0, Window())
    assert sum(chunks) > 0.85 * 60 * rate
    assert most <= max(5 * rate, 32 * KB)
    assert max(chunks[:8]) == 4 * KB  # before the speed is known


def test_a_chunk_becomes_short_where_a_fast_link_becomes_slow() -> None:
    window = Window()
    chunks, _, now = on_its_way(1e6, 0.01, 10.0, window)
    assert chunks[-1] == CHUNK
    chunks, most, _ = on_its_way(8e3, 0.5, 3000.0, window, now)
    assert chunks[-1] == 4 * KB
    assert most <= 32 * KB


def test_a_sender_that_paused_with_bytes_on_their_way_does_not_wait_for_nothing() -> None:
    window = Window()
    _, _, now = on_its_way(1e6, 0.01, 10.0, window)
    assert [window.sent(CHUNK, last=False, now=now) for _ in range(2)] == [True, False]
    window.seen(now)
    assert window.length(now + 5.0) > 0
    assert window.sent(4 * KB, last=False, now=now + 5.0)


# NAT and proxies


@pytest.mark.parametrize(("forgets", "heartbeat", "connections"), [(True, 0.5, 1), (False, 0.5, 1), (True, 60.0, 2), (False, 60.0, 2)])
def test_heartbeats_keep_a_mapping_and_without_them_the_stream_is_made_again(
    coordinator: Coordinator, forgets: bool, heartbeat: float, connections: int
) -> None:
    timing = framing.Timing(heartbeat=heartbeat, dead=2.0)

    async def scenario() -> None:
        await coordinator.stop()
        await coordinator.start(timing)
        link = SlowLink(f"127.0.0.1:{coordinator.port}", idle=1.2, forgets=forgets)
        agent = await coordinator.agent(await coordinator.link(link), timing=timing)
        await until(lambda: len(agent.connected()) == connections)
        if connections == 1:
            await asyncio.sleep(3.0)
            assert link.connections == 1
        await coordinator.ask("1")

    running(coordinator, scenario())


def test_an_agent_joins_fetches_and_works_through_an_http_proxy(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        proxy = HttpProxy({"coordinator.test": "127.0.0.1"}, idle=2.0)
        address = await coordinator.link(proxy)
        monkeypatch.setenv("https_proxy", f"http://ward:secret@{address}")
        monkeypatch.delenv("no_proxy", raising=False)
        fleet, enrolment = (f"coordinator.test:{port}" for port in (coordinator.port, coordinator.enrolment_port))
        invite = make_invite(coordinator.store, coordinator.authority, "a", fleet, enrolment)
        identity = await asyncio.to_thread(join, invite, coordinator.home / "a")
        timing = framing.Timing(heartbeat=0.5, dead=8.0)
        agent = Agent(coordinator.home / "a", identity.coordinator, identity, 100 * KB, timing)
        coordinator.agents.append(agent)
        await until(lambda: bool(agent.connected()))
        await asyncio.sleep(3.0)  # idle, for longer than the proxy permits
        await coordinator.ask("1", os.urandom(10 * KB))
        assert len(agent.connected()) == 1
        with pytest.raises(LichenError) as caught:
            await asyncio.to_thread(fetch_model, identity, coordinator.home / "models")
        assert caught.value.code is Code.NO_MODEL
        assert proxy.asked == [f"CONNECT {place} HTTP/1.1" for place in (enrolment, fleet, fleet)]
        assert proxy.credentials == ["Basic d2FyZDpzZWNyZXQ="] * 3

    running(coordinator, scenario())


def test_this_machine_is_reached_without_the_proxy(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
        await coordinator.agent(f"localhost:{coordinator.port}", length=1)
        await coordinator.ask("1")

    running(coordinator, scenario())


# Many at once


def test_a_fleet_does_not_come_back_at_one_moment(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        agents = [await coordinator.agent(f"127.0.0.1:{coordinator.port}", name=f"n{number}") for number in range(20)]
        await until(lambda: all(agent.connected() for agent in agents))
        await asyncio.sleep(2.1)
        await coordinator.stop()
        await asyncio.sleep(4.0)
        await coordinator.start()
        up = time.time()
        await until(lambda: all(len(agent.connected()) == 2 for agent in agents))
        back = sorted(agent.connected()[1].since - up for agent in agents)
        assert back[-1] < 4.0 / 3 + 1.0  # a quarter of the time that it was away, and what connecting takes
        assert back[18] - back[1] > 0.1  # all but the first and the last
        tries = [sum(status.state == "connecting" for status in agent.statuses) for agent in agents]
        assert max(tries) < 40

    running(coordinator, scenario())


def test_waits_grow_are_drawn_from_zero_on_and_end_at_the_longest() -> None:
    for failures, limit in ((1, 0.5), (3, 2.0), (50, retry.LONGEST)):
        drawn = [retry.backoff(failures) for _ in range(300)]
        assert 0 <= min(drawn) < 0.1 * limit
        assert 0.9 * limit < max(drawn) <= limit


def test_joining_is_tried_again_and_given_up(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        link = SlowLink(f"127.0.0.1:{coordinator.enrolment_port}")
        link.cut_up = 100
        invite = make_invite(coordinator.store, coordinator.authority, "a", "127.0.0.1:7443", await coordinator.link(link))
        identity = await asyncio.to_thread(join, invite, coordinator.home / "a")
        assert (identity.name, link.connections) == ("a", 2)

    running(coordinator, scenario())


# Clocks

SHIFTED = """
import datetime, os, time
_seconds = {seconds}
_time, _datetime = time.time, datetime.datetime
time.time = lambda: _time() + _seconds
class Shifted(_datetime):
    @classmethod
    def now(cls, tz=None):
        return _datetime.now(tz) + datetime.timedelta(seconds=_seconds)
datetime.datetime = Shifted
"""
DAY = 86400


@pytest.mark.parametrize(("days", "works"), [(5, True), (-1.5, True), (-30, False)])
def test_an_agent_whose_clock_is_off_works_or_says_so(coordinator: Coordinator, tmp_path: Path, days: float, works: bool) -> None:
    async def scenario() -> None:
        identity = await coordinator.enrol("a")
        home = tmp_path / "a"
        place = tmp_path / "site"
        place.mkdir()
        (place / "sitecustomize.py").write_text(SHIFTED.format(seconds=days * DAY))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])}
        log = (tmp_path / "log").open("w+")
        command = [sys.executable, "-m", "lichen.common.cli", "client", "run", "--home", str(home)]
        with subprocess.Popen(command, env=environment, stderr=log, stdout=log) as process:
            try:

                def text() -> str:  # as one line: the console breaks them
                    return " ".join((tmp_path / "log").read_text().split())

                if works:
                    await until(coordinator.fleet.connected)
                    grid = coordinator.fleet.grid(RUN)
                    message = grid.create_message(RecordDict(), "train", coordinator.fleet.connected()[0].node_id, "1")
                    (reply,) = await asyncio.to_thread(lambda: grid.send_and_receive([message], timeout=20))
                    assert reply.error.code == Code.FRAME_INVALID  # a message without work: the agent's answer, not the clock's
                    await until(lambda: f"{abs(days) * DAY:.0f} s {'ahead of' if days > 0 else 'behind'} the coordinator's" in text())
                else:
                    await until(lambda: f"error {int(Code.CLOCK_WRONG)} (clock-wrong)" in text())
                    assert "this machine's clock is behind by 672" in text()
                    assert process.poll() is None  # it goes on trying: the clock may be set yet
            finally:
                process.kill()
        assert load_identity(home).certificate == identity.certificate

    running(coordinator, scenario())


def test_a_coordinator_that_is_not_valid_yet_points_at_the_clock(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        identity = await coordinator.enrol("a")
        await coordinator.stop()
        key, certificate = coordinator.authority.issue_server(["127.0.0.1"], now=time.time() + 5 * DAY)
        await coordinator.fleet.start(f"127.0.0.1:{coordinator.port}", key, certificate, coordinator.authority.ca_pem)
        agent = Agent(coordinator.home / "a", f"127.0.0.1:{coordinator.port}", identity, 1, framing.Timing())
        await until(lambda: any(status.error for status in agent.statuses))
        assert "this machine's clock" in str(agent.statuses[-1].error)
        await agent.stop()

    running(coordinator, scenario())
