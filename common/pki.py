"""The federation's own certificate authority, certificate requests and what both ends check in a certificate.

P-256 throughout: Ed25519 certificates fail in grpcio's handshake. One authority signs every certificate (path length 0). A node's
or operator's certificate may only act as a TLS client and a server's only as a server; the role stands in a URI name of the
certificate, so that a node cannot pass for an operator. Times are Unix seconds.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lichen.common.errors import Code, LichenError
from lichen.common.private_files import read_private, write_private

Role = Literal["node", "operator", "server"]

AUTHORITY_DAYS = 3650.0
SERVER_DAYS = 365.0
CLIENT_DAYS = 90.0
BACKDATE_SECONDS = 2 * 86400.0  # a clock two days slow must not refuse a new certificate as not yet valid
MAX_CSR_BYTES = 8192
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_ROLE_PREFIX = "lichen:role:"
_ROLES: dict[str, Role] = {"node": "node", "operator": "operator", "server": "server"}
_NEW_CERTIFICATE = "Ask the coordinator's operator for a new invite and run `lichen client join INVITE --force`."


@dataclass(frozen=True)
class CertificateInfo:
    """What the two ends read in a certificate; only that, whatever else it may hold.

    Attributes:
        name: the common name (the node's or operator's name).
        role: ``node``, ``operator`` or ``server``; None in a certificate without a role, which serves for nothing here.
        not_before: start of validity, Unix seconds.
        not_after: end of validity, Unix seconds.
        fingerprint: SHA-256 of the DER form, hex.
        authority_key_id: key identifier of the issuing authority, hex; empty if the certificate names none.
    """

    name: str
    role: Role | None
    not_before: float
    not_after: float
    fingerprint: str
    authority_key_id: str

    def remaining(self, now: float) -> float:
        """Share of the validity that is left at ``now``; 0 or less once expired."""
        return (self.not_after - now) / (self.not_after - self.not_before)


class Authority:
    """The federation's certificate authority: a key that stays in the coordinator's home, and its certificate.

    Args:
        key: the authority's P-256 private key.
        certificate: its self-signed certificate.
    """

    KEY_FILE = "ca.key"
    CERTIFICATE_FILE = "ca.pem"

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, directory: Path, *, days: float = AUTHORITY_DAYS) -> Self:
        """Make a new authority and keep it in ``directory`` (mode 0700; the key file 0600).

        Raises:
            LichenError: OUTPUT_EXISTS if the directory already holds one.
        """
        if (directory / cls.CERTIFICATE_FILE).exists():
            raise LichenError(
                Code.OUTPUT_EXISTS,
                "there is a certificate authority already",
                where=str(directory),
                fix="Use another home: replacing the authority would shut every enrolled node out.",
            )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own lets an error tell two federations apart.
        subject = _subject(f"lichen authority {secrets.token_hex(4)}")
        certificate = (
            _builder(subject, subject, key.public_key(), time.time(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(directory / cls.KEY_FILE, _key_pem(key))
        write_private(directory / cls.CERTIFICATE_FILE, _pem(certificate), mode=0o644)
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the authority kept in ``directory``.

        Raises:
            LichenError: HOME_MISSING if it holds none; KEY_EXPOSED if others may read the key; CERTIFICATE_INVALID if key and
                certificate do not belong together.
        """
        if not (directory / cls.CERTIFICATE_FILE).exists():
            raise LichenError(
                Code.HOME_MISSING, "no certificate authority here", where=str(directory), fix="Run `lichen coordinator init` first."
            )
        key = _load_key(read_private(directory / cls.KEY_FILE), str(directory / cls.KEY_FILE))
        certificate = _load_certificate((directory / cls.CERTIFICATE_FILE).read_bytes(), str(directory / cls.CERTIFICATE_FILE))
        if certificate.public_key() != key.public_key():
            raise LichenError(
                Code.CERTIFICATE_INVALID,
                "the authority's key and certificate do not belong together",
                where=str(directory),
                fix="Restore both files from the same backup.",
            )
        return cls(key, certificate)

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate, which every end trusts and nothing else."""
        return _pem(self._certificate)

    def issue_server(self, hosts: list[str], days: float = SERVER_DAYS, *, now: float | None = None) -> tuple[bytes, bytes]:
        """Make a server's key and certificate for these host names and IP addresses; both PEM, the key first.

        Raises:
            LichenError: CERTIFICATE_INVALID if there is no host, or one is neither a DNS name nor an IP address; CERTIFICATE_EXPIRED if
                the authority has expired.
        """
        if not hosts:
            raise LichenError(Code.CERTIFICATE_INVALID, "a server's certificate needs at least one host name or IP address")
        key = ec.generate_private_key(ec.SECP256R1())
        names = tuple(_host(host) for host in hosts)
        return _key_pem(key), self._sign("coordinator", key.public_key(), "server", days=days, now=now, hosts=names)

    def sign_csr(
        self, csr_pem: bytes, name: str, role: Literal["node", "operator"], days: float = CLIENT_DAYS, *, now: float | None = None
    ) -> bytes:
        """Sign the key of a request as the certificate of ``name``; nothing else of the request is taken over.

        Raises:
            LichenError: CERTIFICATE_INVALID if the request is unreadable or too long, its signature is wrong (its sender does not hold
                the key), its key is not P-256, or the name is not a node name; CERTIFICATE_EXPIRED if the authority has expired.
        """
        return self._sign(check_name(name), csr_public_key(csr_pem), role, days=days, now=now)

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        role: Role,
        *,
        days: float,
        now: float | None,
        hosts: tuple[x509.GeneralName, ...] = (),
    ) -> bytes:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        names = [*hosts, x509.UniformResourceIdentifier(_ROLE_PREFIX + role)]
        own = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        now = time.time() if now is None else now
        left = self._certificate.not_valid_after_utc.timestamp() - now
        if left <= 0:
            raise LichenError(
                Code.CERTIFICATE_EXPIRED,
                "this federation's authority has expired, and can sign no more",
                fix="Set up a new coordinator home and invite the nodes again.",
            )
        certificate = (
            # Not beyond the authority's own end, so that each side sees in its own certificate when it ends.
            _builder(_subject(name), self._certificate.subject, key, now, min(days, left / 86400))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)


def make_key() -> bytes:
    """Make a P-256 private key, PEM (PKCS#8)."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def make_csr(key_pem: bytes, name: str) -> bytes:
    """Make the request for a certificate on this key, PEM; ``name`` only tells a reader whose it is."""
    key = _load_key(key_pem, "private key")
    return x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256()).public_bytes(_PEM)


def csr_public_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read the P-256 key of a request, whose signature shows that the sender holds it.

    Raises:
        LichenError: CERTIFICATE_INVALID if it is no such request.
    """
    fault = ""
    try:
        if len(csr_pem) > MAX_CSR_BYTES:
            raise ValueError(f"{len(csr_pem)} bytes, more than {MAX_CSR_BYTES}")
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            fault = "its key is not P-256"
        elif not request.is_signature_valid:
            fault = "its signature is not by its own key"
        else:
            return key
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        fault = f"unreadable: {error}"
    raise LichenError(Code.CERTIFICATE_INVALID, f"the certificate request was refused: {fault}")


def csr_name(csr_pem: bytes) -> str:
    """The name that a request asks for; nothing but a wish.

    Raises:
        LichenError: CERTIFICATE_INVALID if it cannot be read or asks for no node name.
    """
    csr_public_key(csr_pem)
    names = x509.load_pem_x509_csr(csr_pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return check_name(str(names[0].value) if len(names) == 1 else "")


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate's DER form, hex."""
    return read_certificate(certificate_pem).fingerprint


def read_certificate(certificate_pem: bytes) -> CertificateInfo:
    """Read what the two ends use of a certificate; says nothing of who signed it.

    Raises:
        LichenError: CERTIFICATE_INVALID if it cannot be read.
    """
    return _info(_load_certificate(certificate_pem, "certificate"))


def same_key(certificate_pem: bytes, csr_pem: bytes) -> bool:
    """Tell whether a certificate is on the key of a request."""
    return _load_certificate(certificate_pem, "certificate").public_key() == csr_public_key(csr_pem)


def check_name(name: str) -> str:
    """Return ``name`` if it is a node name.

    Raises:
        LichenError: CERTIFICATE_INVALID otherwise.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise LichenError(
            Code.CERTIFICATE_INVALID,
            f"{name[:80]!r} cannot be a name in a certificate",
            fix="Use 1 to 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first.",
        )
    return name


def check_client_certificate(
    key_pem: bytes | None, certificate_pem: bytes | None, ca_pem: bytes, now: float, *, role: Role = "node", where: str = ""
) -> CertificateInfo:
    """Check one's own certificate before a connection: a refused handshake would only show as «Socket closed».

    Raises:
        LichenError: CERTIFICATE_MISSING without key or certificate; CERTIFICATE_FOREIGN if another authority signed it;
            CERTIFICATE_INVALID if it is unreadable or for another role or key; CLOCK_WRONG if it is not yet valid; CERTIFICATE_EXPIRED.
    """
    if not key_pem or not certificate_pem:
        raise LichenError(
            Code.CERTIFICATE_MISSING,
            "there is no certificate here",
            where=where,
            fix="Run `lichen client join INVITE` with an invite from the coordinator's operator.",
        )
    certificate = _load_certificate(certificate_pem, where or "certificate")
    key = _load_key(key_pem, where or "private key")
    info = _info(certificate)
    try:
        certificate.verify_directly_issued_by(_load_certificate(ca_pem, "authority's certificate"))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise LichenError(
            Code.CERTIFICATE_FOREIGN,
            f"the certificate of {info.name!r} was signed by another authority than this federation's",
            where=where,
            fix=_NEW_CERTIFICATE,
        ) from error
    fault = ""
    if certificate.public_key() != key.public_key():
        fault = "does not belong to the private key beside it"
    elif info.role != role:
        fault = f"is for the role {info.role!r}, not {role!r}"
    if fault:
        raise LichenError(Code.CERTIFICATE_INVALID, f"the certificate of {info.name!r} {fault}", where=where, fix=_NEW_CERTIFICATE)
    if now < info.not_before:
        raise LichenError(
            Code.CLOCK_WRONG,
            f"this machine's clock is behind by {(info.not_before - now) / 3600:.1f} hours or more: the certificate of {info.name!r}"
            f" is not valid before {_utc(info.not_before)}, and it is {_utc(now)} here",
            where=where,
            fix="Set this machine's clock.",
        )
    if now >= info.not_after:
        raise LichenError(
            Code.CERTIFICATE_EXPIRED,
            f"the certificate of {info.name!r} expired at {_utc(info.not_after)}, and it is {_utc(now)} here",
            where=where,
            fix=f"If the clock is right: {_NEW_CERTIFICATE} (The operator revokes the old enrolment first.)",
        )
    return info


def peer_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> CertificateInfo:
    """Read the peer's certificate from gRPC's ``context.auth_context()``; the handshake has verified its chain and dates.

    Raises:
        LichenError: CERTIFICATE_MISSING if the peer showed none.
    """
    for pem in auth_context.get("x509_pem_cert", ()):
        return read_certificate(pem)
    raise LichenError(Code.CERTIFICATE_MISSING, "the peer showed no certificate")


def require_role(auth_context: Mapping[str, Iterable[bytes]], role: Role) -> CertificateInfo:
    """Read the peer's certificate and insist on its role.

    Raises:
        LichenError: CERTIFICATE_MISSING if the peer showed none; CERTIFICATE_INVALID if it is for another role.
    """
    info = peer_certificate(auth_context)
    if info.role != role:
        raise LichenError(Code.CERTIFICATE_INVALID, f"the certificate of {info.name!r} is for the role {info.role!r}, not {role!r}")
    return info


def require_operator(auth_context: Mapping[str, Iterable[bytes]]) -> CertificateInfo:
    """Read the peer's certificate and insist on an operator's; errors as `require_role`."""
    return require_role(auth_context, "operator")


_PEM = serialization.Encoding.PEM


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(_PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise LichenError(Code.CERTIFICATE_INVALID, f"unreadable private key: {error}", where=where) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LichenError(Code.CERTIFICATE_INVALID, "the private key is not on an elliptic curve", where=where)
    return key


def _load_certificate(pem: bytes, where: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise LichenError(Code.CERTIFICATE_INVALID, f"unreadable certificate: {error}", where=where) from error


def _info(certificate: x509.Certificate) -> CertificateInfo:
    names = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    uris: list[str] = []
    key_id = b""
    try:
        for extension in certificate.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
            elif isinstance(extension.value, x509.AuthorityKeyIdentifier):
                key_id = extension.value.key_identifier or b""
    except ValueError as error:
        raise LichenError(Code.CERTIFICATE_INVALID, f"unreadable certificate: {error}") from error
    roles = [_ROLES.get(uri.removeprefix(_ROLE_PREFIX)) for uri in uris if uri.startswith(_ROLE_PREFIX)]
    return CertificateInfo(
        name=names[0] if len(names) == 1 else "",
        role=roles[0] if len(roles) == 1 else None,
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        fingerprint=hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest(),
        authority_key_id=key_id.hex(),
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, days: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - BACKDATE_SECONDS, UTC))
        .not_valid_after(datetime.fromtimestamp(now + days * 86400, UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*", host):
        raise LichenError(Code.CERTIFICATE_INVALID, f"{host[:80]!r} is neither a host name nor an IP address")
    return x509.DNSName(host.lower())


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
