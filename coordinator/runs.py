"""Run submitted plans one at a time in a thread; a run that was under way when the service died or stopped goes on first."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from lichen.common.disk import disk_failed
from lichen.common.errors import Code, LichenError
from lichen.common.records import message_from_bytes, offered_refs
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.grid import COORDINATOR_NODE_ID, GrpcGrid
from lichen.coordinator.store import Run, Store

RETRY_S = 30.0
SPLITS = ("validation", "test")

log = logging.getLogger(__name__)


class RunGrid(GrpcGrid):
    """The grid of one run: what was not answered in time is withdrawn, and what earlier rounds left is let go of."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and return their replies; late nodes are told not to begin."""
        return self.until_enough(messages, timeout, lambda reply: False)

    def until_enough(self, messages: Iterable[Message], timeout: float | None, enough: Callable[[Message], bool]) -> list[Message]:
        """Push messages and return their replies up to the one with which ``enough`` is true; other nodes are told not to begin."""
        pushed = list(messages)
        ids = self.push_messages(pushed)
        if any(offered_refs(message) for message in pushed):  # others don't tell which models are still needed
            self._let_go({_round_of(message) for message in pushed})
        replies = []
        for reply in self.replies(ids, timeout):
            replies.append(reply)
            if enough(reply):
                break
        self.cancel(set(ids) - {reply.metadata.reply_to_message_id for reply in replies})
        return replies

    def _let_go(self, rounds: set[str]) -> None:
        """Release all rounds but these: when a round's messages go out, the checkpoint of those before is on the disk."""
        self._release([item for item in self._fleet.store.unreleased(self._run_id) if _round_of(message_from_bytes(item[1])) not in rounds])

    def let_go(self, message_ids: Iterable[str], keep: Iterable[str]) -> None:
        """Erase messages, their replies and the payloads of both, but those whose digests are in ``keep``."""
        wanted = set(message_ids)
        self._release([item for item in self._fleet.store.unreleased(self._run_id) if item[0] in wanted] if wanted else [], keep)

    def finish(self) -> None:
        """Withdraw and let go of all that the run has made."""
        self._release(self._fleet.store.unreleased(self._run_id))

    def _release(self, messages: list[tuple[str, bytes]], keep: Iterable[str] = ()) -> None:
        """Erase messages, their replies and the payloads of both: a run of a large model would soon fill the disk."""
        if not messages:
            return
        store, spool = self._fleet.store, self._fleet.spool
        ids = [message_id for message_id, _ in messages]
        self.cancel(ids)
        replies = [reply for message_id in ids if (reply := store.reply(message_id)) is not None]
        used = _digests([*(data for _, data in messages), *replies])
        self.release(ids)
        live = _digests(store.live_messages()).union(keep)
        for digest in used - live:
            spool.path(digest).unlink(missing_ok=True)
        spool.collect(live)  # what came for nobody


def _round_of(message: Message) -> str:
    return str(message.metadata.group_id).split(" ")[0]  # which also has what comes before a batch begins


def _digests(messages: Iterable[bytes]) -> set[str]:
    return {ref.digest for data in messages for ref in offered_refs(message_from_bytes(data))}


class Runner:
    """The thread that runs plans.

    Args:
        store: the queue, and where a run's status is kept.
        fleet: the nodes.
        runs: the directory that holds the run directories.
        retry_s: seconds until a run that the disk stopped is tried again.
    """

    def __init__(self, store: Store, fleet: FleetServer, runs: Path, *, retry_s: float = RETRY_S) -> None:
        self._store = store
        self._fleet = fleet
        self._runs = runs
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._current: tuple[int, RunGrid] | None = None
        self._stopping: set[int] = set()
        self._closing = False
        # a daemon, because scoring can't be interrupted: the service must be able to leave without it
        self._thread = threading.Thread(target=self._work, name="runs", daemon=True)

    def start(self) -> None:
        """Begin with the run that was under way, else with the oldest that is queued."""
        self._thread.start()

    @property
    def current(self) -> int | None:
        """The run that is under way."""
        current = self._current
        return current[0] if current else None

    def wake(self) -> None:
        """Something was queued."""
        with self._changed:
            self._changed.notify_all()

    def stop(self, run_id: int, timeout: float = 30.0) -> str:
        """End a run as stopped, its checkpoints kept; returns its status after at most ``timeout`` seconds.

        Raises:
            LichenError: RUN_UNKNOWN.
        """
        with self._changed:
            status = self._store.run(run_id).status
            if status == "queued":
                self._store.set_run_status(run_id, "stopped", _STOPPED)
                return "stopped"
            if status != "running":
                return status
            self._stopping.add(run_id)
            if self._current is not None and self._current[0] == run_id:
                self._current[1].interrupt(LichenError(Code.RUN_STOPPED, _STOPPED))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or self._store.run(run_id).status != "running", timeout)
            return self._store.run(run_id).status

    def close(self, timeout: float = 10.0) -> bool:
        """Interrupt what is under way, to go on at the next start; False if the thread could not be ended in ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            if self._current is not None:
                self._current[1].interrupt(LichenError(Code.INTERRUPTED, "the coordinator is shutting down"))
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            try:
                self._execute(*taken)
            except Exception:  # such as a store on a full disk: the thread lives on, and tries again
                log.exception("run %d could not be brought to an end", taken[0].run_id)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, self._retry_s)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _take(self) -> tuple[Run, RunGrid] | None:
        """The next run, when there is one; None when the service ends."""
        with self._changed:
            while not self._closing:
                if (run := self._next()) is not None:
                    grid = RunGrid(self._fleet, run.run_id)
                    if run.run_id in self._stopping:
                        grid.interrupt(LichenError(Code.RUN_STOPPED, _STOPPED))
                    self._current = (run.run_id, grid)
                    return run, grid
                self._changed.wait()
        return None

    def _next(self) -> Run | None:
        runs = self._store.runs()
        return next((run for status in ("running", "queued") for run in runs if run.status == status), None)

    def _execute(self, run: Run, grid: RunGrid) -> None:
        log.info("run %d begins or goes on", run.run_id)
        try:
            self._store.set_run_status(run.run_id, "running")
            self._call_app(run, grid)
        except LichenError as error:
            if error.code is Code.INTERRUPTED:
                log.info("run %d is interrupted, to go on at the next start", run.run_id)
            elif disk_failed(error):
                self._wait_for_disk(run, grid, error)
            else:
                self._over(run, grid, "stopped" if error.code is Code.RUN_STOPPED else "failed", str(error))
        except Exception as error:  # the service lives on, whatever a run meets
            if disk_failed(error):
                self._wait_for_disk(run, grid, error)
            else:
                log.exception("run %d met an unexpected error", run.run_id)
                self._over(run, grid, "failed", str(LichenError(Code.INTERNAL, f"{type(error).__name__}: {error}")))
        else:
            self._over(run, grid, "finished", None)

    def _call_app(self, run: Run, grid: RunGrid) -> None:
        # imported here: torch comes with them, and an idle coordinator does without
        from lichen.coordinator.app import app

        directory = self._runs / run.directory
        config: dict[str, bool | float | int | str] = {
            "plan": run.plan,
            "directory": str(directory),
            "engine": "deployed",
            "spool": str(self._fleet.spool.directory),
        }
        for split in SPLITS:
            if (file := split_file(directory, split)).exists():
                config[split] = str(file)
        app(grid, Context(run.run_id, COORDINATOR_NODE_ID, {}, RecordDict(), config))

    def _over(self, run: Run, grid: RunGrid, status: str, error: str | None) -> None:
        log.log(logging.INFO if error is None else logging.ERROR, "run %d %s%s", run.run_id, status, f": {error}" if error else "")
        with self._changed:
            self._store.set_run_status(run.run_id, status, error)
            self._stopping.discard(run.run_id)
        grid.finish()

    def _wait_for_disk(self, run: Run, grid: RunGrid, error: BaseException) -> None:
        told = LichenError(
            Code.OUTPUT_UNUSABLE,
            f"the disk failed: {error}",
            where=str(self._runs / run.directory),
            fix=f"Free some space: the run goes on from its last checkpoint, tried every {self._retry_s:g} s.",
        )
        log.error("run %d waits: %s", run.run_id, told)
        with self._changed:
            try:
                self._store.set_run_status(run.run_id, "running", str(told))
            except sqlite3.Error:
                log.warning("the store can't note it: its disk is full too")
            self._changed.wait_for(lambda: self._closing or run.run_id in self._stopping, self._retry_s)
            stopped = run.run_id in self._stopping and not self._closing
        if stopped:
            self._over(run, grid, "stopped", str(LichenError(Code.RUN_STOPPED, _STOPPED)))


_STOPPED = "stopped by the operator"


def split_file(directory: Path, split: str) -> Path:
    """Where a run directory keeps the coordinator's own rows of a split."""
    return directory / "evaluation" / f"{split}.parquet"
