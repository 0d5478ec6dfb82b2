"""The ledger's log: what happened, one entry after the other, each bound to all before it by a hash.

An entry's hash is the SHA-256 of the hash before it, its sequence number and its body (JSON with sorted keys), so that no entry can be
changed, left out or put in without changing every hash after it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCHEMA = "CREATE TABLE log (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, hash BLOB NOT NULL) STRICT"
START = bytes(32)
"""The hash before the first entry."""


class BrokenChainError(Exception):
    """An entry does not follow from those before it."""


@dataclass(frozen=True)
class Logged:
    """One entry.

    Attributes:
        sequence: its number, from 1.
        body: what it says; ``kind`` tells of what kind it is.
        hash: that of the chain up to and with it, 32 bytes.
    """

    sequence: int
    body: dict[str, Any]
    hash: bytes


def read(db: sqlite3.Connection, after: int, head: bytes) -> Iterator[Logged]:
    """The entries after one that was read already, each checked against the chain.

    Args:
        db: the ledger's connection.
        after: the sequence number of the last entry read; 0 for none.
        head: that entry's hash; `START` for none.

    Raises:
        BrokenChainError: where the chain does not hold, also if the entry ``after`` is no longer what it was.
    """
    if after and db.execute("SELECT 1 FROM log WHERE sequence = ? AND hash = ?", (after, head)).fetchone() is None:
        raise BrokenChainError(f"entry {after} is gone, or is another one")
    for sequence, text, found in db.execute("SELECT sequence, body, hash FROM log WHERE sequence > ? ORDER BY sequence", (after,)):
        try:
            body = json.loads(text)
        except ValueError:
            raise BrokenChainError(f"entry {sequence} can't be read") from None
        if sequence != after + 1 or chained(head, sequence, text) != found:
            raise BrokenChainError(f"entry {sequence} does not follow from entry {after}")
        after, head = sequence, found
        yield Logged(sequence, body, found)


def append(db: sqlite3.Connection, after: int, head: bytes, body: dict[str, Any]) -> Logged:
    """Write one entry behind the last, within the caller's transaction.

    Args:
        db: the ledger's connection.
        after: the last entry's sequence number.
        head: its hash.
        body: what to write; JSON with a ``kind``.
    """
    number, text = after + 1, json.dumps(body, sort_keys=True, separators=(",", ":"))
    found = chained(head, number, text)
    db.execute("INSERT INTO log (sequence, body, hash) VALUES (?, ?, ?)", (number, text, found))
    return Logged(number, body, found)


def chained(head: bytes, sequence: int, text: str) -> bytes:
    """The hash of an entry after ``head``."""
    return hashlib.sha256(head + sequence.to_bytes(8, "big") + text.encode()).digest()
