"""The agent's mailbox (``agent.sqlite``): messages that were received, and the replies to them until they are receipted.

A reply is kept as the bytes that are sent: what left once leaves again unchanged, never made (or noised) a second time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from lichen.common.database import Database

VERSION = 3

_SCHEMA = """
CREATE TABLE inbox (message_id TEXT PRIMARY KEY, bytes BLOB NOT NULL, received_at REAL NOT NULL, cancelled_at REAL) STRICT;
CREATE TABLE replies (message_id TEXT PRIMARY KEY, bytes BLOB NOT NULL, made_at REAL NOT NULL, receipted_at REAL, ledger BLOB) STRICT;
CREATE INDEX replies_owed ON replies (message_id) WHERE receipted_at IS NULL;
CREATE TABLE syncs (number INTEGER PRIMARY KEY) STRICT;
CREATE TABLE models (digest TEXT PRIMARY KEY, held_at REAL NOT NULL) STRICT;
"""

_UPGRADES = {
    1: "ALTER TABLE replies ADD COLUMN ledger BLOB",
    2: "CREATE TABLE models (digest TEXT PRIMARY KEY, held_at REAL NOT NULL) STRICT",
}
MODELS = 2
"""Models that are held: what is asked next may go on from the one before the last, if the last message is withdrawn."""


class Mailbox(Database):
    """Messages and replies of one agent.

    Args:
        path: the database file; made if it is not there.

    Raises:
        LichenError: STORE_VERSION if a newer lichen wrote the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, _SCHEMA, VERSION, _UPGRADES)

    def put(self, message_id: str, data: bytes) -> None:
        """Keep a message, so that a restarted process finds it; only after `sync` or `put_reply` a power cut spares it too.

        The message can be worked on meanwhile: its sender sends it again until it has the reply.
        """
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT INTO inbox (message_id, bytes, received_at) VALUES (?, ?, ?)"
                " ON CONFLICT (message_id) DO UPDATE SET cancelled_at = NULL, bytes = excluded.bytes",
                (message_id, data, time.time()),
            )

    def sync(self) -> None:
        """Return when all that was put is on the disk."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO syncs (number) VALUES (1)")

    def unhandled(self) -> list[tuple[str, bytes]]:
        """Messages ``(message_id, bytes)`` that have no reply yet, oldest first."""
        query = (
            "SELECT message_id, bytes FROM inbox WHERE cancelled_at IS NULL"
            " AND message_id NOT IN (SELECT message_id FROM replies) ORDER BY rowid"
        )
        return [(str(message_id), bytes(data)) for message_id, data in self._rows(query)]

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Drop messages that nobody wants answered any more."""
        with self._transaction(durable=False) as db:
            db.executemany(
                "UPDATE inbox SET cancelled_at = ?, bytes = x'' WHERE message_id = ?", [(time.time(), item) for item in message_ids]
            )

    def put_reply(self, message_id: str, data: bytes, ledger: bytes | None = None) -> None:
        """Keep the reply to a message durably, and where the ledger stood when it was made; the first one stays."""
        row = (message_id, data, time.time(), ledger)
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO replies (message_id, bytes, made_at, ledger) VALUES (?, ?, ?, ?)", row)

    def reply(self, message_id: str) -> bytes | None:
        """The reply to a message, receipted or not; None if none was made."""
        rows = self._rows("SELECT bytes FROM replies WHERE message_id = ?", message_id)
        return bytes(rows[0][0]) if rows else None

    def ledger(self, message_id: str) -> bytes | None:
        """Where the ledger stood when the reply to a message was made, if that was kept."""
        rows = self._rows("SELECT ledger FROM replies WHERE message_id = ? AND ledger IS NOT NULL", message_id)
        return bytes(rows[0][0]) if rows else None

    def unreceipted(self) -> list[str]:
        """The ids of messages whose replies the coordinator may not have, oldest first."""
        return [str(row[0]) for row in self._rows("SELECT message_id FROM replies WHERE receipted_at IS NULL ORDER BY rowid")]

    def receipt(self, message_id: str) -> None:
        """The coordinator has the reply, or wants it no longer."""
        with self._transaction(durable=False) as db:
            db.execute("UPDATE replies SET receipted_at = ? WHERE message_id = ?", (time.time(), message_id))
            db.execute("UPDATE inbox SET bytes = x'' WHERE message_id = ?", (message_id,))

    def live_messages(self) -> list[bytes]:
        """The messages without a reply and the replies without a receipt: what the spool's payloads are kept for."""
        replies = self._rows("SELECT bytes FROM replies WHERE receipted_at IS NULL")
        return [data for _, data in self.unhandled()] + [bytes(row[0]) for row in replies]

    def hold_model(self, digest: str) -> None:
        """Keep a model in the spool, from which the next can be made; the oldest of more than `MODELS` is let go of."""
        with self._transaction(durable=False) as db:
            db.execute("INSERT OR REPLACE INTO models (digest, held_at) VALUES (?, ?)", (digest, time.time()))
            db.execute("DELETE FROM models WHERE digest NOT IN (SELECT digest FROM models ORDER BY held_at DESC LIMIT ?)", (MODELS,))

    def models(self) -> list[str]:
        """The digests of the models that are held."""
        return [str(row[0]) for row in self._rows("SELECT digest FROM models")]

    def counts(self) -> tuple[int, int]:
        """How many messages wait for a reply, and how many replies for a receipt."""
        return len(self.unhandled()), len(self.unreceipted())
