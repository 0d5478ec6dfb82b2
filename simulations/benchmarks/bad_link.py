"""`lichen bench channel --bad-link`: a round over a link that hardly is one, and what cuts of a connection cost.

The round is a deployed federation's: joining, a plan, training and the update, by the commands that people use, on both sides of a
`packet_link`. The cuts are a `slow_link`'s, which counts the bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Message, RecordDict

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.records import payload_refs, reply
from lichen.common.result import read_result
from lichen.simulations.benchmarks.channel import AGENTS, enrol, with_payload
from lichen.simulations.benchmarks.packet_link import NEAR, Conditions, packet_link
from lichen.simulations.benchmarks.slow_link import SlowLink

LICHEN = (sys.executable, "-m", "lichen.common.cli")
START_S, RUN_S = 60.0, 600.0
PORTS = ("--fleet-port", "7443", "--enrol-port", "7444")


def plan_of(base: Path, rounds: int) -> Plan:
    """One client with made-up rows; the model of a million parameters with LoRA r = 8 on query and value."""
    return parse_plan(
        {
            "name": "bench-bad-link",
            "rounds": rounds,
            "task": {"kind": "text-classification", "labels": ["crop", "metal", "money"], "max_length": 32},
            "model": {"base": str(base), "adapter": {"kind": "lora", "rank": 8, "alpha": 16}},
            "cohort": {"size": 1, "minimum": 1, "deadline_s": int(RUN_S)},
            "local": {"steps": 2, "batch_size": 8},
            "evaluation": {"validation_fraction": 0},
            "simulation": {"clients": 1, "partition": "iid", "data": "made-up:20"},
        }
    )


def bench_round(conditions: Conditions, rounds: int = 2) -> dict[str, Any]:
    """Run a federation of one agent over a bad link.

    Returns:
        ``join_s`` (of `lichen client join`, start-up included), ``connect_s`` (from the agent's start until it is connected), and of the
        slowest round ``round_s``, ``up`` and ``down`` (payload bytes); ``link_up``, ``link_down`` (bytes of IP packets
        over the whole run that arrived), ``lost`` (packets).

    Raises:
        OSError: if this machine can't have such a link.
        LichenError: CHECK_FAILED, if the run does not finish.
    """
    from lichen.coordinator.watch import ended
    from lichen.simulations.benchmarks.small_model import make_small_model
    from lichen.simulations.simulate import deal

    with TemporaryDirectory(prefix="lichen-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        link = stack.enter_context(packet_link(conditions))
        plan = plan_of(make_small_model(folder / "base"), rounds)
        (home,) = deal(plan, folder / "nodes")[0].write_all()
        (home / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n", encoding="utf-8")
        (folder / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
        coordinator = folder / "coordinator"
        _lichen((), "coordinator", "init", "--home", coordinator, "--host", NEAR, *PORTS)
        _start(stack, link.near, folder / "coordinator.log", "coordinator", "serve", "--home", coordinator)
        _until(lambda: "ready:" in (folder / "coordinator.log").read_text(), START_S, folder / "coordinator.log")
        invite = _lichen((), "coordinator", "invite", home.name, "--home", coordinator).strip().splitlines()[-1]
        began = time.monotonic()
        _lichen(link.far, "client", "join", invite, "--home", home)
        joined = time.monotonic()
        _start(stack, link.far, folder / "agent.log", "client", "run", "--home", home)
        _until(lambda: "connected to" in (folder / "agent.log").read_text(), START_S, folder / "agent.log")
        connected = time.monotonic()
        told = json.loads(_lichen((), "coordinator", "submit", folder / "plan.yaml", "--home", coordinator, "--json"))
        run = coordinator / "runs" / str(told["run_id"])
        _until(lambda: ended(run), RUN_S, folder / "coordinator.log")
        result = read_result(run)
        if result.status != "finished":
            raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where="lichen bench channel")
        up, down = link.traffic()
    slowest = max(result.rounds, key=lambda row: row.seconds or 0.0)
    return {
        "join_s": joined - began,
        "connect_s": connected - joined,
        "round_s": slowest.seconds,
        "up": slowest.uplink_bytes,
        "down": slowest.downlink_bytes,
        "link_up": up.bytes,
        "link_down": down.bytes,
        "lost": up.lost + down.lost,
    }


def _lichen(where: Sequence[str], *arguments: str | Path) -> str:
    command = [*where, *LICHEN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    if done.returncode:
        raise LichenError(Code.CHECK_FAILED, done.stderr.strip(), where=" ".join(map(str, arguments[:2])))
    return done.stdout


def _start(stack: ExitStack, where: Sequence[str], log: Path, *arguments: str | Path) -> None:
    out = stack.enter_context(log.open("wb"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LICHEN_LEDGER": "."}
    process = subprocess.Popen([*where, *LICHEN, *map(str, arguments)], stdout=out, stderr=out, env=environment)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def _until(condition: Any, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LichenError(Code.CHECK_FAILED, f"not in time: {log.read_text()[-1000:]}", where="lichen bench channel")
        time.sleep(0.05)


def bench_cuts(cuts: int = 10, kilobytes: int = 1000, rate: float = 125_000.0) -> dict[str, Any]:
    """Upload one payload while its connection is cut at equal distances.

    Args:
        cuts: how many.
        kilobytes: of the payload, in 10^3 bytes.
        rate: bytes a second.

    Returns:
        ``cuts``, ``payload`` (bytes), ``uncut`` and ``sent`` (bytes that came from the agent without and with cuts), ``again`` (the
        difference for each cut: what was on its way, a TLS handshake and an envelope).
    """
    uncut = asyncio.run(_upload(0, kilobytes * 1000, rate))
    sent = asyncio.run(_upload(cuts, kilobytes * 1000, rate))
    return {"cuts": cuts, "payload": kilobytes * 1000, "uncut": uncut, "sent": sent, "again": (sent - uncut) / cuts}


async def _upload(cuts: int, length: int, rate: float) -> int:
    from lichen.client.connection import Connection, Credentials
    from lichen.client.mailbox import Mailbox
    from lichen.common.channel.spool import Spool
    from lichen.coordinator.fleet import FleetServer
    from lichen.coordinator.store import Store

    with TemporaryDirectory(prefix="lichen-bench-") as name:
        home = Path(name)
        enrol(home)
        key, certificate, ca = ((home / file).read_bytes() for file in ("key.pem", "certificate.pem", "ca.pem"))
        store = Store(home / "store.sqlite")
        fleet = FleetServer(store, Spool(home / "spool"))
        link = SlowLink(f"127.0.0.1:{await fleet.start('127.0.0.1:0', key, certificate, ca)}", rate=rate)
        own = home / AGENTS[0]
        spool, mailbox = Spool(own / "spool"), Mailbox(own / "agent.sqlite")

        async def handle(message: Message) -> Message:
            return reply(message, with_payload(await asyncio.to_thread(spool.add_bytes, os.urandom(length))))

        credentials = Credentials(*((own / file).read_bytes() for file in ("ca.pem", "key.pem", "certificate.pem")))
        connection = Connection(await link.start(), lambda: credentials, mailbox, spool)
        running = asyncio.create_task(connection.run(handle))
        grid = fleet.grid(1)
        (node,) = await asyncio.to_thread(grid.wait_for_nodes, 1, START_S)
        asking = asyncio.create_task(
            asyncio.to_thread(grid.send_and_receive, [grid.create_message(RecordDict(), "train", node, "1")], timeout=RUN_S)
        )
        for number in range(1, cuts + 1):
            link.cut_up = number * length / (cuts + 1)
            while link.cut_up < float("inf"):
                await asyncio.sleep(0.01)
        (answer,) = await asking
        sent = link.up
        connection.stop()
        await running
        await link.stop()
        await fleet.stop()
        mailbox.close()
        store.close()
    if payload_refs(answer)[0].length != length:
        raise LichenError(Code.CHECK_FAILED, "another payload came", where="lichen bench channel")
    return sent


def told(link: Conditions, found: dict[str, Any] | str, cuts: dict[str, Any]) -> str:
    """What was found, in lines; ``found`` is the reason where there was no such link."""
    what = f"{link.rate / 1000:g} kbit/s, {link.delay * 1000:g} ms each way, {link.loss:.0%} of the packets lost, TCP {link.congestion}"
    if isinstance(found, str):
        lines = [f"{what}: not measured, {found}"]
    else:
        lines = [
            f"{what}: joined in {found['join_s']:.0f} s, connected in {found['connect_s']:.0f} s, a round in {found['round_s']:.0f} s"
            f" (payload: up {found['up'] / 1000:.1f} kB, down {found['down'] / 1000:.1f} kB)",
            f"in all, as IP packets: up {found['link_up'] / 1000:.0f} kB, down {found['link_down'] / 1000:.0f} kB; {found['lost']} lost",
        ]
    lines.append(
        f"upload of {cuts['payload'] / 1000:g} kB cut {cuts['cuts']} times: {cuts['sent'] / 1000:.0f} kB sent, {cuts['uncut'] / 1000:.0f}"
        f" without cuts; {cuts['again'] / 1000:.1f} kB a cut"
    )
    return "\n".join(lines)


def bench_bad_link(as_json: bool = False) -> dict[str, Any]:
    """Measure both, print and return them."""
    conditions = Conditions()
    found: dict[str, Any] | str
    try:
        found = bench_round(conditions)
    except OSError as error:
        found = str(error)
    cuts = bench_cuts()
    print(json.dumps({"round": found, "cuts": cuts}) if as_json else told(conditions, found, cuts))
    return {"round": found, "cuts": cuts}
