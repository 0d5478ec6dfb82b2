"""The operators' door: a Unix socket in the home that only its owner can open. One request a connection, one line of JSON each way.

Request `{"format": 1, "call": NAME, "arguments": {…}}`; answer `{"result": …}` or `{"error": {"code", "what", "where", "fix"}}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.coordinator.admission import one_line
from lichen.coordinator.operations import NotServedError

FORMAT = 1
MAX_REQUEST = 16 << 20
TIMEOUT_SECONDS = 600.0  # copying a large evaluation file, or a backup, takes a while
_MAX_SOCKET_PATH = 100  # bytes; the system's limit is 104 or 108

log = logging.getLogger(__name__)

Calls = Mapping[str, Callable[..., Any]]


class AdminServer:
    """Answers operators on this machine.

    Args:
        path: the socket, made with mode 0600 in a directory that only its owner may enter.
        calls: what may be asked, by name; run in threads.
    """

    def __init__(self, path: Path, calls: Calls) -> None:
        self._path = path
        self._calls = calls
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; the home's lock says that a socket that is there already is nobody's."""
        self._path.unlink(missing_ok=True)
        with _short(self._path) as address:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)  # never open to others, not even for a moment
            try:
                listening.bind(address)
            finally:
                os.umask(before)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_REQUEST)

    async def stop(self) -> None:
        """Stop listening, and take the socket away."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if not line:  # it only looked whether someone is here
                return
            answer = await answer_request(self._calls, line)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError) as error:  # gone, or a line beyond the limit
            log.warning("an operator's request failed: %s", error)
        finally:
            writer.close()


async def answer_request(calls: Calls, line: bytes) -> dict[str, Any]:
    """Answer one request, whatever it is."""
    try:
        request = json.loads(line)
        if request["format"] != FORMAT:
            raise LichenError(Code.PROTOCOL_VERSION, f"a request of format {request['format']!r}", fix="Use the service's own lichen.")
        call, arguments = calls[request["call"]], dict(request["arguments"])
    except LichenError as error:
        return {"error": _told(error)}
    except (ValueError, KeyError, TypeError) as error:
        return {"error": _told(LichenError(Code.FRAME_INVALID, f"a request that this service does not know: {error}"))}
    try:
        result = await asyncio.to_thread(call, **arguments)
    except LichenError as error:
        log.warning("refused an operator's %s: %s", request["call"], one_line(error))
        return {"error": _told(error)}
    except Exception as error:  # the operator is told, and the service lives on
        log.exception("an operator's %s failed", request["call"])
        return {"error": _told(LichenError(Code.INTERNAL, f"{type(error).__name__}: {error}", fix="The service's log has more."))}
    log.info("did an operator's %s", request["call"])
    return {"result": result}


def make_request(call: str, arguments: Mapping[str, Any] | None) -> bytes:
    """A request, for `answer_request`."""
    return json.dumps({"format": FORMAT, "call": call, "arguments": dict(arguments or {})}).encode()


def read_answer(data: bytes) -> Any:
    """The result that an answer holds.

    Raises:
        LichenError: the error that it holds.
    """
    answer = json.loads(data)
    if "error" in answer:
        told = answer["error"]
        raise LichenError(Code(told["code"]), told["what"], where=told["where"], fix=told["fix"])
    return answer["result"]


def ask(socket_path: Path, call: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = TIMEOUT_SECONDS) -> Any:
    """Ask the running service; returns its result.

    Args:
        socket_path: the home's socket.
        call: see `Operations.calls`.
        arguments: the call's.
        timeout: seconds to wait for the answer.

    Raises:
        NotServedError: nobody listens: SERVICE_UNREACHABLE.
        LichenError: what the service answers; SERVICE_UNREACHABLE if it does not.
    """
    request = make_request(call, arguments) + b"\n"
    received = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _short(socket_path) as address:
            connection.settimeout(timeout)
            try:
                connection.connect(address)
            except (FileNotFoundError, ConnectionRefusedError):
                raise NotServedError(socket_path.parent) from None
            connection.sendall(request)
            while block := connection.recv(1 << 16):
                received += block
    except OSError as error:
        raise LichenError(
            Code.SERVICE_UNREACHABLE, f"the service does not answer: {error}", where=str(socket_path.parent), fix="See its log."
        ) from None
    if not received.endswith(b"\n"):
        raise LichenError(
            Code.SERVICE_UNREACHABLE, "the service ended before it answered", where=str(socket_path.parent), fix="See its log."
        )
    return read_answer(received)


def served(socket_path: Path) -> bool:
    """Whether a service listens at the home's socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _short(socket_path) as address:
            connection.connect(address)
    except OSError:
        return False
    return True


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for a socket that fits the system's limit: a long one is reached through its open directory."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise LichenError(
            Code.OUTPUT_UNUSABLE, "the home's path is too long for a socket", where=str(path), fix="Use a home with a shorter path."
        )
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _told(error: LichenError) -> dict[str, Any]:
    return {"code": int(error.code), "what": error.what, "where": error.where, "fix": error.fix}
