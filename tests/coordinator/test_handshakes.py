"""Refused handshakes become numbered log lines, and nothing else that is written to standard error is lost or held up."""

from __future__ import annotations

import logging
import os
import sys
import threading

import pytest

from lichen.coordinator.handshakes import explain, logged_handshakes

LINE = b"I0000 00:00:00.000000 1 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: certificate has expired\n"


@pytest.mark.parametrize(
    ("reason", "start"),
    [
        ("error:100000c0:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE: x", "error 70 (certificate-missing)"),
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "error 71 (certificate-expired)"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "error 72 (certificate-foreign)"),
        ("CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "error 74 (certificate-invalid)"),
        ("WRONG_VERSION_NUMBER", "WRONG_VERSION_NUMBER"),
    ],
)
def test_causes_are_numbered(reason: str, start: str) -> None:
    assert explain(reason).startswith(start)


def test_a_flood_passes_while_the_log_itself_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("lichen.coordinator.handshakes")
    log.addHandler(handler)
    try:
        with logged_handshakes():
            # More than a pipe holds, from several threads, each line of which makes a log line that comes back through the pipe.
            threads = [threading.Thread(target=lambda: [os.write(2, LINE + b"other line\n") for _ in range(500)]) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert not any(thread.is_alive() for thread in threads)
    finally:
        log.removeHandler(handler)
    print("after", file=sys.stderr, flush=True)
    written = capfd.readouterr().err.splitlines()
    assert written.count("other line") == 2000
    assert sum("error 71 (certificate-expired)" in line for line in written) == 2000
    assert written[-1] == "after"
