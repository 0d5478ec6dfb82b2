"""`lichen bench channel`: what the channel costs, with a coordinator and two agents as processes of their own, over mutual TLS.

Round trip of a task without payload; different data to each agent and different data back; resident memory of both ends.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from lichen.common.pki import Authority, fingerprint, make_csr, make_key
from lichen.common.records import PayloadRef, payload_refs, reference, reply
from lichen.simulations.benchmarks.memory import forget_peak, resident

AGENTS = ("agent-1", "agent-2")
_MB = 1_000_000
_START_SECONDS = 60.0


def bench_channel(rounds: int = 200, megabytes: int = 100, json: bool = False) -> dict[str, Any]:
    """Measure the channel, print the figures and return them.

    Args:
        rounds: round trips without payload.
        megabytes: payload for each of the two agents, and back from each, in 10^6 bytes; all four differ.
        json: print one JSON object instead of lines.

    Returns:
        Milliseconds a round trip (``round_trip_ms_median``, ``_max``), ``transfer_s``, and megabytes (10^6 bytes) of resident
        memory: ``coordinator_idle_mb``, ``coordinator_peak_mb``, ``coordinator_above_idle_mb`` and ``agent_idle_mb``.
    """
    with tempfile.TemporaryDirectory(prefix="lichen-bench-") as name:
        home = Path(name)
        enrol(home)
        for agent in AGENTS:
            _random_file(home / agent / "reply.bin", megabytes * _MB)
        processes = [_start("coordinator", home, str(rounds), str(megabytes))]
        try:
            _wait_for(home / "port", processes)
            processes += [_start("agent", home, agent) for agent in AGENTS]
            _wait_for(home / "attached", processes)
            time.sleep(1.0)
            agent_idle = max(resident("VmRSS", process.pid) for process in processes[1:])
            (home / "go").touch()
            output, _ = processes[0].communicate(timeout=600)
            if processes[0].returncode != 0:
                raise RuntimeError("the benchmark's coordinator failed; its error is above")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    figures = {**jsonlib.loads(output), "agent_idle_mb": agent_idle / _MB}
    print(jsonlib.dumps(figures) if json else _table(figures))
    return figures


def _table(figures: dict[str, Any]) -> str:
    return "\n".join(
        (
            f"round trip of an empty task to {len(AGENTS)} agents, {figures['rounds']} rounds: median"
            f" {figures['round_trip_ms_median']:.1f} ms, maximum {figures['round_trip_ms_max']:.1f} ms",
            f"{figures['megabytes']} MB of different data to {len(AGENTS)} agents and back: {figures['transfer_s']:.2f} s",
            f"coordinator's memory: {figures['coordinator_idle_mb']:.0f} MB idle, {figures['coordinator_peak_mb']:.0f} MB peak,"
            f" {figures['coordinator_above_idle_mb']:.0f} MB above idle",
            f"agent's memory, idle: {figures['agent_idle_mb']:.0f} MB",
        )
    )


def enrol(home: Path) -> None:
    """Make a federation's keys and the coordinator's store, as `lichen coordinator init` and `lichen client join` do."""
    from lichen.coordinator.store import Store

    authority = Authority.create(home / "pki")
    key, certificate = authority.issue_server(["127.0.0.1"])
    store = Store(home / "store.sqlite")
    _write(home, key, certificate, authority.ca_pem)
    for agent in AGENTS:
        node_key = make_key()
        node_certificate = authority.sign_csr(make_csr(node_key, agent), agent, "node")
        store.add_node(agent, fingerprint(node_certificate))
        _write(home / agent, node_key, node_certificate, authority.ca_pem)
    store.close()


def _write(directory: Path, key: bytes, certificate: bytes, ca: bytes) -> None:
    directory.mkdir(exist_ok=True)
    for name, data in (("key.pem", key), ("certificate.pem", certificate), ("ca.pem", ca)):
        (directory / name).write_bytes(data)


def _random_file(path: Path, length: int) -> None:
    with path.open("wb") as file:
        for start in range(0, length, _MB):
            file.write(os.urandom(min(_MB, length - start)))


def _start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lichen.simulations.benchmarks.channel", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a process of the benchmark did not start (waiting for {path.name})")
        time.sleep(0.02)


def with_payload(ref: PayloadRef) -> RecordDict:
    """What a message with this payload alone holds."""
    array = reference(ref)
    return RecordDict({"payload": ArrayRecord({"payload": array})})


async def _coordinate(home: Path, rounds: int, megabytes: int) -> None:
    """The coordinator's process."""
    from lichen.common.channel.spool import Spool
    from lichen.coordinator.fleet import FleetServer
    from lichen.coordinator.store import Store

    fleet = FleetServer(Store(home / "store.sqlite"), Spool(home / "spool"))
    key, certificate, ca = ((home / name).read_bytes() for name in ("key.pem", "certificate.pem", "ca.pem"))
    port = await fleet.start("127.0.0.1:0", key, certificate, ca)
    _publish(home / "port", str(port))
    grid = fleet.grid(1)
    figures = await asyncio.to_thread(_measure, grid, home, rounds, megabytes)
    await fleet.stop()
    print(jsonlib.dumps(figures))


def _measure(grid: Any, home: Path, rounds: int, megabytes: int) -> dict[str, Any]:
    nodes = grid.wait_for_nodes(len(AGENTS), _START_SECONDS)
    _publish(home / "attached", "")
    while not (home / "go").exists():
        time.sleep(0.02)
    idle = resident("VmRSS")
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        content = RecordDict({"task": ConfigRecord({"round": number})})
        messages = [grid.create_message(content, "train", node, str(number)) for node in nodes]
        replies = grid.send_and_receive(messages, timeout=60)
        times.append((time.perf_counter() - began) * 1000)
        if len(replies) != len(nodes):
            raise RuntimeError("an empty task was not answered")
        grid.release(message.metadata.message_id for message in messages)
    refs = []
    for _ in nodes:
        with grid.spool.temporary() as file:
            path = Path(file.name)
        _random_file(path, megabytes * _MB)
        refs.append(grid.spool.add_file(path))
    forget_peak()
    began = time.perf_counter()
    messages = [grid.create_message(with_payload(ref), "train", node, "data") for node, ref in zip(nodes, refs, strict=True)]
    replies = grid.send_and_receive(messages, timeout=300)
    seconds = time.perf_counter() - began
    came = {ref.digest for message in replies for ref in payload_refs(message) if grid.spool.length(ref.digest) == megabytes * _MB}
    if len(came) != len(nodes):
        raise RuntimeError("a payload did not come back")
    peak = resident("VmHWM")
    return {
        "rounds": rounds,
        "megabytes": megabytes,
        "round_trip_ms_median": statistics.median(times),
        "round_trip_ms_max": max(times),
        "transfer_s": seconds,
        "coordinator_idle_mb": idle / _MB,
        "coordinator_peak_mb": peak / _MB,
        "coordinator_above_idle_mb": (peak - idle) / _MB,
    }


def _publish(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)


async def _serve_agent(home: Path, name: str) -> None:
    """An agent's process."""
    from lichen.client.connection import Connection, Credentials
    from lichen.client.mailbox import Mailbox
    from lichen.common.channel.spool import Spool

    own = home / name
    spool = Spool(own / "spool")

    async def handle(message: Message) -> Message:
        if not payload_refs(message):
            return reply(message, RecordDict({"task": message.content["task"]}))
        return reply(message, with_payload(await asyncio.to_thread(spool.add_file, own / "reply.bin")))

    credentials = Credentials(*((own / item).read_bytes() for item in ("ca.pem", "key.pem", "certificate.pem")))
    address = f"127.0.0.1:{(home / 'port').read_text()}"
    await Connection(address, lambda: credentials, Mailbox(own / "agent.sqlite"), spool).run(handle)


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    if role == "coordinator":
        asyncio.run(_coordinate(Path(directory), int(rest[0]), int(rest[1])))
    else:
        asyncio.run(_serve_agent(Path(directory), rest[0]))
