"""The coordinator service: start, stop, and go on where it was.

Everything that must outlive it is in its home: after a crash the next start resumes the run that was under way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from lichen.common.channel.framing import Timing
from lichen.common.channel.spool import Spool
from lichen.coordinator.admin import AdminServer
from lichen.coordinator.enrolment import EnrolmentService
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.handshakes import logged_handshakes
from lichen.coordinator.home import Home, Runtime
from lichen.coordinator.models import ModelService
from lichen.coordinator.operations import Live, Operations
from lichen.coordinator.operators import OperatorService
from lichen.coordinator.runs import RETRY_S, Runner

_LOG_BYTES = 10 << 20
_LOG_FILES = 5

log = logging.getLogger(__name__)


def serve(home: Home, ready: Callable[[Runtime], None], *, retry_s: float = RETRY_S) -> None:
    """Serve a home until SIGTERM or SIGINT. Must be called in the main thread.

    Args:
        home: the coordinator's home.
        ready: told the addresses once all listeners are up.
        retry_s: seconds until a run that a full disk stopped is tried again.

    Raises:
        LichenError: HOME_IN_USE; SERVICE_UNREACHABLE or CONNECT_FAILED if an address can't be had; KEY_EXPOSED; STORE_VERSION.
    """
    os.umask(0o077)  # all that it writes is its owner's
    with home.lock(), _logging(home.path / "log"), logged_handshakes():
        for left in home.path.glob(".backup-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not asyncio.run(_serve(home, ready, retry_s)):
            # The run's thread is in the middle of something that can't be interrupted. The run goes on from its last checkpoint.
            log.info("leaving in the middle of a computation")
            logging.shutdown()
            sys.stderr.flush()
            os._exit(0)


async def _serve(home: Home, ready: Callable[[Runtime], None], retry_s: float) -> bool:
    """Serve; whether all threads have ended."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    authority = home.authority()
    key, certificate = home.server_certificate(authority)
    store = home.open_store()
    fleet = FleetServer(store, Spool(home.spool), timing=Timing())
    enrolment = EnrolmentService(store, authority)
    models = ModelService(store, home.runs)
    runner = Runner(store, fleet, home.runs, retry_s=retry_s)
    live = Live(fleet, runner, home.reached_at(home.config.fleet_port, home.config.enrolment_port))
    operations = Operations(home, store, live)
    operators = OperatorService(store, operations.remote_calls())
    admin: AdminServer | None = None
    ended = True
    try:
        bind = f"[{home.config.bind}]" if ":" in home.config.bind else home.config.bind
        enrolment_port = await enrolment.start(f"{bind}:{home.config.enrolment_port}", key, certificate)
        others = (enrolment.renewal_handler(), models.handler(), operators.handler())
        fleet_port = await fleet.start(f"{bind}:{home.config.fleet_port}", key, certificate, authority.ca_pem, *others)
        runtime = live.runtime = home.reached_at(fleet_port, enrolment_port)
        admin = AdminServer(home.socket, operations.calls())
        await admin.start()
        home.tell_runtime(runtime)
        runner.start()
        log.info("ready: fleet %s, enrolment %s", runtime.fleet, runtime.enrolment)
        ready(runtime)
        await stop.wait()
        log.info("shutting down")
        ended = await asyncio.to_thread(runner.close)
    finally:
        if admin is not None:
            await admin.stop()
        await enrolment.stop()
        await fleet.stop()
        home.forget_runtime()
        if ended:
            store.close()
    return ended


@contextmanager
def _logging(directory: Path) -> Iterator[None]:
    """Log to standard error as lines of text and to ``directory`` as lines of JSON, while this lasts."""
    directory.mkdir(mode=0o700, exist_ok=True)
    file = RotatingFileHandler(
        directory / "coordinator.jsonl", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8", errors="replace"
    )
    file.setFormatter(_JsonLines())
    text = logging.StreamHandler(sys.stderr)
    text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = [text, file]
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        file.close()


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)
