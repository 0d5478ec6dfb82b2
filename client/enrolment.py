"""How an agent gets its certificate (`lichen client join`), keeps it and renews it. The private key never leaves its home.

`pki/identity.pem` holds key and certificate in one file, so that a renewal replaces both at once or neither.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml

from lichen.common import pki
from lichen.common.channel import enrolment_pb2 as pb
from lichen.common.channel.framing import proxy_options
from lichen.common.channel.refusal import explain, passing
from lichen.common.channel.retry import backoff
from lichen.common.errors import Code, LichenError
from lichen.common.invite import Invite, check_address
from lichen.common.private_files import read_private, write_private

FORMAT = 1
PROTOCOL = 1
RENEW_BELOW = 1 / 3  # share of a certificate's validity
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 3

log = logging.getLogger(__name__)

NODE_FILE = "node.yaml"
IDENTITY_FILE = Path("pki/identity.pem")
AUTHORITY_FILE = Path("pki/ca.pem")


@dataclass(frozen=True)
class Identity:
    """Who this node is in its federation, and where that is.

    Attributes:
        name: the node's name.
        coordinator: `host:port` of the fleet's listener.
        enrolment: `host:port` of the enrolment listener.
        key_pem: private key.
        certificate_pem: its certificate.
        ca_pem: certificate of the federation's authority.
        certificate: what the certificate says.
    """

    name: str
    coordinator: str
    enrolment: str
    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes
    certificate: pki.CertificateInfo

    def __repr__(self) -> str:
        """Leave the key out, so that no log shows it."""
        return f"Identity(name={self.name!r}, coordinator={self.coordinator!r}, fingerprint={self.certificate.fingerprint!r})"

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials for a channel to the fleet's listener: mutual TLS, and no authority but the federation's."""
        return grpc.ssl_channel_credentials(self.ca_pem, self.key_pem, self.certificate_pem)


def join(invite: str, home: Path, *, force: bool = False, timeout: float = TIMEOUT_SECONDS) -> Identity:
    """Enrol this home by an invite: make a key, have it signed, keep the certificate.

    Safe to repeat with the same invite when it was interrupted: the key was kept, and the coordinator answers it again.

    Args:
        invite: the string from `lichen coordinator invite`.
        home: the node's home, made if it is not there.
        force: give up the enrolment that the home has.
        timeout: seconds to wait for the coordinator, each of some times.

    Raises:
        LichenError: INVITE_INVALID, INVITE_EXPIRED, INVITE_USED, NAME_TAKEN; ALREADY_ENROLLED; CONNECT_FAILED; CERTIFICATE_…
            (70 to 74) if the coordinator's answer is not a certificate for this key and name; CLOCK_WRONG.
    """
    told = Invite.decode(invite)
    if (home / NODE_FILE).exists() and not force:
        raise LichenError(
            Code.ALREADY_ENROLLED,
            "this home is enrolled already",
            where=str(home),
            fix="Use another --home, or --force to give the old enrolment up.",
        )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Kept before it is sent: without it a certificate whose delivery failed would be lost, and the invite with it.
    pending = home / "pki" / f"joining-{told.secret_sha256[:16]}.key"
    if not pending.exists():
        write_private(pending, pki.make_key())
    key = read_private(pending)
    request = pb.EnrolRequest(protocol=PROTOCOL, secret=told.secret, csr=pki.make_csr(key, told.name))
    credentials = grpc.ssl_channel_credentials(told.ca_pem)
    certificate = _call(told.enrolment, credentials, "/lichen.enrolment.Enrolment/Enrol", request, timeout)
    _check_answer(key, certificate, told.ca_pem, told.name, told.enrolment)
    write_private(home / AUTHORITY_FILE, told.ca_pem)
    write_private(home / IDENTITY_FILE, key + certificate)
    # Last: a home with this file is enrolled.
    content = {"format": FORMAT, "name": told.name, "coordinator": told.fleet, "enrolment": told.enrolment}
    write_private(home / NODE_FILE, yaml.safe_dump(content, sort_keys=False).encode(), mode=0o644)
    for left in (home / "pki").glob("joining-*.key"):
        left.unlink()
    return load_identity(home)


def load_identity(home: Path, *, now: float | None = None) -> Identity:
    """Read this node's identity and check it as the coordinator will: its refusal would only show as «Socket closed».

    Args:
        home: the node's home.
        now: Unix seconds; the present if None.

    Raises:
        LichenError: AGENT_HOME_MISSING if the home is not enrolled; STORE_VERSION if a newer lichen wrote it; KEY_EXPOSED;
            CERTIFICATE_MISSING, CERTIFICATE_EXPIRED, CERTIFICATE_FOREIGN or CERTIFICATE_INVALID; CLOCK_WRONG.
    """
    name, coordinator, enrolment = _read_node_file(home / NODE_FILE)
    path = home / IDENTITY_FILE
    try:
        held = read_private(path)
        ca_pem = (home / AUTHORITY_FILE).read_bytes()
    except FileNotFoundError as error:
        raise LichenError(Code.CERTIFICATE_MISSING, "the authority's certificate is missing", where=str(home / AUTHORITY_FILE)) from error
    key, begin, rest = held.partition(b"-----BEGIN CERTIFICATE-----")
    certificate = begin + rest
    info = pki.check_client_certificate(key, certificate, ca_pem, time.time() if now is None else now, where=str(path))
    return Identity(name, coordinator, enrolment, key, certificate, ca_pem, info)


def address_of(home: Path) -> tuple[str, str]:
    """Return this node's name and its coordinator's `host:port`, whatever became of its certificate.

    Raises:
        LichenError: AGENT_HOME_MISSING; STORE_VERSION.
    """
    return _read_node_file(home / NODE_FILE)[:2]


def renew_if_due(home: Path, *, now: float | None = None, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Renew the certificate, on a new key, when less than a third of its validity is left; True if it was renewed.

    A connection takes the new one when it next connects; until the coordinator has seen it, it accepts the old one too.

    Args:
        home: the node's home.
        now: Unix seconds; the present if None.
        timeout: seconds to wait for the coordinator, each of some times.

    Raises:
        LichenError: as `load_identity`; CERTIFICATE_REVOKED or NODE_UNKNOWN if the coordinator refuses; CONNECT_FAILED.
    """
    now = time.time() if now is None else now
    identity = load_identity(home, now=now)
    if identity.certificate.remaining(now) >= RENEW_BELOW:
        return False
    key = pki.make_key()
    request = pb.RenewRequest(protocol=PROTOCOL, csr=pki.make_csr(key, identity.name))
    certificate = _call(identity.coordinator, identity.credentials(), "/lichen.enrolment.Renewal/Renew", request, timeout)
    _check_answer(key, certificate, identity.ca_pem, identity.name, identity.coordinator)
    write_private(home / IDENTITY_FILE, key + certificate)
    return True


def leave(home: Path) -> None:
    """Forget the enrolment: key, certificate and addresses. Data, policy and privacy history stay; what was computed of the rows goes."""
    from lichen.client.data import CACHE

    shutil.rmtree(home / CACHE, ignore_errors=True)
    for path in (home / NODE_FILE, home / IDENTITY_FILE, home / AUTHORITY_FILE):
        path.unlink(missing_ok=True)


def _call(address: str, credentials: grpc.ChannelCredentials, method: str, request: Any, timeout: float) -> bytes:
    """Make one call, on a channel of its own, again if the network failed; returns the certificate that it is answered with."""
    parse: Callable[[bytes], pb.Certificate] = pb.Certificate.FromString
    options = [("grpc.max_receive_message_length", 65_536), *proxy_options(address)]
    for attempt in range(1, ATTEMPTS + 1):
        with grpc.secure_channel(address, credentials, options=options) as channel:
            call = channel.unary_unary(method, request_serializer=type(request).SerializeToString, response_deserializer=parse)
            try:
                answer: pb.Certificate = call(request, timeout=timeout)
                return answer.pem
            except grpc.RpcError as error:
                if attempt == ATTEMPTS or not passing(error):
                    raise explain(error, address) from error
                log.info("attempt %d failed: %s", attempt, explain(error, address))
        time.sleep(backoff(attempt))
    raise LichenError(Code.INTERNAL, "no attempt was made")


def _check_answer(key: bytes, certificate: bytes, ca_pem: bytes, name: str, address: str) -> None:
    info = pki.check_client_certificate(key, certificate, ca_pem, time.time(), where=address)
    if info.name != name:
        raise LichenError(Code.CERTIFICATE_INVALID, f"the coordinator's certificate is for {info.name!r}, not {name!r}", where=address)


def _read_node_file(path: Path) -> tuple[str, str, str]:
    """Return name, fleet address and enrolment address."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version == FORMAT:
            return pki.check_name(content["name"]), check_address(content["coordinator"]), check_address(content["enrolment"])
    except FileNotFoundError as error:
        raise LichenError(
            Code.AGENT_HOME_MISSING, "this home is not enrolled", where=str(path.parent), fix="Run `lichen client join INVITE` first."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, LichenError) as error:
        raise LichenError(
            Code.AGENT_HOME_MISSING, f"unreadable: {error}", where=str(path), fix="Restore the file, or join again with --force."
        ) from error
    raise LichenError(
        Code.STORE_VERSION,
        f"it has format {version!r}, this lichen reads {FORMAT}",
        where=str(path),
        fix="Install the lichen that wrote it, or a newer one.",
    )
