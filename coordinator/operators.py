"""Operators on other machines: their certificate, and their requests over the fleet's listener.

The key never leaves the operator's machine: a request is signed on the coordinator's, and the answer carried back. The service takes
requests only under a certificate with the role of an operator that its store knows, and only such as touch no file of its machine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml

from lichen.common import pki
from lichen.common.channel.framing import proxy_options
from lichen.common.channel.refusal import explain, refuse
from lichen.common.errors import Code, LichenError
from lichen.common.invite import check_address
from lichen.common.private_files import read_private, write_private
from lichen.coordinator.admin import Calls, answer_request, make_request, read_answer
from lichen.coordinator.admission import one_line
from lichen.coordinator.store import Store

FORMAT = 1
METHOD = "/lichen.admin.v1.Admin/Ask"
MAX_BYTES = 4 << 20
TIMEOUT_SECONDS = 60.0

_KEY = "key.pem"
_IDENTITY = "identity.pem"
_AUTHORITY = "ca.pem"
_ABOUT = "operator.yaml"

log = logging.getLogger(__name__)


class OperatorService:
    """Answers operators under mutual TLS.

    Args:
        store: which operators there are.
        calls: what may be asked, by name; run in threads.
    """

    def __init__(self, store: Store, calls: Calls) -> None:
        self._store = store
        self._calls = calls

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server needs to serve operators; it must require client certificates."""
        service, method = METHOD.strip("/").split("/")
        return grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(self._ask)})

    async def _ask(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            name = await asyncio.to_thread(self._admit, context.auth_context())
        except LichenError as error:
            log.warning("refused an operator from %s: %s", context.peer(), one_line(error))
            await refuse(context, error)
        log.info("operator %s asks from %s", name, context.peer())
        return json.dumps(await answer_request(self._calls, request)).encode()

    def _admit(self, auth_context: Mapping[str, Iterable[bytes]]) -> str:
        info = pki.require_operator(auth_context)
        operator = self._store.operator(info.fingerprint)
        if operator is None or operator.revoked_at is not None:
            raise LichenError(Code.CERTIFICATE_REVOKED, f"the operator {info.name!r} was revoked, or is not known here")
        return operator.name


def request_certificate(directory: Path, name: str) -> str:
    """Make an operator's key in ``directory``, which stays there, and return the request to be signed (PEM).

    Raises:
        LichenError: CERTIFICATE_INVALID if the name will not do; OUTPUT_EXISTS if the directory holds an operator's identity.
    """
    pki.check_name(name)
    if (directory / _IDENTITY).exists():
        raise LichenError(Code.OUTPUT_EXISTS, "it holds an operator's certificate", where=str(directory), fix="Choose another directory.")
    if not (directory / _KEY).exists():
        write_private(directory / _KEY, pki.make_key())
    return pki.make_csr(read_private(directory / _KEY), name).decode()


def accept_certificate(directory: Path, answer: str) -> str:
    """Keep the coordinator's answer beside the key that it is for; returns the operator's name.

    Raises:
        LichenError: CERTIFICATE_INVALID if it is no answer, or not to this key; CERTIFICATE_…; STORE_VERSION.
    """
    try:
        told = json.loads(answer)
        if told["format"] > FORMAT:
            raise LichenError(Code.STORE_VERSION, f"an answer of format {told['format']}", fix="Upgrade lichen.")
        certificate, authority, address = told["certificate"].encode(), told["authority"].encode(), check_address(told["coordinator"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LichenError(Code.CERTIFICATE_INVALID, f"not an answer of `lichen coordinator operator add`: {error}") from None
    key = read_private(directory / _KEY)
    info = pki.check_client_certificate(key, certificate, authority, time.time(), role="operator", where=str(directory))
    write_private(directory / _AUTHORITY, authority)
    write_private(directory / _ABOUT, yaml.safe_dump({"format": FORMAT, "name": info.name, "coordinator": address}).encode())
    write_private(directory / _IDENTITY, key + certificate)
    (directory / _KEY).unlink()
    return info.name


def ask_remote(directory: Path, call: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = TIMEOUT_SECONDS) -> Any:
    """Ask a service on another machine as the operator whose certificate lies in ``directory``; returns its result.

    Raises:
        LichenError: what the service answers; CERTIFICATE_… of the own certificate; CONNECT_FAILED.
    """
    try:
        about = yaml.safe_load((directory / _ABOUT).read_text(encoding="utf-8"))
        authority = (directory / _AUTHORITY).read_bytes()
        address = check_address(about["coordinator"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise LichenError(
            Code.CERTIFICATE_MISSING,
            f"no operator's certificate here: {error}",
            where=str(directory),
            fix="Make one: lichen coordinator operator request NAME --dir DIR",
        ) from None
    key, begin, rest = read_private(directory / _IDENTITY).partition(b"-----BEGIN CERTIFICATE-----")
    certificate = begin + rest
    pki.check_client_certificate(key, certificate, authority, time.time(), role="operator", where=str(directory))
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    options = [("grpc.max_receive_message_length", MAX_BYTES), *proxy_options(address)]
    with grpc.secure_channel(address, credentials, options=options) as channel:
        try:
            unary = channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
            answer: bytes = unary(make_request(call, arguments), timeout=timeout)
        except grpc.RpcError as error:
            raise explain(error, address) from error
    return read_answer(answer)
