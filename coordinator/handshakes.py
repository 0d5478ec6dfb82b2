"""Why a TLS handshake was refused, in the coordinator's log.

A peer without a valid certificate is refused below Python: gRPC's core writes the cause to standard error as a line of its own,
and no public hook tells it. So this reads what the process writes there, and logs those lines as numbered errors.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lichen.common.errors import Code, LichenError

_log = logging.getLogger(__name__)

_LINE = re.compile(rb"\bssl_transport_security\.cc:\d+\] Handshake failed with error (.*)")
_CAUSES: tuple[tuple[str, Code, str], ...] = (
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", Code.CERTIFICATE_MISSING, "the peer showed no certificate"),
    ("certificate has expired", Code.CERTIFICATE_EXPIRED, "the peer's certificate has expired"),
    ("issuer certificate", Code.CERTIFICATE_FOREIGN, "the peer's certificate was signed by another authority"),
    ("self signed certificate", Code.CERTIFICATE_FOREIGN, "the peer's certificate is signed by itself"),
    ("self-signed certificate", Code.CERTIFICATE_FOREIGN, "the peer's certificate is signed by itself"),
    ("certificate signature failure", Code.CERTIFICATE_FOREIGN, "the peer's certificate is not signed by this authority's key"),
    ("certificate is not yet valid", Code.CLOCK_WRONG, "the peer's certificate is not yet valid by this machine's clock"),
    ("unsupported certificate purpose", Code.CERTIFICATE_INVALID, "the peer's certificate is not for a client"),
)


def explain(reason: str) -> str:
    """Say in one line why gRPC's core refused a handshake, with the error's number if it has one."""
    for text, code, what in _CAUSES:
        if text in reason:
            return str(LichenError(code, what))
    return reason


@contextmanager
def logged_handshakes() -> Iterator[None]:
    """While this lasts, log each handshake that gRPC's core refuses; all else that is written to standard error passes through."""
    sys.stderr.flush()
    terminal = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    # Logging may itself write to standard error, so the thread that drains the pipe must not log: it would wait for itself.
    reasons: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threads = (
        threading.Thread(target=_pass_on, args=(reading, terminal, reasons), name="standard-error", daemon=True),
        threading.Thread(target=_log_reasons, args=(reasons,), name="handshakes", daemon=True),
    )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)  # closes the pipe's last writing end, unless a child process still holds it
        for thread in threads:
            thread.join(1)


def _pass_on(reading: int, terminal: int, reasons: queue.SimpleQueue[str | None]) -> None:
    with os.fdopen(reading, "rb") as lines, os.fdopen(terminal, "wb", buffering=0) as out:
        for line in lines:
            match = _LINE.search(line)
            if match:
                reasons.put(match[1].decode(errors="replace"))
            else:
                with suppress(OSError):  # a closed terminal must not stop this thread: the full pipe would block every writer
                    out.write(line)
    reasons.put(None)


def _log_reasons(reasons: queue.SimpleQueue[str | None]) -> None:
    while (reason := reasons.get()) is not None:
        _log.warning("refused a handshake: %s", explain(reason))
