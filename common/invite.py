"""The invite: one string that an operator hands to a data owner, with all that an agent needs to join.

`lichen1.` + base64url(checksum + JSON). It carries the authority's certificate, because gRPC cannot pin one by its fingerprint, and a
one-time secret; so it is to be handed over as a password is. The checksum only finds a paste that was cut or changed by accident.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from lichen.common.errors import Code, LichenError
from lichen.common.pki import NAME_PATTERN

PREFIX = "lichen1."
SECRET_BYTES = 32
MAX_CHARACTERS = 16_384

_CHECKSUM_BYTES = 8
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Invite:
    """What an invite says.

    Attributes:
        name: the node's name, fixed by the operator.
        fleet: `host:port` that the agent attaches to with its certificate.
        enrolment: `host:port` that answers the one call that gets it the certificate.
        ca_pem: certificate of the federation's authority, PEM.
        secret: 32 random bytes that are good once.
        expires_at: Unix seconds, whole.
    """

    name: str
    fleet: str
    enrolment: str
    ca_pem: bytes
    secret: bytes
    expires_at: int

    def __repr__(self) -> str:
        """Leave the secret out, so that no log shows it."""
        return f"Invite(name={self.name!r}, fleet={self.fleet!r}, enrolment={self.enrolment!r}, expires_at={self.expires_at})"

    @property
    def secret_sha256(self) -> str:
        """What the coordinator keeps of the secret: its SHA-256, hex."""
        return hashlib.sha256(self.secret).hexdigest()

    def encode(self) -> str:
        """Write the invite as one string without spaces."""
        der = x509.load_pem_x509_certificate(self.ca_pem).public_bytes(serialization.Encoding.DER)
        content = {
            "name": self.name,
            "fleet": self.fleet,
            "enrolment": self.enrolment,
            "ca": _base64(der),
            "secret": _base64(self.secret),
            "expires_at": self.expires_at,
        }
        data = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
        return PREFIX + _base64(_checksum(data) + data)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read an invite; spaces and line breaks that a mail program put in are ignored.

        Raises:
            LichenError: INVITE_INVALID, with what to do.
        """
        text = "".join(text.split()).strip("\"'")
        if not text.startswith(PREFIX):
            newer = re.match(r"lichen[0-9]+\.", text)
            if newer:
                raise _invalid(
                    f"it has the format {newer[0]!r}, this lichen reads {PREFIX!r}", "Install the lichen that the operator runs."
                )
            raise _invalid(f"it does not begin with {PREFIX!r}", _COPY)
        try:
            if len(text) > MAX_CHARACTERS:
                raise ValueError("too long")
            raw = _unbase64(text.removeprefix(PREFIX))
            if _base64(raw) != text.removeprefix(PREFIX):  # the last character has bits to spare
                raise ValueError("not canonical")
        except (ValueError, binascii.Error) as error:
            raise _invalid("it is cut, or characters were changed", _COPY) from error
        checksum, data = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
        if checksum != _checksum(data):
            raise _invalid("its checksum is wrong: it is cut, or characters were changed", _COPY)
        return cls._read(data)

    @classmethod
    def _read(cls, data: bytes) -> Self:
        """Read the JSON of an invite whose checksum was right: a fault now is the writer's."""
        try:
            content = json.loads(data)
            authority = x509.load_der_x509_certificate(_unbase64(content["ca"]))
            invite = cls(
                name=content["name"],
                fleet=check_address(content["fleet"]),
                enrolment=check_address(content["enrolment"]),
                ca_pem=authority.public_bytes(serialization.Encoding.PEM),
                secret=_unbase64(content["secret"]),
                expires_at=content["expires_at"],
            )
            if not NAME_PATTERN.fullmatch(invite.name) or len(invite.secret) != SECRET_BYTES or type(invite.expires_at) is not int:
                raise ValueError("name, secret or expiry out of range")
        except (ValueError, TypeError, KeyError, RecursionError, LichenError) as error:
            raise _invalid("it is whole, but not an invite that this lichen understands", "Ask the operator for a new one.") from error
        return invite


def check_address(address: str) -> str:
    """Return ``address`` if it is `host:port` (IPv6 as `[…]:port`).

    Raises:
        LichenError: INVITE_INVALID otherwise.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise LichenError(
            Code.INVITE_INVALID, f"{address[:80]!r} is not an address", fix="Write it as host:port, an IPv6 address as [::1]:port."
        )
    return address


_COPY = "Copy the whole string, from `lichen1.` to its last character, or ask the operator for a new invite."


def _invalid(fault: str, fix: str) -> LichenError:
    return LichenError(Code.INVITE_INVALID, f"the invite cannot be read: {fault}", fix=fix)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
