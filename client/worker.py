"""The worker: a process of its own that holds the model and trains, so that a crash or a deadline never takes the agent down.

The agent writes messages to its standard input and reads replies from its standard output, each as four bytes of length and
Flower's serialised form. The process lives as long as the agent does; when its input ends it ends, even in mid-training.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lichen.common.errors import Code, LichenError
from lichen.common.records import message_from_bytes

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.client.policy import Policy

log = logging.getLogger(__name__)

_LENGTH_BYTES = 4
_MAX_FRAME = 64 << 20  # tensors lie in the spool; what is longer than this is no message
_MEMORY_EVERY = 0.2  # seconds between two looks at the worker's memory
_NICE = 10  # the owner's own work comes first
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_STARTED_BY_AGENT = ("-P", "-m", "lichen.client.worker")  # -P: a file in the working directory must not stand in for a library


@dataclass(frozen=True)
class Limits:
    """What the node's policy lets the worker use; None is no limit."""

    threads: int | None = None
    """Threads of one computation."""
    memory_mb: int | None = None
    """Resident memory, in MiB."""
    rows: int | None = None
    """Rows that pass through the model at once, where memory was not enough for more."""

    def tightened(self, policy: Policy) -> Limits:
        """The tighter of these and the policy's."""
        return replace(self, threads=least(self.threads, policy.threads), memory_mb=least(self.memory_mb, policy.memory_mb))


def least(first: int | None, second: int | None) -> int | None:
    """The smaller of two limits; None is no limit."""
    return min((value for value in (first, second) if value is not None), default=None)


class OutOfMemoryError(LichenError):
    """The worker passed its memory limit, or the kernel killed it, which memory is the usual cause of: WORKER_FAILED."""

    def __init__(self, what: str, fix: str, where: str = "") -> None:
        super().__init__(Code.WORKER_FAILED, what, where=where, fix=fix)


class Worker:
    """The agent's end: starts the process with the first message, and again after it died.

    Args:
        home: the node's home.
        name: the node's name.
        spool: where payloads lie.
    """

    def __init__(self, home: Path, name: str, spool: Path) -> None:
        self._arguments = (str(home), name, str(spool))
        self._process: asyncio.subprocess.Process | None = None
        self._limits = Limits()

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def memory_mb(self) -> float:
        """Resident memory of the process in MiB; 0 while there is none."""
        import psutil

        try:
            return float(psutil.Process(self.pid).memory_info().rss) / 2**20 if self.pid is not None else 0.0
        except psutil.Error:
            return 0.0

    async def ask(self, message: bytes, limits: Limits, seconds: float) -> bytes:
        """Have one message answered; one at a time.

        Args:
            message: Flower's serialised form.
            limits: of the process; other limits than before start it anew.
            seconds: from now, after which the process is killed.

        Raises:
            LichenError: WORKER_DEADLINE; WORKER_FAILED, if it died or passed its memory limit (then `OutOfMemoryError`). Either way,
                and when this is cancelled, no process is left, and the next message starts one.
        """
        try:
            async with asyncio.timeout(seconds):
                process = await self._ready(limits)
                return await self._exchange(process, message, limits)
        except TimeoutError:
            await self.stop()
            raise LichenError(
                Code.WORKER_DEADLINE,
                f"the worker was stopped after {seconds:.0f} s",
                fix="Raise cohort.deadline_s, or lower the steps.",
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Kill the process, if there is one, and return when it is gone. What it had not answered is done again later."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ready(self, limits: Limits) -> asyncio.subprocess.Process:
        if self._limits != limits:
            await self.stop()
        if self._process is None or self._process.returncode is not None:
            # Arrow's own allocator would keep what reading Parquet took (48 MB for R8): trim() cannot reach it.
            environment = {"ARROW_DEFAULT_MEMORY_POOL": "system", **os.environ}
            if limits.threads is not None:
                environment |= dict.fromkeys(_THREADS, str(limits.threads))
            # Its standard error is the agent's: one log for both.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *_STARTED_BY_AGENT,
                *self._arguments,
                *(str(limit or 0) for limit in (limits.memory_mb, limits.rows)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
            self._limits = limits
            log.info("started worker %d", self._process.pid)
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process, message: bytes, limits: Limits) -> bytes:
        answer = asyncio.create_task(_send_and_receive(process, message))
        watch = asyncio.create_task(_watch_memory(process.pid, limits.memory_mb))
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise OutOfMemoryError(
                f"the worker passed the {limits.memory_mb} MiB that it is given, and was stopped",
                where="memory_mb",
                fix="Raise memory_mb in policy.yaml (or --memory), or ask for a smaller local.max_physical_batch_size.",
            )
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await process.wait()
            fix = "Too little memory is the usual cause of signal 9; else the log above tells more."
            if status == -signal.SIGKILL:
                raise OutOfMemoryError(f"the worker was killed by signal {-status}", fix) from None
            what = f"the worker was killed by signal {-status}" if status < 0 else f"the worker ended with status {status}"
            raise LichenError(Code.WORKER_FAILED, what, fix=fix) from None
        finally:
            answer.cancel()
            watch.cancel()
            await asyncio.gather(answer, watch, return_exceptions=True)


async def _send_and_receive(process: asyncio.subprocess.Process, message: bytes) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise LichenError(Code.INTERNAL, "the worker was started without pipes")
    process.stdin.write(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(_LENGTH_BYTES), "big")
    if length > _MAX_FRAME:
        raise LichenError(Code.WORKER_FAILED, f"the worker sent a frame of {length} bytes")
    return await process.stdout.readexactly(length)


async def _watch_memory(pid: int, limit_mb: int | None) -> None:
    """Return when the process has passed the limit, by resident memory: its own limit (`_limit_memory`) does not count mapped libraries."""
    if limit_mb is None:
        await asyncio.Event().wait()
        return
    import psutil

    process = psutil.Process(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.memory_info().rss <= limit_mb << 20:
            await asyncio.sleep(_MEMORY_EVERY)
        return
    await asyncio.Event().wait()  # it died: its pipes tell


def trim() -> None:
    """Give memory that the allocator keeps back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# --- the process -------------------------------------------------------------------------------------------------------------


def main(home: str, name: str, spool: str, memory_mb: str = "0", rows: str = "0") -> None:
    """Answer messages until the input ends; `Limits` of 0 are none."""
    _limit_memory(int(memory_mb))
    for switch, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
        os.environ.setdefault(switch, value)
    # The agent decides when this ends: a Ctrl-C or a service manager's SIGTERM to both must not look like a failure of training.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICE)
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s")
    for noisy in ("absl", "httpx", "flwr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    source, sink = _own_the_pipes()
    frames: queue.SimpleQueue[tuple[bytes, float]] = queue.SimpleQueue()
    threading.Thread(target=_read_frames, args=(source, frames), name="input", daemon=True).start()
    held: int | None = None
    node: dict[str, bool | float | int | str] = {"home": home, "name": name, "spool": spool, "retried": True}
    if int(rows):
        node["rows"] = int(rows)
    starting = _age()  # the first message has waited for this process, too
    while True:
        data, came = frames.get()
        message = message_from_bytes(data)
        if held != message.metadata.run_id:
            gc.unfreeze()  # what the run before held may go
        reply = _answer(message, node, came - starting)
        starting = 0.0
        sink.write(len(reply).to_bytes(_LENGTH_BYTES, "big") + reply)
        sink.flush()
        trim()  # between rounds the machine is its owner's: a round of MiniLM leaves 0.9 GB in the allocator
        if held != message.metadata.run_id:
            held = message.metadata.run_id
            gc.freeze()  # libraries and model stay while the run does: to look through them took a quarter of a second a round


def _limit_memory(memory_mb: int) -> None:
    """Let an allocation fail that would pass the limit, so that the app can say so and nobody else's memory is taken.

    What counts is what the process may write to. Address space can't be limited: torch reserves more than twice what it uses.
    """
    if memory_mb and sys.platform == "linux":
        import resource

        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = memory_mb << 20
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _own_the_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off the standard streams, so that whatever a library prints goes to the log and never into it."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return source, sink


def _age() -> float:
    """Seconds since this process began."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _read_frames(source: BinaryIO, frames: queue.SimpleQueue[tuple[bytes, float]]) -> None:
    """Pass frames on, each with when it came; when the agent is gone, end the process at once, whatever it is doing."""
    while len(head := source.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        length = int.from_bytes(head, "big")
        data = source.read(length)
        if len(data) < length:
            break
        frames.put((data, time.monotonic()))
    os._exit(0)


def _answer(message: Message, node: dict[str, bool | float | int | str], came: float) -> bytes:
    from flwr.app import Context, RecordDict

    from lichen.client.app import app
    from lichen.common import records

    context = Context(
        run_id=message.metadata.run_id, node_id=message.metadata.dst_node_id, node_config=node, state=RecordDict(), run_config={}
    )
    try:
        records.spend_time(message, time.monotonic() - came)
        reply = app(message, context)
    except Exception:  # the app answers its own errors; what passes it must not end the process, nor be told
        log.exception("unexpected failure")
        reply = records.error_reply(message, int(Code.INTERNAL))
    return records.message_to_bytes(reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
