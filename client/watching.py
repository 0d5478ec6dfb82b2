"""How an agent finds that new data has come for an online run, and what it says of it: the size that its owner declares, nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lichen.client.data import pieces
from lichen.client.status import is_paused
from lichen.common.channel.fleet_pb2 import News
from lichen.common.continual.stream import is_online
from lichen.common.errors import LichenError
from lichen.common.private_files import write_private

if TYPE_CHECKING:
    from lichen.client.arrivals import Settled
    from lichen.common.plan import Plan

FORMAT: Final = 1
FILE = "watched.json"
EVERY = 1.0
"""Seconds between two looks at the files; a piece of data counts once it has stayed as it is so long, since it may be in the writing."""
_SHARE = 20  # to see whether files have changed takes at most one part in so many of the time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """The online run that was asked for last."""

    run: int
    plan: Plan
    text: str
    """The plan's, as it came."""


class Watcher:
    """Looks at this node's data for an online run that its owner's policy permits.

    Args:
        home: the node's.
        tell: sends what there is.
        note: is given why data can't be counted, and None when they can.
    """

    def __init__(self, home: Path, tell: Callable[[News], None], note: Callable[[str | None], None] = lambda _: None) -> None:
        self._home, self._tell, self._note = home, tell, note
        self._looked: object = None  # what was counted, unless that failed: what stood in the way may be gone
        self._since: dict[object, float] = {}  # by the state of each piece when it was first seen so
        self._still: Set[object] = frozenset()  # the states of the pieces that have stayed so
        self._watched = _read(home / FILE)
        self._begun = asyncio.Event()
        self._settled: Settled = {}
        self._looking = asyncio.Lock()

    def begin(self, run: int, plan: Plan, text: str) -> None:
        """Watch for this run from now on, also after a restart; one that is not online ends it."""
        watched = Watched(run, plan, text) if is_online(plan) else None
        if watched != self._watched:
            self._watched, self._settled = watched, {}
            kept = {"format": FORMAT, "run": run, "plan": text} if watched else {"format": FORMAT}
            write_private(self._home / FILE, json.dumps(kept).encode())
            self._tell(News())
            self._note(None)
        if watched:
            self._begun.set()

    async def run(self) -> None:
        """Look whenever files have changed, until cancelled."""
        if self._watched:
            self._begun.set()
        told: str | None = None
        while True:
            await self._begun.wait()
            if (watched := self._watched) is None:
                self._begun.clear()
                continue
            began = time.monotonic()
            try:
                now = (watched.run, is_paused(self._home), await asyncio.to_thread(self._see))
                took = time.monotonic() - began
                if refused := await asyncio.to_thread(self._refused, watched):  # by a policy that was changed, or by the hour
                    raise refused
                if now != self._looked:
                    await self.look()
                    self._looked = now
                self._note(told := None)
            except Exception as error:  # whatever it is, such as a folder on a share that is away, it may be gone later
                self._looked, took = None, time.monotonic() - began  # all of it, since all is tried again
                self._tell(News(run_id=watched.run))
                if told != (told := str(error)):
                    log.warning("new data is not counted: %s", error)
                self._note(told)
            # where files keep coming, to count what is new takes half of the time at most
            await asyncio.sleep(max(EVERY, _SHARE * took, time.monotonic() - began))

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """While what is new may be read: it is told of no more, and afterwards again what is left, before any answer is sent."""
        if self._watched:
            self._tell(News(run_id=self._watched.run))
        try:
            yield
        finally:
            try:
                await self.look()
            except Exception as error:  # what was trained must not be lost for it
                self._looked = None
                log.warning("new data is not counted: %s", error)

    async def look_twice(self) -> None:
        """`look`, where nothing may have been seen yet: once what is there has had the time to change."""
        if self._watched:
            await asyncio.to_thread(self._see)
            await asyncio.sleep(EVERY)
            await asyncio.to_thread(self._see)
            await self.look()

    async def look(self) -> None:
        """Count what is new, and tell it.

        Raises:
            LichenError: POLICY_…, if the owner does not permit the run; as `new_rows`. Then nothing is told to be there.
        """
        async with self._looking:
            if (watched := self._watched) is None:
                return
            rows = 0
            try:
                rows = await asyncio.to_thread(self._count, watched, self._settled)
            finally:
                self._tell(News(run_id=watched.run, rows=rows))

    def _refused(self, watched: Watched) -> LichenError | None:
        from lichen.client.policy import enforce
        from lichen.common.plan import digest_of

        try:
            enforce(self._home, watched.plan, digest_of(watched.text), datetime.now().astimezone())
        except LichenError as error:
            return error
        return None

    def _see(self) -> Set[object]:
        """See which pieces of data have stayed as they are: their states."""
        now = time.monotonic()
        self._since = {state: self._since.get(state, now) for state in (piece.state() for piece in pieces(self._home))}
        self._still = frozenset(state for state, since in self._since.items() if now - since >= EVERY)
        return self._still

    def _count(self, watched: Watched, settled: Settled) -> int:
        from lichen.client.arrivals import Arrivals, new_rows

        if is_paused(self._home):
            return 0
        if (refused := self._refused(watched)) is not None:
            raise refused
        with Arrivals(self._home) as arrivals:
            return new_rows(self._home, watched.plan, str(watched.run), arrivals, settled, among=self._still).declared_size


def _read(path: Path) -> Watched | None:
    """What was watched before a restart; nothing where the file can't be understood: the coordinator asks again."""
    from lichen.common.plan import plan_from_json

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or "run" not in document:
            return None
        text = str(document["plan"])
        return Watched(int(document["run"]), plan_from_json(text), text)
    except (OSError, ValueError, KeyError, TypeError, LichenError):
        return None
