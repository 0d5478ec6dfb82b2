"""The channel when its processes are killed: nothing is handled twice, nothing is lost, all are back quickly."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen.client.mailbox import Mailbox
from lichen.common.pki import Authority, fingerprint, make_csr, make_key
from lichen.coordinator.store import Store

SCRIPT = Path(__file__).with_name("channel_processes.py")
NAMES = ("a", "b")


def digest_of(name: str, length: int) -> str:
    return hashlib.sha256(hashlib.shake_256(name.encode()).digest(length)).hexdigest()


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Federation:
    """Homes, certificates and processes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.length = 1 << 20
        self.seconds = 0.0
        authority = Authority.create(home / "pki")
        self.write("coordinator", *authority.issue_server(["127.0.0.1"]), authority.ca_pem)
        store = Store(home / "coordinator" / "store.sqlite")
        for name in NAMES:
            key = make_key()
            certificate = authority.sign_csr(make_csr(key, name), name, "node")
            store.add_node(name, fingerprint(certificate))
            self.write(name, key, certificate, authority.ca_pem)
        store.close()
        self.port = 0

    def write(self, name: str, key: bytes, certificate: bytes, ca: bytes) -> None:
        (self.home / name).mkdir()
        for file, data in (("key.pem", key), ("certificate.pem", certificate), ("ca.pem", ca)):
            (self.home / name / file).write_bytes(data)

    def start(self, name: str) -> None:
        if name == "coordinator":
            starts = self.lines("coordinator", "ports")
            rest = [self.port, len(NAMES), self.length, self.seconds]
        else:
            rest = [f"127.0.0.1:{self.port}", name]
        role = "coordinator" if name == "coordinator" else "agent"
        self.processes[name] = subprocess.Popen([sys.executable, str(SCRIPT), role, str(self.home / name), *map(str, rest)])
        if name == "coordinator":
            wait_until(lambda: len(self.lines("coordinator", "ports")) > len(starts))
            self.port = int(self.lines("coordinator", "ports")[-1])

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def lines(self, name: str, file: str) -> list[str]:
        path = self.home / name / file
        return path.read_text().splitlines() if path.exists() else []

    def handled(self) -> list[int]:
        """How many messages each agent has begun to handle."""
        return [len(self.lines(name, "handled")) for name in NAMES]

    def result(self) -> dict[str, Any]:
        path = self.home / "coordinator" / "result.json"
        wait_until(path.exists)
        result: dict[str, Any] = json.loads(path.read_text())
        assert result["replies"] == {name: digest_of(name, self.length) for name in NAMES}
        for digest in result["replies"].values():
            assert hashlib.sha256((self.home / "coordinator" / "spool" / digest).read_bytes()).hexdigest() == digest
        return result


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    for name in list(federation.processes):
        federation.kill(name)


def test_a_coordinator_killed_in_mid_round_gets_the_replies_made_meanwhile_and_nobody_works_twice(federation: Federation) -> None:
    federation.seconds = 1.5
    for name in ("coordinator", *NAMES):
        federation.start(name)
    wait_until(lambda: federation.handled() == [1, 1])
    federation.kill("coordinator")
    time.sleep(2.0)  # the agents finish their work alone
    federation.start("coordinator")
    up = time.time()
    assert federation.result()["at"] - up < 2.0 + 1.0  # reconnected in under 2 s; the rest is for two payloads
    for name in NAMES:
        connected = [float(line.split()[0]) for line in federation.lines(name, "status") if line.endswith(" connected")]
        assert len(connected) == 2
        assert connected[-1] - up < 2.0
    assert federation.handled() == [1, 1]


def test_a_coordinator_killed_in_mid_upload_goes_on_where_it_was(federation: Federation) -> None:
    federation.length = 64 << 20
    for name in ("coordinator", *NAMES):
        federation.start(name)
    spool = federation.home / "coordinator" / "spool"

    def arriving() -> list[int]:
        return [path.stat().st_size for path in spool.glob("*.part")]

    wait_until(lambda: sum(arriving()) > 16 << 20)
    federation.kill("coordinator")
    partial = arriving()
    federation.start("coordinator")
    wait_until(lambda: arriving() or list(spool.glob(digest_of("a", federation.length))))
    assert partial
    assert not arriving() or max(arriving()) >= min(partial)  # it was not begun anew
    federation.result()
    assert federation.handled() == [1, 1]


def test_an_agent_killed_in_mid_work_handles_its_message_again_when_it_is_back(federation: Federation) -> None:
    federation.seconds = 1.0
    for name in ("coordinator", *NAMES):
        federation.start(name)
    wait_until(lambda: federation.handled() == [1, 1])
    federation.kill("a")
    federation.start("a")
    began = time.monotonic()
    wait_until(lambda: federation.handled() == [2, 1])
    assert time.monotonic() - began < 5.0
    federation.result()
    assert len(set(federation.lines("a", "handled"))) == 1


def test_a_reply_survives_both_ends_and_is_not_made_again(federation: Federation) -> None:
    federation.seconds = 1.0
    for name in ("coordinator", *NAMES):
        federation.start(name)
    wait_until(lambda: federation.handled() == [1, 1])
    federation.kill("coordinator")
    mailbox = Mailbox(federation.home / "a" / "agent.sqlite")
    wait_until(lambda: mailbox.counts() == (0, 1))
    (message_id,) = mailbox.unreceipted()
    reply = mailbox.reply(message_id)
    mailbox.close()
    federation.kill("a")
    federation.start("coordinator")
    federation.start("a")
    federation.result()
    assert federation.handled() == [1, 1]
    store = Store(federation.home / "coordinator" / "store.sqlite")
    assert store.reply(message_id) == reply
    store.close()
