"""The coordinator's home: its configuration, its keys, its lock, and where everything else lies in it."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lichen.common.errors import Code, LichenError
from lichen.common.invite import check_address
from lichen.common.pki import Authority, read_certificate
from lichen.common.private_files import read_private, write_private
from lichen.common.result import write_atomically
from lichen.common.yaml_files import read_yaml
from lichen.coordinator.store import Store

FORMAT: Literal[1] = 1
FLEET_PORT = 7443
ENROLMENT_PORT = 7444
RENEW_BELOW = 1 / 3
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Config(BaseModel):
    """The document `config.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: Literal[1] = FORMAT
    hosts: list[str] = Field(min_length=1)
    """Names and IP addresses by which agents reach this machine; they stand in its certificate, and invites carry the first."""
    bind: str
    """The address to listen at."""
    fleet_port: int = Field(ge=0, le=65535)
    """For enrolled agents, by mutual TLS; 0 takes a free one at each start."""
    enrolment_port: int = Field(ge=0, le=65535)
    """For agents that join; 0 takes a free one at each start."""
    fleet_address: str | None = None
    """`host:port` of the fleet as agents reach it, where a router or proxy makes it another than the first host and the port."""
    enrolment_address: str | None = None
    """The same of enrolment."""

    @field_validator("fleet_address", "enrolment_address")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        try:
            return None if value is None else check_address(value)
        except LichenError as error:
            raise ValueError(error.what) from None


@dataclass(frozen=True)
class Runtime:
    """Where a service is reached by agents."""

    fleet: str
    enrolment: str


class Home:
    """A coordinator's home directory.

    Args:
        path: the directory, made by `Home.create`.

    Raises:
        LichenError: HOME_MISSING; STORE_VERSION if a newer lichen made it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)

    @classmethod
    def create(
        cls,
        path: Path,
        hosts: Sequence[str],
        *,
        bind: str | None = None,
        fleet_port: int = FLEET_PORT,
        enrolment_port: int = ENROLMENT_PORT,
    ) -> Self:
        """Make a home: authority, server certificate, configuration and store.

        Args:
            path: the directory; it may exist only if it is empty.
            hosts: names and IP addresses of this machine as agents reach it; the first goes into invites.
            bind: the address to listen at; by default loopback if all hosts are, else all addresses.
            fleet_port: for enrolled agents; 0 takes a free one at each start.
            enrolment_port: for agents that join; 0 takes a free one at each start.

        Raises:
            LichenError: OUTPUT_EXISTS; CERTIFICATE_INVALID if a host is none; OUTPUT_UNUSABLE.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise LichenError(Code.OUTPUT_EXISTS, "the home is not empty", where=str(path), fix="Choose another --home.")
        bind = bind or ("127.0.0.1" if set(hosts) <= _LOOPBACK else "0.0.0.0")  # noqa: S104 - what a service for other machines is for
        config = Config(hosts=list(hosts), bind=bind, fleet_port=fleet_port, enrolment_port=enrolment_port)
        whole = False
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            authority = Authority.create(path / "pki")
            write_private(path / "pki" / "server.pem", b"".join(authority.issue_server(_names(config))))
            Store(path / "store.sqlite").close()
            (path / "store.sqlite").chmod(0o600)  # SQLite gives its journals the same mode
            (path / "runs").mkdir()
            # last: a home with this file is whole
            write_private(path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
            whole = True
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"can't make a home: {error}", where=str(path)) from None
        finally:
            if not whole:
                shutil.rmtree(path, ignore_errors=True)
        return cls(path)

    @property
    def runs(self) -> Path:
        """The run directories, by run id."""
        return self.path / "runs"

    @property
    def spool(self) -> Path:
        """Payloads on their way."""
        return self.path / "spool"

    @property
    def socket(self) -> Path:
        """The Unix socket of the running service's operators."""
        return self.path / "admin.sock"

    def open_store(self) -> Store:
        """The store; close it."""
        return Store(self.path / "store.sqlite")

    def authority(self) -> Authority:
        """The federation's authority."""
        return Authority.load(self.path / "pki")

    def server_certificate(self, authority: Authority, now: float | None = None) -> tuple[bytes, bytes]:
        """The server's key and certificate (PEM); new ones if too little is left of the old, or the hosts have changed."""
        now = time.time() if now is None else now
        path = self.path / "pki" / "server.pem"
        try:
            key, begin, rest = read_private(path).partition(b"-----BEGIN CERTIFICATE-----")
            certificate = begin + rest
            if self._serves(certificate, authority, now):
                return key, certificate
        except LichenError as error:
            if error.code is Code.KEY_EXPOSED:
                raise
        key, certificate = authority.issue_server(_names(self.config), now=now)
        write_private(path, key + certificate)
        return key, certificate

    def _serves(self, certificate: bytes, authority: Authority, now: float) -> bool:
        found, parent = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority.ca_pem)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        told = {str(name) for kind in (x509.DNSName, x509.IPAddress) for name in names.get_values_for_type(kind)}
        try:
            found.verify_directly_issued_by(parent)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return told == set(_names(self.config)) and read_certificate(certificate).remaining(now) >= RENEW_BELOW

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the home for one service.

        Raises:
            LichenError: HOME_IN_USE.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LichenError(
                    Code.HOME_IN_USE,
                    "another coordinator serves this home",
                    where=str(self.path),
                    fix="Stop it first, or use another --home.",
                ) from None
            yield
        finally:
            os.close(descriptor)

    def advertised(self) -> Runtime:
        """Where agents reach the service, as configured.

        Raises:
            LichenError: SERVICE_UNREACHABLE, if the ports are chosen at each start.
        """
        if not (self.config.fleet_port and self.config.enrolment_port):
            raise LichenError(
                Code.SERVICE_UNREACHABLE,
                "this home takes free ports at each start, and no service runs",
                where=str(self.path),
                fix=f"Start it: lichen coordinator serve --home {self.path}",
            )
        return self.reached_at(self.config.fleet_port, self.config.enrolment_port)

    def reached_at(self, fleet_port: int, enrolment_port: int) -> Runtime:
        """The addresses of these ports as agents use them."""
        host = self.config.hosts[0].strip("[]")
        host = f"[{host}]" if ":" in host else host
        return Runtime(self.config.fleet_address or f"{host}:{fleet_port}", self.config.enrolment_address or f"{host}:{enrolment_port}")

    def tell_runtime(self, runtime: Runtime) -> None:
        """Note where the running service listens, for people and scripts."""
        told = {"format": FORMAT, "pid": os.getpid(), "fleet": runtime.fleet, "enrolment": runtime.enrolment}
        write_atomically(self.path / "runtime.json", json.dumps(told) + "\n")

    def forget_runtime(self) -> None:
        """No service runs any more."""
        (self.path / "runtime.json").unlink(missing_ok=True)


def _read_config(home: Path) -> Config:
    path = home / "config.yaml"
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise LichenError(
                Code.STORE_VERSION,
                f"it has format {found['format']}, this lichen reads up to {FORMAT}",
                where=str(path),
                fix="Install the lichen that wrote it, or a newer one.",
            )
        return Config.model_validate(found)
    except FileNotFoundError:
        raise LichenError(
            Code.HOME_MISSING, "no coordinator's home here", where=str(home), fix=f"Make one: lichen coordinator init --home {home}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        what = " ".join(str(error).split())
        raise LichenError(Code.HOME_MISSING, f"unreadable: {what}", where=str(path), fix="Mend the file, or restore a backup.") from None


def _names(config: Config) -> list[str]:
    """What the certificate is for: the hosts, and this machine itself for agents beside the service."""
    names = [_normal(host) for host in config.hosts]
    return names + [name for name in ("localhost", "127.0.0.1") if name not in names]


def _normal(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host.lower()
