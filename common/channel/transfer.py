"""One end of a live stream: what goes out in which order, payloads that come and go in chunks, heartbeats.

Control frames go before chunks, so they wait for what is on its way, which is little (`Window`); payloads share the stream by turns.
The next frame is made only when the one before has been taken by the transport, so nothing piles up behind a slow peer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, BinaryIO, Generic
from weakref import WeakValueDictionary

import grpc.aio

from lichen.common.channel.fleet_pb2 import Chunk, Heartbeat, Missing, Seen, Stop, Want
from lichen.common.channel.framing import MAX_PAYLOAD, F, Timing, frame_invalid
from lichen.common.channel.spool import Partial, Spool
from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef

CHUNK = 128 << 10  # the longest: `Window` has how long one is
_SHORTEST = 4 << 10
_LEAST, _MOST = 32 << 10, 32 << 20  # bytes on their way, however slow or fast
_AHEAD = 3  # seconds: the longest round trip that does not slow a link down
_BLOCK = 1 << 20  # read and written at once, in a thread
_KEEP = 1.0  # seconds after which what has come is written, so that a process that is killed on a slow link loses little
_FETCHES = 4  # payloads that come on one stream at a time: each holds up to two blocks
_LEAST_MEASURED = 32 << 10  # bytes: what is shorter tells of the delay, and not of the speed
_MAX_QUEUED = 50_000  # control frames; a peer that provokes more and reads none is broken

Locks = WeakValueDictionary[str, asyncio.Lock]
Later = Callable[[], Awaitable[F | None]]


async def next_frame(stream: Any) -> bytes | None:
    """The next serialised frame of a gRPC call or of a servicer's context; None at the stream's end."""
    data: Any = await stream.read()
    return None if data is grpc.aio.EOF else data  # type: ignore[attr-defined]


class PayloadMissingError(LichenError):
    """The peer no longer has a payload that its message refers to."""

    def __init__(self, digest: str) -> None:
        super().__init__(Code.PAYLOAD_CORRUPT, "its sender no longer has it", where=f"payload {digest}")


class Window:
    """How many bytes may be on their way, and how long a chunk may be, by what the peer says it has read.

    The transport takes megabytes at once, and a slow link would then hold up for minutes what is sent behind them, heartbeats and
    receipts included. So no more is sent ahead than the peer has read in the last second, times `_AHEAD`.
    """

    def __init__(self) -> None:
        self._marks: deque[int] = deque()  # bytes sent up to each chunk that the peer is to tell of
        self._told: deque[tuple[float, int]] = deque()
        self._sent = self._marked = self._seen = 0

    def length(self, now: float) -> int:
        """Bytes of the next chunk; 0 if the peer has to read first."""
        limit = self._limit(now)
        chunk = min(CHUNK, max(_SHORTEST, limit // 8))
        return (
            chunk if not self._marks or self._sent - self._seen + chunk <= limit else 0
        )  # the limit falls with time: never wait for nothing

    def sent(self, length: int, *, last: bool, now: float) -> bool:
        """Count a chunk; whether the peer is to tell when it has read it. Some in a window are enough."""
        self._sent += length
        tell = last or not self._marks or not self.length(now) or self._sent - self._marked >= self._limit(now) // 8
        if tell:
            self._marks.append(self._sent)
            self._marked = self._sent
        return tell

    def seen(self, now: float) -> None:
        """The peer has read the next of the chunks of which it was to tell.

        Raises:
            LichenError: FRAME_INVALID, if there is none.
        """
        if not self._marks:
            raise frame_invalid("it has seen a chunk that was not sent")
        mark = self._marks.popleft()
        self._told.append((now, mark - self._seen))
        self._seen = mark

    def _limit(self, now: float) -> int:
        while self._told and self._told[0][0] < now - 1.0:
            self._told.popleft()
        return min(_MOST, max(_LEAST, _AHEAD * sum(length for _, length in self._told)))


class _Outgoing:
    """A payload on its way out, read block by block."""

    def __init__(self, digest: bytes, file: BinaryIO, offset: int) -> None:
        self.digest = digest
        self._file = file
        self._position = offset
        self._block = b""
        self._start = offset
        self.closed = False

    async def next(self, length: int) -> Chunk | None:
        at = self._position - self._start
        if at == len(self._block):
            self._block = await asyncio.to_thread(os.pread, self._file.fileno(), _BLOCK, self._position)
            self._start, at = self._position, 0
            if self.closed or not self._block:
                return None
        data = self._block[at : at + length]
        chunk = Chunk(digest=self.digest, offset=self._position, data=data)
        self._position += len(data)
        return chunk

    def close(self) -> None:
        self.closed = True
        self._file.close()


class _Incoming:
    """A payload on its way in; blocks are hashed and written in a thread while the next chunks come."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self.expected = partial.offset
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocks: list[bytes] = []
        self._held = 0
        self._wrote = asyncio.get_running_loop().time()
        self._writing: asyncio.Task[None] | None = None

    async def add(self, offset: int, data: bytes) -> None:
        if offset != self.expected or offset + len(data) > self._partial.length:
            raise frame_invalid(f"bytes {offset} to {offset + len(data)} where {self.expected} of {self._partial.length} were due")
        self.expected += len(data)
        self._blocks.append(data)
        self._held += len(data)
        now = asyncio.get_running_loop().time()
        if self._held >= _BLOCK or self.expected == self._partial.length or now - self._wrote >= _KEEP:
            await self.written()
            self._writing = asyncio.create_task(asyncio.to_thread(self._partial.write, self._blocks))
            self._blocks, self._held, self._wrote = [], 0, now
        if self.expected == self._partial.length:
            await self.written()
            self.done.set_result(None)

    async def written(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)  # a thread cannot be cancelled: whoever closes the file waits for it
            self._writing = None

    async def close(self) -> None:
        """Keep what has come for the next attempt."""
        try:
            if self._blocks:
                await self.written()
                await asyncio.to_thread(self._partial.write, self._blocks)
            await self.written()
        finally:
            self._partial.close()


class Link(Generic[F]):
    """One end of a stream.

    Args:
        kind: the frames that this end sends.
        spool: where payloads come from and go to.
        locks: one lock a digest, shared by all links on one spool: a payload has one writer.
        write: takes one serialised frame, and returns when there is room for the next.
        timing: heartbeats.

    Attributes:
        bytes_sent: payload and envelope bytes sent.
        bytes_received: payload and envelope bytes received.
        download_kbit_s: of the last large payload that came; None before the first.
        upload_kbit_s: of the last large payload that the peer has had from here: until it said that it has it.
    """

    def __init__(self, kind: type[F], spool: Spool, locks: Locks, write: Callable[[bytes], Awaitable[None]], timing: Timing) -> None:
        self._kind: type[F] = kind
        self._spool = spool
        self._locks = locks
        self._write = write
        self._timing = timing
        self._control: deque[bytes | Later[F]] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._incoming: dict[bytes, _Incoming] = {}
        self._fetching = asyncio.Semaphore(_FETCHES)
        self._stopped: set[bytes] = set()
        self._offers: dict[str, list[bytes]] = {}
        self._window = Window()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._finishing = False
        self._heard = asyncio.get_running_loop().time()
        self._waiting = True
        self.bytes_sent = 0
        self.bytes_received = 0
        self.download_kbit_s: float | None = None
        self.upload_kbit_s: float | None = None
        self._wanted: dict[bytes, tuple[float, int]] = {}

    # What this end sends

    def send(self, frame: F) -> None:
        """Queue a control frame."""
        self._queue(frame.SerializeToString())

    def send_later(self, make: Later[F]) -> None:
        """Queue a control frame that is made when its turn comes, so that its bytes do not wait in memory; None sends nothing."""
        self._queue(make)

    def _queue(self, item: bytes | Later[F]) -> None:
        if len(self._control) >= _MAX_QUEUED:
            self.fail(frame_invalid("more requests than answers read"))
            return
        self._control.append(item)
        self._wake.set()

    def offer(self, message_id: str, refs: Iterable[PayloadRef]) -> None:
        """Let the peer have these payloads, which a message sent to it refers to, and no others."""
        self._offers[message_id] = [bytes.fromhex(ref.digest) for ref in refs]

    def withdraw(self, message_id: str) -> None:
        """The peer needs this message's payloads no longer."""
        for digest in self._offers.pop(message_id, ()):
            if wanted := self._wanted.pop(digest, None):
                self.upload_kbit_s = self._speed(*wanted) or self.upload_kbit_s

    def _speed(self, since: float, length: int) -> float | None:
        """Of a payload that was long enough to tell, in kbit/s."""
        seconds = asyncio.get_running_loop().time() - since
        return length * 8 / 1000 / max(seconds, 1e-3) if length >= _LEAST_MEASURED else None

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do work that belongs to this stream and ends with it; its LichenError ends the stream."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the stream with this error: `run` raises it."""
        if not self._failed.done():
            self._failed.set_exception(error)

    def finish(self, last: F) -> None:
        """Send what is queued and this frame, then end the stream: `run` returns."""
        self._finishing = True
        self.send(last)

    # Payloads that come

    async def fetch(self, ref: PayloadRef) -> None:
        """Return when the payload lies in the spool, complete and verified; ask the peer for what is missing of it.

        Raises:
            LichenError: PAYLOAD_CORRUPT, if its bytes are not those of its digest or its sender has lost it (`PayloadMissingError`);
                FRAME_INVALID, if its length cannot be.
        """
        if not 0 <= ref.length <= MAX_PAYLOAD:
            raise frame_invalid(f"a payload of {ref.length} bytes")
        lock = self._locks.setdefault(ref.digest, asyncio.Lock())
        async with lock, self._fetching:
            have = self._spool.length(ref.digest)
            if have is None:
                await self._fetch(ref)
            elif have != ref.length:
                raise frame_invalid(f"a payload of {ref.length} bytes whose digest belongs to {have} bytes")

    async def _fetch(self, ref: PayloadRef) -> None:
        digest = bytes.fromhex(ref.digest)
        partial = await asyncio.to_thread(self._spool.partial, ref.digest, ref.length)
        incoming = _Incoming(partial)
        self._incoming[digest] = incoming
        try:
            if partial.offset < partial.length:
                began, missing = asyncio.get_running_loop().time(), partial.length - partial.offset
                self.send(self._kind(want=Want(digest=digest, offset=partial.offset)))
                await incoming.done
                self.download_kbit_s = self._speed(began, missing) or self.download_kbit_s
            await asyncio.to_thread(partial.finish)
        except asyncio.CancelledError:
            self._stopped.add(digest)
            self.send(self._kind(stop=Stop(digest=digest)))
            raise
        finally:
            del self._incoming[digest]
            await incoming.close()

    # What the peer sends

    async def receive(self, field: str, frame: Any) -> bool:
        """Take a frame that concerns payloads or only says that the peer lives; False if it is for the caller."""
        match field:
            case "chunk":
                await self._chunk(frame.chunk)
            case "want":
                self._want(frame.want)
            case "seen":
                self._window.seen(time.monotonic())
                self._wake.set()
            case "stop":
                self._drop_outgoing(frame.stop.digest)
            case "missing":
                incoming = self._incoming.get(frame.missing.digest)
                if incoming is not None and not incoming.done.done():
                    incoming.done.set_exception(PayloadMissingError(frame.missing.digest.hex()))
            case "heartbeat":
                pass
            case _:
                return False
        return True

    async def _chunk(self, chunk: Chunk) -> None:
        self.bytes_received += len(chunk.data)
        incoming = self._incoming.get(chunk.digest)
        if incoming is not None and not incoming.done.done() and (chunk.offset == incoming.expected or chunk.digest not in self._stopped):
            await incoming.add(chunk.offset, chunk.data)
        elif chunk.digest not in self._stopped:  # else it was under way when we said stop
            raise frame_invalid("a chunk that nobody asked for")
        if chunk.tell:
            self.send(self._kind(seen=Seen()))

    def _want(self, want: Want) -> None:
        self._drop_outgoing(want.digest)
        # Whether a payload exists is nobody's business but of those whose messages refer to it: both get the same answer.
        file = self._open(want.digest) if any(want.digest in digests for digests in self._offers.values()) else None
        if file is None:
            self.send(self._kind(missing=Missing(digest=want.digest)))
            return
        if want.offset >= os.fstat(file.fileno()).st_size:
            file.close()
            raise frame_invalid(f"it wants a payload from its offset {want.offset} on, which is beyond its end")
        self._wanted[want.digest] = asyncio.get_running_loop().time(), os.fstat(file.fileno()).st_size - want.offset
        self._outgoing.append(_Outgoing(want.digest, file, want.offset))
        self._wake.set()

    def _open(self, digest: bytes) -> BinaryIO | None:
        try:
            return self._spool.path(digest.hex()).open("rb")
        except FileNotFoundError:
            return None

    def _drop_outgoing(self, digest: bytes) -> None:
        for outgoing in [item for item in self._outgoing if item.digest == digest]:
            self._outgoing.remove(outgoing)
            outgoing.close()

    # The stream

    async def run(self, read: Callable[[], Awaitable[bytes | None]], handle: Callable[[bytes], Awaitable[bool]]) -> None:
        """Serve the stream until it ends.

        Args:
            read: the next serialised frame; None at the stream's end.
            handle: takes each frame; False ends the stream.

        Raises:
            LichenError: what `fail` was told, or what ``handle`` raised.
            TimeoutError: the peer has been silent for too long.
            Exception: whatever ``read`` or ``write`` raise when the transport breaks.
        """
        tasks: list[asyncio.Task[None]] = [
            asyncio.create_task(part) for part in (self._read_all(read, handle), self._send_all(), self._watch())
        ]
        try:
            await asyncio.wait([*tasks, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()  # the reason, before what it brought about
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            await self._close(tasks)

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        self._failed.cancel()
        running = [*tasks, *self._tasks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for outgoing in self._outgoing:
            outgoing.close()
        self._outgoing.clear()

    async def _read_all(self, read: Callable[[], Awaitable[bytes | None]], handle: Callable[[bytes], Awaitable[bool]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._waiting, self._heard = True, loop.time()
            data = await read()
            self._waiting = False  # our own work on a frame is not the peer's silence
            if data is None or not await handle(data):
                return

    async def _send_all(self) -> None:
        while True:
            if self._control:
                item = self._control.popleft()
                data = item if isinstance(item, bytes) else await self._made(item)
                if data is not None:
                    await self._write(data)
            elif self._finishing:
                return
            elif self._outgoing and (length := self._window.length(time.monotonic())):
                await self._send_chunk(length)
            else:
                self._wake.clear()
                try:
                    async with asyncio.timeout(self._timing.heartbeat):
                        await self._wake.wait()
                except TimeoutError:
                    await self._write(self._kind(heartbeat=Heartbeat()).SerializeToString())

    async def _made(self, make: Later[F]) -> bytes | None:
        frame = await make()
        if frame is None:
            return None
        data = frame.SerializeToString()
        self.bytes_sent += len(data)
        return data

    async def _send_chunk(self, length: int) -> None:
        outgoing = self._outgoing[0]
        chunk = await outgoing.next(length)
        if outgoing.closed:
            return  # the peer has stopped it meanwhile
        if chunk is None:
            self._outgoing.remove(outgoing)
            outgoing.close()
            return
        self._outgoing.rotate(-1)
        self.bytes_sent += len(chunk.data)
        chunk.tell = self._window.sent(len(chunk.data), last=len(chunk.data) < length, now=time.monotonic())
        await self._write(self._kind(chunk=chunk).SerializeToString())

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silent = loop.time() - self._heard if self._waiting else 0.0
            if silent >= self._timing.dead:
                raise TimeoutError(f"nothing was heard from the peer for {self._timing.dead:g} s")
            await asyncio.sleep(self._timing.dead - silent)
