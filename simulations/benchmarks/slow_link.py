"""A TCP relay that is a bad link: slow, late, with stalls; that cuts connections, or lets them die in silence as a NAT does.

For what needs no packets. TCP ends at the relay, so loss can only be had as the stall that a retransmission is; `packet_link` has
real loss. `HttpProxy` is the same link behind an HTTP proxy's CONNECT.
"""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from dataclasses import dataclass, field

SEGMENT = 1448  # bytes of payload in a TCP segment on Ethernet
_BUFFER = 16 << 10  # of each socket of a link that is slow from the start: what waits in the relay's own buffers is on no link
_TICK = 0.01
_LARGEST = 64 << 10


@dataclass(eq=False)
class _Connection:
    """One connection through the link: both its ends, and whether its packets still arrive."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    forgotten: bool = False
    busy_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class SlowLink:
    """A link from a free port of this machine to a server. All attributes may be changed at any time, in the loop's thread.

    Args:
        target: the server's ``host:port``.
        rate: bytes a second, each way.
        delay: seconds that a byte takes, each way.
        loss: share of the segments that stall their direction for the two ways that a retransmission takes at least.
        idle: seconds without a byte after which a connection is closed, or forgotten.
        forgets: a connection that was idle is not closed: nothing on it arrives any more, and nobody is told, as with a NAT's mapping.
        seed: of the losses.

    Attributes:
        up: bytes that came from clients.
        down: bytes that came from the server.
        cut_up, cut_down: break all connections when so many bytes have come, once.
        frozen: while true nothing passes, and nothing is closed.
        frozen_down: the same for what the server says.
        connections: how many were made.
    """

    def __init__(
        self,
        target: str,
        *,
        rate: float = float("inf"),
        delay: float = 0.0,
        loss: float = 0.0,
        idle: float = float("inf"),
        forgets: bool = False,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.rate = rate
        self.delay = delay
        self.loss = loss
        self.idle = idle
        self.forgets = forgets
        self.up = self.down = self.connections = 0
        self.cut_up = self.cut_down = float("inf")
        self.frozen = self.frozen_down = False
        self._chance = random.Random(seed)  # noqa: S311
        self._open: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen; returns the link's ``host:port``."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._small = self.rate < float("inf")
        self._limit = _BUFFER if self._small else _LARGEST
        if self._small:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=self._limit)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection, as a network does: without a goodbye."""
        for connection in list(self._open):
            self._abort(connection)

    def forget(self) -> None:
        """Let nothing arrive any more on the connections of now."""
        for connection in self._open:
            connection.forgotten = True

    async def stop(self) -> None:
        """Listen no more, break every connection, and return when that is done."""
        self._server.close()
        self.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _abort(self, connection: _Connection) -> None:
        self._open.discard(connection)
        connection.near.transport.abort()
        connection.far.transport.abort()

    async def _target_of(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        return self.target

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, port = (await self._target_of(reader, writer)).rsplit(":", 1)
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=self._limit)
        except (OSError, ValueError, asyncio.IncompleteReadError):
            writer.close()
            return
        self.connections += 1
        for end in (writer, far_writer) if self._small else ():
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            end.transport.set_write_buffer_limits(high=_BUFFER)
        connection = _Connection(writer, far_writer)
        self._open.add(connection)
        pumps = (self._pump(connection, reader, far_writer, "up"), self._pump(connection, far_reader, writer, "down"))
        await asyncio.gather(*pumps, self._watch(connection), return_exceptions=True)

    async def _watch(self, connection: _Connection) -> None:
        while connection in self._open:
            if asyncio.get_running_loop().time() - connection.busy_at > self.idle:
                if self.forgets:
                    connection.forgotten = True
                else:
                    self._abort(connection)
            await asyncio.sleep(5 * _TICK)

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """Take bytes at the link's rate; `_deliver` hands them on when they have travelled."""
        loop = asyncio.get_running_loop()
        travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(connection, travelling, writer))
        free = loop.time()
        try:
            while data := await reader.read(int(min(_LARGEST, max(SEGMENT, self.rate * _TICK)))):
                while self._holds(connection, way):
                    await asyncio.sleep(_TICK)
                if connection not in self._open:  # cut, with bytes left in the reader
                    return
                connection.busy_at = loop.time()
                setattr(self, way, getattr(self, way) + len(data))
                free = max(free, loop.time()) + len(data) / self.rate
                if self._chance.random() < self.loss:
                    free += 2 * self.delay
                await asyncio.sleep(free - loop.time())
                if self.delay:
                    travelling.put_nowait((free + self.delay, data))
                else:  # without a place to travel, what a slow reader does not take holds the sender up at once
                    writer.write(data)
                    await writer.drain()
                if getattr(self, way) >= getattr(self, f"cut_{way}"):
                    setattr(self, f"cut_{way}", float("inf"))
                    self.cut()
            travelling.put_nowait((free + self.delay, b""))
            await delivering
        finally:
            delivering.cancel()
            self._abort(connection)

    def _holds(self, connection: _Connection, way: str) -> bool:
        held = self.frozen or connection.forgotten or (self.frozen_down and way == "down")
        return held and connection in self._open

    async def _deliver(self, connection: _Connection, travelling: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await travelling.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            while connection.forgotten:
                await asyncio.sleep(_TICK)
            if not data:
                with suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


class HttpProxy(SlowLink):
    """The link as an HTTP proxy: clients say by CONNECT where they want to go.

    Args:
        hosts: addresses of names that it knows.
        idle: seconds without a byte after which it closes a connection.

    Attributes:
        asked: the first lines of the requests.
        credentials: the ``Proxy-Authorization`` that came with each, or None.
    """

    def __init__(self, hosts: dict[str, str], *, idle: float = float("inf")) -> None:
        super().__init__("", idle=idle)
        self._hosts = hosts
        self.asked: list[str] = []
        self.credentials: list[str | None] = []

    async def _target_of(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        request, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        told = {name.lower(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
        self.asked.append(request)
        self.credentials.append(told.get("proxy-authorization"))
        method, target, _ = request.split()
        if method != "CONNECT":
            raise ValueError(request)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        host, _, port = target.rpartition(":")
        return f"{self._hosts.get(host, host)}:{port}"
