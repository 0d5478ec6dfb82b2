"""Kills processes that reserve, train and send, again and again; run as a program by test_ledger_faults.py.

`python ledger_victim.py FOLDER SEED KILLS CUT`: with CUT = 1 the machine loses power too (needs unsynced.c preloaded): what was not synced
is lost, all of it or some. Prints a line of JSON with what was done; ends with status 1 and a reason where the ledger under-counts.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

from lichen.client.ledger import FILE, Ledger
from lichen.client.ledger_book import Limit, Limits
from lichen.common.privacy.accounting import Segment, epsilon

ROUND = Segment(2.0, 0.1, 20)
LIMITS = Limits("example", Limit(100.0, 1e-5))
RENEW = 25  # kills after which a new ledger is begun, so that opening it stays fast


def live(folder: Path, pipe: int, first: int) -> None:
    """One process: messages from ``first`` on; each is told to the pipe when its result has left."""
    with Ledger(folder) as ledger:
        reads = set(ledger.assign("train", [1, 2, 3]))
        number = first
        while True:
            ledger.reserve("train", str(number), "m", 1, ROUND, LIMITS, reads, as_of=ledger.split_at)
            ledger.released("train", str(number), "m")
            os.write(pipe, struct.pack("<q", number))
            number += 1


def kill_once(folder: Path, first: int, wait: float, *, young: bool) -> list[int]:
    """Let a process live for some time, from its birth or from its first message on, and kill it; the messages whose results left."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(folder, writer, first)
        finally:
            os._exit(98)
    os.close(writer)
    if not young:
        select.select([reader], [], [], 20)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"the process ended by itself: {status}")
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    return [value for (value,) in struct.iter_unpack("<q", told[: len(told) // 8 * 8])]


def cut_power(log: Path, draw: random.Random) -> int:
    """Take back what was written and not synced: all of it, or what each draw says; returns how much was lost."""
    if not log.exists():
        return 0
    data, at = log.read_bytes(), 0
    pending: dict[str, list[tuple[str, int, int, bytes, bytes]]] = {}
    while at < len(data):
        kind = chr(data[at])
        offset, size, length, name = struct.unpack_from("<QQQQ", data, at + 1)
        at += 33
        path = data[at : at + name].decode()
        at += name
        new, old = data[at : at + length], data[at + length : at + 2 * length]
        at += 2 * length
        if kind == "s":
            pending[path] = []
        else:
            pending.setdefault(path, []).append((kind, offset, size, new, old))
    keep = draw.choice([0.0, 0.0, 0.5])
    lost = 0
    for path, writes in pending.items():
        if not Path(path).exists():
            continue
        with open(path, "r+b") as file:
            for kind, offset, size, _, old in reversed(writes):
                if kind == "w":
                    file.seek(offset)
                    file.write(old)
                file.truncate(size)
            for kind, offset, _, new, _ in writes:
                if draw.random() >= keep:
                    lost += 1
                elif kind == "w":
                    file.seek(offset)
                    file.write(new)
                else:
                    file.truncate(offset)
    return lost


def main(root: Path, seed: int, kills: int, *, cut: bool) -> None:
    draw = random.Random(seed)
    log = Path(os.environ["LICHEN_WRITES"]) if cut else root / "none"
    epsilon([ROUND], LIMITS.run.delta)  # once, for all who are forked: it loads much
    told = {"kills": kills, "left": 0, "excess": 0, "lost_writes": 0, "before_the_first": 0}
    folder, here, over, first = root, 0, 0, 0
    for number in range(kills):
        if number % RENEW == 0:
            folder = root / str(number)
            folder.mkdir()
            here = over = first = 0
        log.unlink(missing_ok=True)
        left = kill_once(folder, first, draw.uniform(0, 0.04), young=draw.random() < 0.3)
        if cut:
            told["lost_writes"] += cut_power(log, draw)
            (folder / f"{FILE}-shm").unlink(missing_ok=True)  # shared memory: a machine that starts has none
        with Ledger(folder) as ledger:
            ledger.verify()
            entries = ledger.entries()
        here += len(left)
        released = {int(entry.run) for entry in entries if entry.released_at is not None}
        before, over = over, sum(entry.segment.steps for entry in entries) // ROUND.steps - here
        if not set(left) <= released or over < 0:
            raise SystemExit(f"kill {number}: {here} rounds left, {over} more were charged; {left} is not in {sorted(released)}")
        if over > before + 1:
            raise SystemExit(f"kill {number}: {over - before} rounds were charged more than left")
        told["left"] += len(left)
        told["excess"] += over - before
        told["before_the_first"] += not left
        first = left[-1] + 1 if left else first
    shutil.rmtree(root)
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), cut=sys.argv[4] == "1")
