"""Invites, enrolment and renewal of certificates: how a node becomes known to the coordinator, and stays so.

Enrolment has a listener of its own, where only the server proves itself, and which answers one call. Renewal is a call on the
fleet's listener, under mutual TLS.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
import grpc.aio

from lichen.common.channel import enrolment_pb2 as pb
from lichen.common.channel.refusal import refuse
from lichen.common.errors import Code, LichenError
from lichen.common.invite import SECRET_BYTES, Invite, check_address
from lichen.common.pki import CLIENT_DAYS, Authority, check_name, fingerprint, read_certificate, same_key
from lichen.coordinator.admission import admit, one_line
from lichen.coordinator.store import Store

PROTOCOL = 1
MAX_REQUEST_BYTES = 16_384
MAX_CONCURRENT_CALLS = 32

_log = logging.getLogger(__name__)


def make_invite(store: Store, authority: Authority, name: str, fleet_address: str, enrol_address: str, *, hours: float = 24) -> str:
    """Make an invite for a node; the store keeps the hash of its secret, so this string is the only copy.

    Args:
        store: the coordinator's store.
        authority: the federation's authority, whose certificate the invite carries.
        name: the node's name, which its certificate will bear.
        fleet_address: `host:port` of the fleet's listener, as agents reach it.
        enrol_address: `host:port` of the enrolment listener, as agents reach it.
        hours: how long the invite is good.

    Raises:
        LichenError: CERTIFICATE_INVALID if the name is not a node name; NAME_TAKEN if an active node has it; INVITE_INVALID if an
            address is not `host:port` or ``hours`` is not positive.
    """
    check_name(name)
    node = store.node_by_name(name)
    if node is not None and node.active:
        raise LichenError(
            Code.NAME_TAKEN,
            f"a node named {name!r} is enrolled already",
            fix=f"Choose another name, or `lichen coordinator revoke {name}`.",
        )
    if not hours > 0:
        raise LichenError(Code.INVITE_INVALID, f"an invite cannot be good for {hours} hours", fix="Give a positive number of hours.")
    invite = Invite(
        name=name,
        fleet=check_address(fleet_address),
        enrolment=check_address(enrol_address),
        ca_pem=authority.ca_pem,
        secret=secrets.token_bytes(SECRET_BYTES),
        expires_at=int(time.time() + hours * 3600),
    )
    store.add_invite(name, invite.secret_sha256, invite.expires_at)
    return invite.encode()


class EnrolmentService:
    """Answers agents that enrol, on its own listener, and agents that renew, on the fleet's.

    Args:
        store: the coordinator's store.
        authority: signs the certificates.
        days: validity of the certificates that it gives.
    """

    def __init__(self, store: Store, authority: Authority, *, days: float = CLIENT_DAYS) -> None:
        self._store = store
        self._authority = authority
        self._days = days
        self._failures = _Failures()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, server_key: bytes, server_certificate: bytes) -> int:
        """Listen at ``address`` (`host:port`, port 0 for any) with the server's key and certificate (PEM); returns the port.

        Raises:
            LichenError: CONNECT_FAILED if it cannot listen there.
        """
        server = grpc.aio.server(
            handlers=[_handler("Enrolment", "Enrol", self._enrol, pb.EnrolRequest)],
            options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        try:
            port = server.add_secure_port(address, grpc.ssl_server_credentials([(server_key, server_certificate)]))
        except RuntimeError as error:
            raise LichenError(Code.CONNECT_FAILED, f"cannot listen for enrolments: {error}", where=address, fix="Free the port.") from error
        await server.start()
        self._server = server
        return port

    async def stop(self) -> None:
        """Stop listening; calls under way get a second to end."""
        if self._server is not None:
            await self._server.stop(1)
            self._server = None

    def renewal_handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The renewal call, to be registered on the fleet's listener, which must require client certificates."""
        return _handler("Renewal", "Renew", self._renew, pb.RenewRequest)

    async def _enrol(self, request: pb.EnrolRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Certificate:
        peer = context.peer()
        host = peer.rpartition(":")[0]
        if not self._failures.permit(host, time.monotonic()):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many failed enrolments from this address")
        try:
            # Out of the event loop: the store waits for the disk.
            return pb.Certificate(pem=await asyncio.to_thread(self._certificate_for, request, peer))
        except LichenError as error:
            self._failures.count(host, time.monotonic())
            _log.warning("refused an enrolment from %s: %s", peer, one_line(error))
            await refuse(context, error)
        except Exception:  # whatever it is, a stranger is not told its text
            _log.exception("an enrolment from %s failed", peer)
            await context.abort(grpc.StatusCode.INTERNAL, "the coordinator met an error of its own; its log has it")

    def _certificate_for(self, request: pb.EnrolRequest, peer: str) -> bytes:
        _check_protocol(request.protocol)
        secret_sha256 = hashlib.sha256(request.secret).hexdigest()
        repeated = self._answered_before(secret_sha256, request.csr)
        if repeated is not None:
            _log.info("answered an enrolment from %s again", peer)
            return repeated

        def issue(name: str) -> tuple[bytes, str]:
            certificate = self._authority.sign_csr(request.csr, name, "node", self._days)
            return certificate, fingerprint(certificate)

        invite = self._store.enrol(secret_sha256, issue, time.time())
        certificate = invite.certificate or b""
        self._store.note_certificate(invite.name, read_certificate(certificate).not_after)
        _log.info("enrolled %s from %s, certificate %s", invite.name, peer, fingerprint(certificate))
        return certificate

    def _answered_before(self, secret_sha256: str, csr: bytes) -> bytes | None:
        """The certificate that this secret and this key were given already: for an agent whose answer was lost.

        Who asks holds the secret and, by the request's signature, the key: nobody else could use the answer.
        """
        invite = self._store.invite(secret_sha256)
        if invite is None or invite.certificate is None or not same_key(invite.certificate, csr):
            return None
        node = self._store.node_by_name(invite.name)
        if node is None or not node.active or not node.accepts(fingerprint(invite.certificate)):
            return None
        return invite.certificate

    async def _renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Certificate:
        try:
            auth_context: Mapping[str, Iterable[bytes]] = context.auth_context()
            return pb.Certificate(pem=await asyncio.to_thread(self._renewed, request, auth_context))
        except LichenError as error:
            _log.warning("refused a renewal from %s: %s", context.peer(), one_line(error))
            await refuse(context, error)

    def _renewed(self, request: pb.RenewRequest, auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
        _check_protocol(request.protocol)
        node, _ = admit(self._store, auth_context)
        certificate = self._authority.sign_csr(request.csr, node.name, "node", self._days)
        # The store goes on accepting the old certificate until the new one has been seen: this answer may be lost.
        self._store.renew_node(node.name, fingerprint(certificate))
        self._store.note_certificate(node.name, read_certificate(certificate).not_after)
        _log.info("renewed the certificate of %s: %s", node.name, fingerprint(certificate))
        return certificate


class _Failures:
    """Failed calls by host, so that nobody can make the service work or log without end.

    A bucket a host: ``burst`` failures at once, then one every ``seconds``.
    """

    def __init__(self, burst: int = 10, seconds: float = 6.0, hosts: int = 4096) -> None:
        self._burst = burst
        self._seconds = seconds
        self._hosts = hosts
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def permit(self, host: str, now: float) -> bool:
        return self._level(host, now) <= self._burst - 1

    def count(self, host: str, now: float) -> None:
        level = self._level(host, now) + 1
        self._buckets[host] = (level, now)
        self._buckets.move_to_end(host)
        if level > self._burst - 1:
            _log.warning("too many failed enrolments from %s: it is refused for a while", host)
        if len(self._buckets) > self._hosts:
            self._buckets.popitem(last=False)

    def _level(self, host: str, now: float) -> float:
        level, at = self._buckets.get(host, (0.0, now))
        return max(0.0, level - (now - at) / self._seconds)


def _handler(service: str, method: str, call: Callable[..., Any], request: type[Any]) -> grpc.GenericRpcHandler[Any, Any]:
    unary = grpc.unary_unary_rpc_method_handler(
        call, request_deserializer=request.FromString, response_serializer=pb.Certificate.SerializeToString
    )
    return grpc.method_handlers_generic_handler(f"lichen.enrolment.{service}", {method: unary})


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise LichenError(
            Code.PROTOCOL_VERSION,
            f"the agent speaks enrolment protocol {protocol}, this coordinator {PROTOCOL}",
            fix="Install the same lichen on both.",
        )
