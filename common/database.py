"""A SQLite file that survives crashes: write-ahead log, full synchronisation, a version, and one lock for all threads."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lichen.common.errors import Code, LichenError

_WAIT_S = 30.0  # for another process's transaction


class Database:
    """What the coordinator's store, the agent's mailbox and its ledger are made of; safe to use from several threads.

    Args:
        path: the file; made if it is not there.
        schema: statements that make the tables, separated by semicolons; a change raises the version.
        version: of the schema.
        upgrades: for an older version the statements that make the next one of it.

    Raises:
        LichenError: STORE_VERSION if a newer lichen wrote the file.
    """

    def __init__(self, path: str | Path, schema: str, version: int, upgrades: Mapping[int, str] | None = None) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=_WAIT_S)
        self._use_write_ahead_log()
        with self._transaction() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found > version:
                raise LichenError(
                    Code.STORE_VERSION,
                    f"its format is {found}, this lichen reads up to {version}",
                    where=str(path),
                    fix="Install the lichen that wrote it, or a newer one.",
                )
            if found == 0:
                for statement in schema.split(";"):
                    db.execute(statement)
            for older in range(found, version) if found else ():
                self._upgrade(db, older, (upgrades or {}).get(older, ""))
            if found != version:  # who writes nothing need not wait for the disk: a node opens its ledger several times a round
                db.execute(f"PRAGMA user_version = {version}")

    def _use_write_ahead_log(self) -> None:
        """Other statements wait for their turn, this one does not: of two processes that open a new file at once, one would fail."""
        until = time.monotonic() + _WAIT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.005)
            else:
                return

    def _upgrade(self, db: sqlite3.Connection, found: int, statements: str) -> None:
        """Make the next version of the tables of version ``found``, within the transaction that opens the file."""
        for statement in statements.split(";"):
            db.execute(statement)

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing; a durable one, and all before it, is on the disk when the block has ended."""
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        with self._lock:
            self._db.close()
