"""The coordinator's SQLite store: invites, nodes, runs, rounds, the outbox and the replies.

Payloads are not here: messages hold digests, and the bytes lie in the spool (common/channel/spool.py).
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lichen.common.database import Database
from lichen.common.errors import Code, LichenError

VERSION = 2

_SCHEMA = """
CREATE TABLE invites (
    name TEXT NOT NULL, secret_sha256 TEXT PRIMARY KEY, expires_at REAL NOT NULL, used_at REAL,
    certificate BLOB
) STRICT;
CREATE TABLE nodes (
    node_id INTEGER PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT NOT NULL, previous_fingerprint TEXT,
    enrolled_at REAL NOT NULL, revoked_at REAL, last_seen REAL, certificate_ends REAL,
    ledger_sequence INTEGER, ledger_head BLOB, ledger_signature BLOB
) STRICT;
CREATE UNIQUE INDEX nodes_active_name ON nodes (name) WHERE revoked_at IS NULL;
CREATE TABLE operators (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, added_at REAL NOT NULL, certificate_ends REAL NOT NULL, revoked_at REAL
) STRICT;
CREATE TABLE runs (
    run_id INTEGER PRIMARY KEY, created_at REAL NOT NULL, status TEXT NOT NULL, plan TEXT NOT NULL, directory TEXT NOT NULL, error TEXT
) STRICT;
CREATE TABLE rounds (
    run_id INTEGER NOT NULL, round INTEGER NOT NULL, state TEXT NOT NULL, PRIMARY KEY (run_id, round)
) STRICT;
CREATE TABLE outbox (
    message_id TEXT PRIMARY KEY, run_id INTEGER NOT NULL, node_id INTEGER NOT NULL, bytes BLOB NOT NULL,
    created_at REAL NOT NULL, acked_at REAL, cancelled_at REAL, released_at REAL
) STRICT;
CREATE INDEX outbox_node ON outbox (node_id);
CREATE TABLE replies (
    message_id TEXT PRIMARY KEY, node_id INTEGER NOT NULL, bytes BLOB NOT NULL, received_at REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Node:
    """An enrolled agent.

    ``previous_fingerprint`` is its certificate before the last renewal: accepted until the new one was seen once, so that an
    agent that died in mid-renewal is not locked out. ``certificate_ends`` (Unix seconds) is the end of the newest one's validity.
    """

    name: str
    node_id: int
    fingerprint: str
    previous_fingerprint: str | None
    enrolled_at: float
    revoked_at: float | None
    last_seen: float | None
    certificate_ends: float | None

    @property
    def active(self) -> bool:
        """Whether it may connect."""
        return self.revoked_at is None

    def accepts(self, fingerprint: str) -> bool:
        """Whether a certificate with this SHA-256 fingerprint (hex) is this node's."""
        return fingerprint in (self.fingerprint, self.previous_fingerprint)


@dataclass(frozen=True)
class StoredInvite:
    """An invite as the coordinator keeps it; ``certificate`` (PEM) is what it was answered with, for an agent that asks again."""

    name: str
    expires_at: float
    used_at: float | None
    certificate: bytes | None


@dataclass(frozen=True)
class Run:
    """One submitted plan; ``run_id`` is also Flower's."""

    run_id: int
    created_at: float
    status: str
    plan: str
    directory: str
    error: str | None


@dataclass(frozen=True)
class Operator:
    """A remote operator's certificate; one without an entry here counts for nothing."""

    fingerprint: str
    name: str
    added_at: float
    certificate_ends: float
    revoked_at: float | None


_UPGRADES = {
    1: "ALTER TABLE nodes ADD COLUMN ledger_sequence INTEGER; ALTER TABLE nodes ADD COLUMN ledger_head BLOB;"
    " ALTER TABLE nodes ADD COLUMN ledger_signature BLOB",
}
_OPERATOR = "fingerprint, name, added_at, certificate_ends, revoked_at"
_INVITE = "name, expires_at, used_at, certificate"
_NODE = "name, node_id, fingerprint, previous_fingerprint, enrolled_at, revoked_at, last_seen, certificate_ends"
_RUN = "run_id, created_at, status, plan, directory, error"
_OUTSTANDING = "cancelled_at IS NULL AND message_id NOT IN (SELECT message_id FROM replies)"


def random_id() -> int:
    """A random id in 1 … 2^63 - 1: SQLite's and Flower's integers both hold it."""
    return 1 + secrets.randbelow(2**63 - 1)


class Store(Database):
    """Everything the coordinator must still know after a crash.

    Args:
        path: the database file; made if it is not there.

    Raises:
        LichenError: STORE_VERSION if a newer lichen wrote the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, _SCHEMA, VERSION, _UPGRADES)

    def backup(self, target: str | Path) -> None:
        """Copy a consistent snapshot to ``target`` while the store is in use."""
        other = sqlite3.connect(target)
        try:
            with self._lock:
                self._db.backup(other)
        finally:
            other.close()

    # Invites

    def add_invite(self, name: str, secret_sha256: str, expires_at: float) -> None:
        """Keep an invite for ``name``: only the hash of its secret; it expires at ``expires_at`` (Unix seconds)."""
        with self._transaction() as db:
            db.execute("INSERT INTO invites (name, secret_sha256, expires_at) VALUES (?, ?, ?)", (name, secret_sha256, expires_at))

    def invite(self, secret_sha256: str) -> StoredInvite | None:
        """The invite with this secret, used or not; None if there is none."""
        rows = self._rows(f"SELECT {_INVITE} FROM invites WHERE secret_sha256 = ?", secret_sha256)  # noqa: S608
        return StoredInvite(*rows[0]) if rows else None

    def take_invite(self, secret_sha256: str, now: float) -> str:
        """Mark an invite used and return its node name.

        Raises:
            LichenError: INVITE_INVALID, INVITE_USED or INVITE_EXPIRED.
        """
        with self._transaction() as db:
            return _take_invite(db, secret_sha256, now)

    def enrol(self, secret_sha256: str, issue: Callable[[str], tuple[bytes, str]], now: float) -> StoredInvite:
        """Use an invite and enrol its node, in one transaction: a crash leaves both done or neither.

        Args:
            secret_sha256: hash of the invite's secret, hex.
            issue: makes the certificate for the invite's name: its PEM, which is kept as the invite's answer, and its fingerprint.
            now: Unix seconds.

        Raises:
            LichenError: INVITE_INVALID, INVITE_USED or INVITE_EXPIRED; NAME_TAKEN; what ``issue`` raises: the last two leave the
                invite unused.
        """
        with self._transaction() as db:
            name = _take_invite(db, secret_sha256, now)
            certificate, fingerprint = issue(name)
            db.execute("UPDATE invites SET certificate = ? WHERE secret_sha256 = ?", (certificate, secret_sha256))
            _add_node(db, name, fingerprint, now)
            return StoredInvite(*db.execute(f"SELECT {_INVITE} FROM invites WHERE secret_sha256 = ?", (secret_sha256,)).fetchone())  # noqa: S608

    # Nodes

    def add_node(self, name: str, fingerprint: str) -> int:
        """Enrol a node under its certificate's fingerprint (hex SHA-256 of the DER form) and return its random id.

        Raises:
            LichenError: NAME_TAKEN if an active node has the name.
        """
        with self._transaction() as db:
            return _add_node(db, name, fingerprint, time.time())

    def renew_node(self, name: str, fingerprint: str) -> None:
        """Give an active node a new certificate; the old one is good until the new one has been seen.

        Raises:
            LichenError: NODE_UNKNOWN.
        """
        with self._transaction() as db:
            # A second renewal before the first was seen keeps the certificate that the agent surely holds.
            changed = db.execute(
                "UPDATE nodes SET previous_fingerprint = COALESCE(previous_fingerprint, fingerprint), fingerprint = ?"
                " WHERE name = ? AND revoked_at IS NULL",
                (fingerprint, name),
            ).rowcount
            if not changed:
                raise _unknown_node(name)

    def node_by_name(self, name: str) -> Node | None:
        """The active node of that name; else the one revoked last; else None."""
        rows = self._rows(f"SELECT {_NODE} FROM nodes WHERE name = ? ORDER BY revoked_at IS NOT NULL, revoked_at DESC", name)  # noqa: S608
        return Node(*rows[0]) if rows else None

    def note_certificate(self, name: str, ends: float) -> None:
        """Note when the newest certificate of an active node ends (Unix seconds), for the operator's eyes."""
        with self._transaction() as db:
            db.execute("UPDATE nodes SET certificate_ends = ? WHERE name = ? AND revoked_at IS NULL", (ends, name))

    def nodes(self) -> list[Node]:
        """All nodes ever enrolled, by name."""
        return [Node(*row) for row in self._rows(f"SELECT {_NODE} FROM nodes ORDER BY name, enrolled_at")]  # noqa: S608

    def node_by_id(self, node_id: int) -> Node | None:
        """The node with that id, revoked or not."""
        rows = self._rows(f"SELECT {_NODE} FROM nodes WHERE node_id = ?", node_id)  # noqa: S608
        return Node(*rows[0]) if rows else None

    def revoke_node(self, name: str, now: float) -> Node:
        """Revoke the active node of that name for good and return it as it is now.

        Raises:
            LichenError: NODE_UNKNOWN if there is no active one.
        """
        with self._transaction() as db:
            row = db.execute("SELECT node_id FROM nodes WHERE name = ? AND revoked_at IS NULL", (name,)).fetchone()
            if row is None:
                raise _unknown_node(name)
            db.execute("UPDATE nodes SET revoked_at = ? WHERE node_id = ?", (now, row[0]))
            db.execute("UPDATE outbox SET cancelled_at = ? WHERE node_id = ? AND cancelled_at IS NULL", (now, row[0]))
            return Node(*db.execute(f"SELECT {_NODE} FROM nodes WHERE node_id = ?", row).fetchone())  # noqa: S608

    def saw_node(self, node_id: int, fingerprint: str, now: float) -> None:
        """Note that the node was connected at ``now`` with this certificate; a renewed one then replaces the old for good."""
        with self._transaction() as db:
            db.execute("UPDATE nodes SET last_seen = ? WHERE node_id = ?", (now, node_id))
            db.execute("UPDATE nodes SET previous_fingerprint = NULL WHERE node_id = ? AND fingerprint = ?", (node_id, fingerprint))

    def note_ledger(self, node_id: int, sequence: int, head: bytes, signature: bytes) -> None:
        """Keep where a node's ledger stands, unless it is known to have been as far already."""
        with self._transaction() as db:
            db.execute(
                "UPDATE nodes SET ledger_sequence = ?, ledger_head = ?, ledger_signature = ?"
                " WHERE node_id = ? AND (ledger_sequence IS NULL OR ledger_sequence < ?)",
                (sequence, head, signature, node_id, sequence),
            )

    def ledger_of(self, node_id: int) -> tuple[int, bytes, bytes] | None:
        """Sequence, salted head and signature that a node has sent last; None if it has sent none."""
        query = "SELECT ledger_sequence, ledger_head, ledger_signature FROM nodes WHERE node_id = ? AND ledger_sequence IS NOT NULL"
        rows = self._rows(query, node_id)
        return (int(rows[0][0]), bytes(rows[0][1]), bytes(rows[0][2])) if rows else None

    # Operators

    def add_operator(self, name: str, fingerprint: str, ends: float, now: float) -> None:
        """Keep a remote operator's certificate, by its fingerprint (hex SHA-256 of the DER form) and end (Unix seconds)."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO operators (fingerprint, name, added_at, certificate_ends) VALUES (?, ?, ?, ?)", (fingerprint, name, now, ends)
            )

    def operator(self, fingerprint: str) -> Operator | None:
        """The operator with this certificate, revoked or not."""
        rows = self._rows(f"SELECT {_OPERATOR} FROM operators WHERE fingerprint = ?", fingerprint)  # noqa: S608
        return Operator(*rows[0]) if rows else None

    def operators(self) -> list[Operator]:
        """All operators' certificates, by name."""
        return [Operator(*row) for row in self._rows(f"SELECT {_OPERATOR} FROM operators ORDER BY name, added_at")]  # noqa: S608

    def revoke_operator(self, name: str, now: float) -> int:
        """Revoke all certificates of an operator; returns how many there were."""
        with self._transaction() as db:
            return db.execute("UPDATE operators SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL", (now, name)).rowcount

    # Runs and rounds

    def add_run(self, run_id: int, plan_json: str, directory: str) -> None:
        """Keep a submitted plan, with status ``queued``."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO runs (run_id, created_at, status, plan, directory) VALUES (?, ?, 'queued', ?, ?)",
                (run_id, time.time(), plan_json, directory),
            )

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [Run(*row) for row in self._rows(f"SELECT {_RUN} FROM runs ORDER BY created_at, rowid")]  # noqa: S608

    def run(self, run_id: int) -> Run:
        """One run.

        Raises:
            LichenError: RUN_UNKNOWN.
        """
        rows = self._rows(f"SELECT {_RUN} FROM runs WHERE run_id = ?", run_id)  # noqa: S608
        if not rows:
            raise LichenError(Code.RUN_UNKNOWN, f"there is no run {run_id}", fix="`lichen coordinator runs` lists them.")
        return Run(*rows[0])

    def set_run_status(self, run_id: int, status: str, error: str | None = None) -> None:
        """Set a run's status, and the error that ended it if one did.

        Raises:
            LichenError: RUN_UNKNOWN.
        """
        with self._transaction() as db:
            if not db.execute("UPDATE runs SET status = ?, error = ? WHERE run_id = ?", (status, error, run_id)).rowcount:
                raise LichenError(Code.RUN_UNKNOWN, f"there is no run {run_id}", fix="`lichen coordinator runs` lists them.")

    def save_round(self, run_id: int, round: int, state: dict[str, Any]) -> None:
        """Keep a round's state (cohort, assignments …), a JSON object; replaces the one before."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO rounds (run_id, round, state) VALUES (?, ?, ?)", (run_id, round, json.dumps(state)))

    def load_round(self, run_id: int, round: int) -> dict[str, Any] | None:
        """A round's state as it was saved last, or None."""
        rows = self._rows("SELECT state FROM rounds WHERE run_id = ? AND round = ?", run_id, round)
        return dict(json.loads(rows[0][0])) if rows else None

    # Outbox and replies

    def put_outbox(self, messages: Iterable[tuple[str, int, int, bytes]]) -> None:
        """Keep messages ``(message_id, run_id, node_id, bytes)`` in one transaction.

        An id that is there already keeps its first bytes; one that was withdrawn is wanted again.
        """
        now = time.time()
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO outbox (message_id, run_id, node_id, bytes, created_at) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (message_id) DO UPDATE SET cancelled_at = NULL WHERE released_at IS NULL",
                [(*message, now) for message in messages],
            )

    def outstanding(self, node_id: int) -> list[str]:
        """The ids of the messages to which a node still owes a reply, oldest first."""
        query = f"SELECT message_id FROM outbox WHERE node_id = ? AND {_OUTSTANDING} ORDER BY rowid"  # noqa: S608
        return [str(row[0]) for row in self._rows(query, node_id)]

    def message(self, message_id: str) -> bytes | None:
        """A message that still wants its reply; None if it does not."""
        rows = self._rows(f"SELECT bytes FROM outbox WHERE message_id = ? AND {_OUTSTANDING}", message_id)  # noqa: S608
        return bytes(rows[0][0]) if rows else None

    def awaits(self, message_id: str, node_id: int) -> tuple[int, bool] | None:
        """The run of a message to this node and whether its reply is still wanted; None if the node was never sent such a message."""
        query = f"SELECT run_id, {_OUTSTANDING} FROM outbox WHERE message_id = ? AND node_id = ?"  # noqa: S608
        rows = self._rows(query, message_id, node_id)
        return (int(rows[0][0]), bool(rows[0][1])) if rows else None

    def ack(self, message_id: str, node_id: int) -> None:
        """Note that the node has stored the message durably."""
        with self._transaction() as db:
            db.execute(
                "UPDATE outbox SET acked_at = ? WHERE message_id = ? AND node_id = ? AND acked_at IS NULL",
                (time.time(), message_id, node_id),
            )

    def cancel(self, message_ids: Iterable[str], now: float) -> list[tuple[str, int]]:
        """Withdraw messages whose reply nobody waits for; returns ``(message_id, node_id)`` of those still owed one."""
        query = f"UPDATE outbox SET cancelled_at = ? WHERE message_id = ? AND {_OUTSTANDING} RETURNING message_id, node_id"  # noqa: S608
        with self._transaction() as db:
            rows = [row for message_id in message_ids for row in db.execute(query, (now, message_id)).fetchall()]
        return [(str(message_id), int(node_id)) for message_id, node_id in rows]

    def release(self, message_ids: Iterable[str], now: float) -> None:
        """Let go of messages and replies that were used (after the checkpoint): their bytes are erased, their ids stay known."""
        with self._transaction() as db:
            for message_id in message_ids:
                db.execute(
                    "UPDATE outbox SET released_at = ?, cancelled_at = COALESCE(cancelled_at, ?), bytes = x'' WHERE message_id = ?",
                    (now, now, message_id),
                )
                db.execute("DELETE FROM replies WHERE message_id = ?", (message_id,))

    def save_replies(self, replies: Iterable[tuple[str, int, bytes]]) -> list[bool]:
        """Keep replies ``(message_id, node_id, bytes)`` in one transaction.

        Returns:
            For each whether it was kept: not if there was one already (the first stays), or its message was withdrawn.
        """
        query = (
            "INSERT OR IGNORE INTO replies (message_id, node_id, bytes, received_at)"
            " SELECT message_id, node_id, ?, ? FROM outbox WHERE message_id = ? AND node_id = ? AND cancelled_at IS NULL"
        )
        now = time.time()
        with self._transaction() as db:
            return [bool(db.execute(query, (data, now, message_id, node_id)).rowcount) for message_id, node_id, data in replies]

    def reply(self, message_id: str) -> bytes | None:
        """The stored reply to a message, or None."""
        rows = self._rows("SELECT bytes FROM replies WHERE message_id = ?", message_id)
        return bytes(rows[0][0]) if rows else None

    def used(self, message_id: str) -> bool:
        """Whether a message's reply was let go of after use; False for one that was withdrawn before."""
        query = "SELECT 1 FROM outbox WHERE message_id = ? AND released_at IS NOT NULL AND cancelled_at = released_at"
        return bool(self._rows(query, message_id))

    def unreleased(self, run_id: int) -> list[tuple[str, bytes]]:
        """A run's messages ``(message_id, bytes)`` that were not let go of."""
        rows = self._rows("SELECT message_id, bytes FROM outbox WHERE run_id = ? AND released_at IS NULL", run_id)
        return [(str(message_id), bytes(data)) for message_id, data in rows]

    def live_messages(self) -> Iterator[bytes]:
        """Every message and reply that was not released or withdrawn: what the spool's payloads are kept for."""
        for (data,) in self._rows("SELECT bytes FROM outbox WHERE cancelled_at IS NULL UNION ALL SELECT bytes FROM replies"):
            yield bytes(data)


def _take_invite(db: sqlite3.Connection, secret_sha256: str, now: float) -> str:
    row = db.execute("SELECT name, expires_at, used_at FROM invites WHERE secret_sha256 = ?", (secret_sha256,)).fetchone()
    if row is None:
        raise LichenError(Code.INVITE_INVALID, "this coordinator has no such invite", fix="Ask its operator for an invite.")
    name, expires_at, used_at = row
    if used_at is not None:
        raise LichenError(Code.INVITE_USED, f"the invite for {name!r} was used already", fix="Ask the operator for a new invite.")
    if now >= expires_at:
        raise LichenError(Code.INVITE_EXPIRED, f"the invite for {name!r} has expired", fix="Ask the operator for a new invite.")
    db.execute("UPDATE invites SET used_at = ? WHERE secret_sha256 = ?", (now, secret_sha256))
    return str(name)


def _add_node(db: sqlite3.Connection, name: str, fingerprint: str, now: float) -> int:
    if db.execute("SELECT 1 FROM nodes WHERE name = ? AND revoked_at IS NULL", (name,)).fetchone():
        raise LichenError(
            Code.NAME_TAKEN, f"a node named {name!r} is enrolled already", fix="Choose another name, or revoke the old node first."
        )
    node_id = random_id()
    db.execute("INSERT INTO nodes (name, node_id, fingerprint, enrolled_at) VALUES (?, ?, ?, ?)", (name, node_id, fingerprint, now))
    # a node that joins again must not have its ledger's past forgotten: a machine restored from an old image has to do just that
    db.execute(
        "UPDATE nodes SET (ledger_sequence, ledger_head, ledger_signature) = (SELECT ledger_sequence, ledger_head, ledger_signature"
        " FROM nodes WHERE name = ? AND ledger_sequence IS NOT NULL ORDER BY ledger_sequence DESC LIMIT 1) WHERE node_id = ?",
        (name, node_id),
    )
    return node_id


def _unknown_node(name: str) -> LichenError:
    return LichenError(Code.NODE_UNKNOWN, f"there is no active node named {name!r}", fix="`lichen coordinator nodes` lists them.")
