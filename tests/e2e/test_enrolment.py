"""Joining, renewing and being refused, over real TLS on loopback: each refusal's number at the agent, its cause in the log."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from flwr.app import Message

from lichen.client.connection import Connection, Credentials, Status
from lichen.client.enrolment import IDENTITY_FILE, NODE_FILE, Identity, join, leave, load_identity, renew_if_due
from lichen.client.mailbox import Mailbox
from lichen.common import pki
from lichen.common.channel import enrolment_pb2 as pb
from lichen.common.channel import framing
from lichen.common.channel.refusal import explain
from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError
from lichen.common.invite import Invite
from lichen.common.private_files import write_private
from lichen.coordinator.admission import admit
from lichen.coordinator.enrolment import MAX_REQUEST_BYTES, EnrolmentService, make_invite
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.handshakes import logged_handshakes
from lichen.coordinator.store import Store

DAYS = 90.0
LATE = 0.7 * DAYS * 86400  # seconds after enrolment: less than a third of the validity is left


@dataclasses.dataclass
class Coordinator:
    """A coordinator's enrolment side: both listeners, on a loop of their own."""

    directory: Path
    authority: pki.Authority
    store: Store
    loop: asyncio.AbstractEventLoop
    server: FleetServer
    enrolment: str = ""
    fleet: str = ""

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def invite(self, name: str = "clinic-a", hours: float = 1.0) -> str:
        return make_invite(self.store, self.authority, name, self.fleet, self.enrolment, hours=hours)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    home = tmp_path / "coordinator"
    authority = pki.Authority.create(home / "pki")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    store = Store(home / "store.sqlite")
    coordinator = Coordinator(home, authority, store, loop, FleetServer(store, Spool(home / "spool")))
    service = EnrolmentService(coordinator.store, authority, days=DAYS)
    key, certificate = authority.issue_server(["127.0.0.1"])

    async def start() -> None:
        coordinator.enrolment = f"127.0.0.1:{await service.start('127.0.0.1:0', key, certificate)}"
        port = await coordinator.server.start("127.0.0.1:0", key, certificate, authority.ca_pem, service.renewal_handler())
        coordinator.fleet = f"127.0.0.1:{port}"

    async def stop() -> None:
        await service.stop()
        await coordinator.server.stop(0)

    coordinator.do(start())
    yield coordinator
    coordinator.do(stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    coordinator.store.close()


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def refused(code: Code, call: Callable[..., object], *args: object, **more: object) -> LichenError:
    with pytest.raises(LichenError) as caught:
        call(*args, **more)
    assert caught.value.code is code, str(caught.value)
    return caught.value


def in_log(caplog: pytest.LogCaptureFixture, code: Code, *words: str) -> None:
    """A line of the log holds the number, the name of the error and these words."""
    marks = (f"error {int(code)} ({code.name.lower().replace('_', '-')})", *words)
    assert any(all(mark in line for mark in marks) for line in caplog.messages), caplog.messages


def enrol(coordinator: Coordinator, secret: bytes, csr: bytes) -> bytes:
    """The bare call, as another program might make it."""
    with grpc.secure_channel(coordinator.enrolment, grpc.ssl_channel_credentials(coordinator.authority.ca_pem)) as channel:
        call = channel.unary_unary("/lichen.enrolment.Enrolment/Enrol", pb.EnrolRequest.SerializeToString, pb.Certificate.FromString)
        try:
            return call(pb.EnrolRequest(protocol=1, secret=secret, csr=csr), timeout=10).pem
        except grpc.RpcError as error:
            raise explain(error, coordinator.enrolment) from error


def renew(coordinator: Coordinator, key: bytes | None, certificate: bytes | None, csr: bytes) -> bytes:
    """The bare call, with any certificate or none."""
    credentials = grpc.ssl_channel_credentials(coordinator.authority.ca_pem, key, certificate)
    with grpc.secure_channel(coordinator.fleet, credentials) as channel:
        call = channel.unary_unary("/lichen.enrolment.Renewal/Renew", pb.RenewRequest.SerializeToString, pb.Certificate.FromString)
        try:
            return call(pb.RenewRequest(protocol=1, csr=csr), timeout=10).pem
        except grpc.RpcError as error:
            raise explain(error, coordinator.fleet) from error


def attach(coordinator: Coordinator, home: Path, once_connected: Callable[[], object] | None = None) -> Status:
    """Connect as the agent of ``home`` does, once, and return where that led; then leave, or wait for what the call brings about."""

    def credentials() -> Credentials:
        identity = load_identity(home)
        return Credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)

    async def handle(message: Message) -> Message:
        return message

    async def run() -> Status:
        seen: list[Status] = []

        def note(status: Status) -> None:
            seen.append(status)
            if status.state == "connected":
                if once_connected is None:
                    connection.stop()
                else:
                    asyncio.get_running_loop().run_in_executor(None, once_connected)

        mailbox, spool = Mailbox(home / "agent.sqlite"), Spool(home / "spool")
        connection = Connection(coordinator.fleet, credentials, mailbox, spool, on_status=note)
        try:
            async with asyncio.timeout(10):
                await connection.run(handle)
        finally:
            mailbox.close()
        return next(status for status in seen if status.state == "connected")

    return asyncio.run(run())


def shown(certificate: bytes) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [certificate]}


def test_join_enrols_and_keeps_the_key_private(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "node"
    identity = join(coordinator.invite(), home)
    node = coordinator.store.node_by_name("clinic-a")
    assert node is not None
    assert node.active
    assert node.fingerprint == identity.certificate.fingerprint
    assert admit(coordinator.store, shown(identity.certificate_pem)) == (node, node.fingerprint)
    assert yaml.safe_load((home / NODE_FILE).read_text()) == {
        "format": 1,
        "name": "clinic-a",
        "coordinator": coordinator.fleet,
        "enrolment": coordinator.enrolment,
    }
    assert stat.S_IMODE((home / IDENTITY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "pki").stat().st_mode) == 0o700
    assert sorted(p.name for p in (home / "pki").iterdir()) == ["ca.pem", "identity.pem"]
    assert any("enrolled clinic-a" in line for line in caplog.messages)
    held = b"".join(p.read_bytes() for p in coordinator.directory.rglob("*") if p.is_file())
    assert identity.key_pem not in held
    assert "PRIVATE" not in repr(identity)


def test_a_home_joins_once(coordinator: Coordinator, tmp_path: Path) -> None:
    home = tmp_path / "node"
    first = join(coordinator.invite(), home)
    second = coordinator.invite("clinic-b")
    refused(Code.ALREADY_ENROLLED, join, second, home)
    assert load_identity(home) == first
    assert join(second, home, force=True).name == "clinic-b"
    leave(home)
    refused(Code.AGENT_HOME_MISSING, load_identity, home)
    assert not (home / IDENTITY_FILE).exists()


def test_used_invite(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invite = coordinator.invite()
    join(invite, tmp_path / "node")
    error = refused(Code.INVITE_USED, join, invite, tmp_path / "thief")
    assert error.fix
    assert not (tmp_path / "thief" / NODE_FILE).exists()
    in_log(caplog, Code.INVITE_USED, "clinic-a", "127.0.0.1")


def test_expired_invite(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invite = coordinator.invite(hours=1e-6)
    time.sleep(1)
    refused(Code.INVITE_EXPIRED, join, invite, tmp_path / "node")
    in_log(caplog, Code.INVITE_EXPIRED, "clinic-a")


def test_truncated_invite_needs_no_coordinator(coordinator: Coordinator, tmp_path: Path) -> None:
    error = refused(Code.INVITE_INVALID, join, coordinator.invite()[:-10], tmp_path / "node")
    assert "cut" in error.what
    assert "whole string" in error.fix
    assert not (tmp_path / "node").exists()


def test_wrong_secret(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invite = dataclasses.replace(Invite.decode(coordinator.invite()), secret=secrets.token_bytes(32)).encode()
    refused(Code.INVITE_INVALID, join, invite, tmp_path / "node")
    in_log(caplog, Code.INVITE_INVALID, "no such invite")
    assert coordinator.store.nodes() == []


def test_names_are_given_once(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = coordinator.invite(), coordinator.invite()
    join(first, tmp_path / "one")
    refused(Code.NAME_TAKEN, coordinator.invite)
    refused(Code.NAME_TAKEN, join, second, tmp_path / "two")
    in_log(caplog, Code.NAME_TAKEN, "clinic-a")
    # The invite was not spent on that: once the operator has revoked the old node, it is good.
    coordinator.store.revoke_node("clinic-a", time.time())
    assert join(second, tmp_path / "two").name == "clinic-a"


def test_a_request_cannot_choose_its_name(coordinator: Coordinator) -> None:
    key = pki.make_key()
    certificate = enrol(coordinator, Invite.decode(coordinator.invite()).secret, pki.make_csr(key, "clinic-b"))
    assert pki.check_client_certificate(key, certificate, coordinator.authority.ca_pem, time.time()).name == "clinic-a"
    assert [node.name for node in coordinator.store.nodes()] == ["clinic-a"]
    renewed = renew(coordinator, key, certificate, pki.make_csr(key, "clinic-b"))
    assert pki.read_certificate(renewed).name == "clinic-a"


def test_an_answer_for_another_name_is_not_kept(coordinator: Coordinator, tmp_path: Path) -> None:
    invite = dataclasses.replace(Invite.decode(coordinator.invite("clinic-a")), name="clinic-b")
    refused(Code.CERTIFICATE_INVALID, join, invite.encode(), tmp_path / "node")
    assert not (tmp_path / "node" / NODE_FILE).exists()


def test_a_bad_request_does_not_use_the_invite_up(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invite = coordinator.invite()
    refused(Code.CERTIFICATE_INVALID, enrol, coordinator, Invite.decode(invite).secret, b"no request")
    in_log(caplog, Code.CERTIFICATE_INVALID, "unreadable")
    join(invite, tmp_path / "node")


def test_a_lost_answer_is_given_again_to_the_same_key_only(coordinator: Coordinator, tmp_path: Path) -> None:
    text = coordinator.invite()
    invite = Invite.decode(text)
    # An agent that died before it could store the answer: its key is there, nothing else is.
    key, home = pki.make_key(), tmp_path / "node"
    write_private(home / "pki" / f"joining-{invite.secret_sha256[:16]}.key", key)
    lost = enrol(coordinator, invite.secret, pki.make_csr(key, "clinic-a"))
    refused(Code.INVITE_USED, enrol, coordinator, invite.secret, pki.make_csr(pki.make_key(), "clinic-a"))
    identity = join(text, home)
    assert identity.key_pem == key
    assert identity.certificate_pem == lost
    assert len(coordinator.store.nodes()) == 1
    coordinator.store.revoke_node("clinic-a", time.time())
    refused(Code.INVITE_USED, enrol, coordinator, invite.secret, pki.make_csr(key, "clinic-a"))


def test_one_invite_enrols_one_of_many_at_once(coordinator: Coordinator) -> None:
    secret = Invite.decode(coordinator.invite()).secret

    def attempt(_: int) -> bytes | LichenError:
        try:
            return enrol(coordinator, secret, pki.make_csr(pki.make_key(), "x"))
        except LichenError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(attempt, range(6)))
    assert sum(isinstance(outcome, bytes) for outcome in outcomes) == 1
    assert {o.code for o in outcomes if isinstance(o, LichenError)} == {Code.INVITE_USED}
    assert len(coordinator.store.nodes()) == 1


def test_failed_enrolments_are_limited(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    csr = pki.make_csr(pki.make_key(), "x")
    codes = []
    for _ in range(14):
        with pytest.raises(LichenError) as caught:
            enrol(coordinator, secrets.token_bytes(32), csr)
        codes.append(caught.value.code)
    assert set(codes[:10]) == {Code.INVITE_INVALID}
    assert codes[-1] is Code.CONNECT_FAILED
    assert any("too many failed enrolments" in line for line in caplog.messages)
    assert len(caplog.messages) < 30


def test_large_requests_are_refused_unread(coordinator: Coordinator, tmp_path: Path) -> None:
    invite = coordinator.invite()
    refused(Code.CONNECT_FAILED, enrol, coordinator, b"x" * (MAX_REQUEST_BYTES + 1), b"")
    join(invite, tmp_path / "node")


def test_a_fault_of_the_coordinator_tells_a_stranger_nothing(
    coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    invite = coordinator.invite()
    coordinator.store.close()
    error = refused(Code.CONNECT_FAILED, join, invite, tmp_path / "node")
    assert "database" not in error.what
    assert "error of its own" in error.what
    assert any("database" in (record.exc_text or "") for record in caplog.records)


def test_enrolment_listener_answers_one_call(coordinator: Coordinator) -> None:
    with grpc.secure_channel(coordinator.enrolment, grpc.ssl_channel_credentials(coordinator.authority.ca_pem)) as channel:
        for method in ("/lichen.enrolment.Renewal/Renew", "/lichen.Fleet/Attach", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("impostor", ["node certificate", "other authority"])
def test_an_impostor_gets_no_secret(coordinator: Coordinator, tmp_path: Path, impostor: str) -> None:
    if impostor == "node certificate":
        key = pki.make_key()
        certificate = coordinator.authority.sign_csr(pki.make_csr(key, "x"), "localhost", "node")
    else:
        key, certificate = pki.Authority.create(tmp_path / "other").issue_server(["localhost"])
    service = EnrolmentService(coordinator.store, coordinator.authority)
    port = coordinator.do(service.start("127.0.0.1:0", key, certificate))
    text = coordinator.invite()
    invite = dataclasses.replace(Invite.decode(text), enrolment=f"localhost:{port}")
    error = refused(Code.CONNECT_FAILED, join, invite.encode(), tmp_path / "node")
    assert "did not prove" in error.what
    coordinator.do(service.stop())
    join(text, tmp_path / "node")


def test_renewal_keeps_the_node(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home, store = tmp_path / "node", coordinator.store
    first = join(coordinator.invite(), home)
    before = store.node_by_name("clinic-a")
    assert before is not None
    assert not renew_if_due(home)
    assert load_identity(home) == first
    assert renew_if_due(home, now=time.time() + LATE)
    second = load_identity(home)
    after = store.node_by_name("clinic-a")
    assert after is not None
    assert (second.name, after.node_id) == ("clinic-a", before.node_id)
    assert second.key_pem != first.key_pem
    assert after.fingerprint == second.certificate.fingerprint
    assert any("renewed the certificate of clinic-a" in line for line in caplog.messages)
    # Both are good until the coordinator has seen the new one; then only that.
    for identity in (first, second):
        assert admit(store, shown(identity.certificate_pem))[0].node_id == before.node_id
    store.saw_node(after.node_id, second.certificate.fingerprint, time.time())
    refused(Code.CERTIFICATE_REVOKED, admit, store, shown(first.certificate_pem))
    refused(Code.CERTIFICATE_REVOKED, renew, coordinator, first.key_pem, first.certificate_pem, pki.make_csr(first.key_pem, "x"))
    in_log(caplog, Code.CERTIFICATE_REVOKED, "replaced")


def test_lost_renewals_lock_nobody_out(coordinator: Coordinator, tmp_path: Path) -> None:
    home = tmp_path / "node"
    identity = join(coordinator.invite(), home)
    for _ in range(3):
        renew(coordinator, identity.key_pem, identity.certificate_pem, pki.make_csr(pki.make_key(), "x"))
    assert renew_if_due(home, now=time.time() + LATE)
    assert admit(coordinator.store, shown(load_identity(home).certificate_pem))[0].name == "clinic-a"


def test_revoked_node(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "node"
    identity = join(coordinator.invite(), home)
    coordinator.store.revoke_node("clinic-a", time.time())
    refused(Code.CERTIFICATE_REVOKED, renew_if_due, home, now=time.time() + LATE)
    in_log(caplog, Code.CERTIFICATE_REVOKED, "clinic-a", "revoked")
    # Another may have the name now; the old certificate is not good for it.
    join(coordinator.invite(), tmp_path / "successor")
    refused(Code.CERTIFICATE_REVOKED, renew, coordinator, identity.key_pem, identity.certificate_pem, pki.make_csr(identity.key_pem, "x"))


def test_signed_but_never_enrolled_and_operators_are_no_nodes(
    coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    join(coordinator.invite(), tmp_path / "node")
    key = pki.make_key()
    csr = pki.make_csr(key, "x")
    refused(Code.NODE_UNKNOWN, renew, coordinator, key, coordinator.authority.sign_csr(csr, "stray", "node"), csr)
    in_log(caplog, Code.NODE_UNKNOWN, "stray")
    operator = coordinator.authority.sign_csr(csr, "clinic-a", "operator")
    refused(Code.CERTIFICATE_INVALID, renew, coordinator, key, operator, csr)
    in_log(caplog, Code.CERTIFICATE_INVALID, "operator")
    refused(Code.CERTIFICATE_MISSING, admit, coordinator.store, {})


def spoilt(coordinator: Coordinator, identity: Identity, how: str, directory: Path) -> tuple[bytes | None, bytes | None]:
    """A key and certificate with one fault."""
    key, csr, now = identity.key_pem, pki.make_csr(identity.key_pem, "x"), time.time()
    if how == "none":
        return None, None
    if how == "foreign":
        return key, pki.Authority.create(directory).sign_csr(csr, "clinic-a", "node")
    if how == "expired":
        return key, coordinator.authority.sign_csr(csr, "clinic-a", "node", days=1, now=now - 2 * 86400)
    if how == "not yet valid":
        return key, coordinator.authority.sign_csr(csr, "clinic-a", "node", now=now + 3 * 86400)
    return coordinator.authority.issue_server(["localhost"])


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("none", Code.CERTIFICATE_MISSING),
        ("foreign", Code.CERTIFICATE_FOREIGN),
        ("expired", Code.CERTIFICATE_EXPIRED),
        ("not yet valid", Code.CLOCK_WRONG),
        ("a server's", Code.CERTIFICATE_INVALID),
    ],
)
def test_refused_handshake_has_its_number_at_the_agent_and_in_the_log(
    coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, code: Code
) -> None:
    home = tmp_path / "node"
    identity = join(coordinator.invite(), home)
    key, certificate = spoilt(coordinator, identity, how, tmp_path / "other")
    with logged_handshakes():
        # A program that does not check itself first: the coordinator refuses it, and cannot tell it why.
        refused(Code.CONNECT_FAILED, renew, coordinator, key, certificate, pki.make_csr(identity.key_pem, "x"))
    in_log(caplog, code, "refused a handshake")
    # The agent does check.
    if key is None or certificate is None:
        (home / IDENTITY_FILE).unlink()
    else:
        write_private(home / IDENTITY_FILE, key + certificate)
    error = refused(code, load_identity, home)
    assert error.where.endswith("identity.pem")
    refused(code, renew_if_due, home)
    if code is not Code.CLOCK_WRONG:  # with that it goes on trying: the clock may be set yet
        refused(code, attach, coordinator, home)


def test_an_exposed_key_is_not_used(coordinator: Coordinator, tmp_path: Path) -> None:
    home = tmp_path / "node"
    join(coordinator.invite(), home)
    (home / IDENTITY_FILE).chmod(0o604)
    assert "chmod 600" in refused(Code.KEY_EXPOSED, load_identity, home).fix


def test_node_file_is_checked(coordinator: Coordinator, tmp_path: Path) -> None:
    home = tmp_path / "node"
    refused(Code.AGENT_HOME_MISSING, load_identity, home)
    join(coordinator.invite(), home)
    good = yaml.safe_load((home / NODE_FILE).read_text())
    for content, code in (
        ({**good, "format": 2}, Code.STORE_VERSION),
        ({**good, "coordinator": "nowhere"}, Code.AGENT_HOME_MISSING),
        ({**good, "name": 7}, Code.AGENT_HOME_MISSING),
        ({"format": 1}, Code.AGENT_HOME_MISSING),
        ([], Code.AGENT_HOME_MISSING),
    ):
        (home / NODE_FILE).write_text(yaml.safe_dump(content))
        refused(code, load_identity, home)


def test_unreachable_coordinator(coordinator: Coordinator, tmp_path: Path) -> None:
    invite = dataclasses.replace(Invite.decode(coordinator.invite()), enrolment="127.0.0.1:1")
    error = refused(Code.CONNECT_FAILED, join, invite.encode(), tmp_path / "node", timeout=10)
    assert error.where == "127.0.0.1:1"


def test_enrolled_agent_attaches_and_a_renewed_one_again(coordinator: Coordinator, tmp_path: Path) -> None:
    home, store = tmp_path / "node", coordinator.store
    first = join(coordinator.invite(), home)
    before = attach(coordinator, home)
    assert before.name == "clinic-a"
    assert renew_if_due(home, now=time.time() + LATE)
    after = attach(coordinator, home)
    assert after.node_id == before.node_id
    # The coordinator has seen the new certificate: the old one is out.
    node = store.node_by_name("clinic-a")
    assert node is not None
    assert node.previous_fingerprint is None
    write_private(home / IDENTITY_FILE, first.key_pem + first.certificate_pem)
    refused(Code.CERTIFICATE_REVOKED, attach, coordinator, home)


def test_revocation_ends_a_live_stream_and_stays(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "node"
    join(coordinator.invite(), home)
    began = time.monotonic()
    refused(Code.CERTIFICATE_REVOKED, attach, coordinator, home, lambda: coordinator.server.revoke("clinic-a"))
    assert time.monotonic() - began < 5
    in_log(caplog, Code.CERTIFICATE_REVOKED, "ended the stream of node clinic-a")
    caplog.clear()
    refused(Code.CERTIFICATE_REVOKED, attach, coordinator, home)
    in_log(caplog, Code.CERTIFICATE_REVOKED, "refused an agent", "clinic-a")


def test_streams_are_for_enrolled_nodes(coordinator: Coordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "node"
    identity = join(coordinator.invite(), home)
    csr = pki.make_csr(identity.key_pem, "x")
    # Signed by the right authority, but never given to an enrolled node.
    write_private(home / IDENTITY_FILE, identity.key_pem + coordinator.authority.sign_csr(csr, "stray", "node"))
    refused(Code.NODE_UNKNOWN, attach, coordinator, home)
    in_log(caplog, Code.NODE_UNKNOWN, "refused an agent", "stray")
    operator = coordinator.authority.sign_csr(csr, "clinic-a", "operator")
    with grpc.secure_channel(
        coordinator.fleet, grpc.ssl_channel_credentials(coordinator.authority.ca_pem, identity.key_pem, operator)
    ) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(framing.METHOD)(iter(()), timeout=10))
    assert explain(caught.value, "").code is Code.CERTIFICATE_INVALID
    in_log(caplog, Code.CERTIFICATE_INVALID, "refused an agent", "operator")
