"""Which of a node's rows are new, and which batch of an online run each was read in.

A row is known by a keyed fingerprint of what it says, so that a file which is renamed, or exported again in another order or format, is
not new. No row and no text is kept, and nothing of this leaves the node but what `new_rows` counts: sizes that the owner declares.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lichen.client.data import Piece, fingerprints, pieces, read_manifest
from lichen.common.continual.stream import fields_read
from lichen.common.database import Database
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.schedule import too_large

if TYPE_CHECKING:
    from lichen.client.data import Split
    from lichen.client.readers import Row
    from lichen.common.plan import Plan

FILE = "arrivals.sqlite"
FORMAT = 1
_AT_ONCE = 500  # fingerprints looked up: SQLite takes 999 parameters and more
_PASSED = -1
"""In place of a batch's number: of no batch."""
_SCHEMA = """
CREATE TABLE about (key BLOB NOT NULL) STRICT;
CREATE TABLE reads (
    fingerprint INTEGER NOT NULL, run TEXT NOT NULL, batch INTEGER NOT NULL, PRIMARY KEY (fingerprint, run)
) STRICT, WITHOUT ROWID;
CREATE INDEX reads_of_batch ON reads (run, batch);
CREATE TABLE batches (
    run TEXT NOT NULL, number INTEGER NOT NULL, declared INTEGER NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, number)
) STRICT
"""


@dataclass(frozen=True)
class Batches:
    """Of which batch of an online run a node's rows are."""

    key: bytes
    """Of the rows' fingerprints."""
    declared_size: int | None
    """The size of the data that the last batch came in, as declared; None where none is needed or, in a simulation, declared."""
    rows: frozenset[tuple[int, int]] = frozenset()
    """Fingerprints, each with the number of its batch (from 0)."""
    passed: frozenset[int] = frozenset()
    """Fingerprints of rows that the last batch leaves out; see `New`."""
    dealt: int | None = None
    """In place of them, in a simulation, to which no files come: so many batches, to which all rows are dealt."""

    def of(self, fingerprints: Sequence[int]) -> list[int | None]:
        """The number of each row's batch; None for a row that is of none of them."""
        if self.dealt is not None:
            return [one % self.dealt for one in fingerprints]
        known = dict(self.rows)
        return [known.get(one) for one in fingerprints]


Settled = dict[str, tuple[object, dict[str, Any]]]
"""By path the state of a piece, and the types of its fields."""


class New(NamedTuple):
    """What no run has read yet."""

    declared_size: int
    """Of the pieces of data that hold any rows of it to train on, together."""
    rows: list[int]
    """Fingerprints, those of held-out rows in these pieces too."""
    passed: list[int]
    """Of rows that the task can't use. They were new once, and come, when they are mended, with the next batch."""


class Arrivals(Database):
    """What was read by which run (SQLite), in the node's home; several processes may use it at once.

    Args:
        home: the node's.

    Raises:
        LichenError: STORE_VERSION, if a newer lichen wrote the file; OUTPUT_UNUSABLE, from every method too, if it can't be used.
    """

    def __init__(self, home: Path) -> None:
        self._file = home / FILE
        with _usable(self._file):
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it as open as the umask allows
            super().__init__(self._file, _SCHEMA, FORMAT)
            with self._transaction(durable=False) as db:
                db.execute("INSERT INTO about (key) SELECT ? WHERE NOT EXISTS (SELECT 1 FROM about)", (secrets.token_bytes(32),))
                self.key = bytes(db.execute("SELECT key FROM about").fetchone()[0])

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unread(self, run: str, rows: Sequence[int], *, again: bool) -> list[int]:
        """Those of some fingerprints that this run has not read; unless ``again``, that no run has."""
        read: set[int] = set()
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            query = f"SELECT fingerprint FROM reads WHERE fingerprint IN ({marks})"  # noqa: S608 - question marks
            found = self._rows(f"{query} AND run = ?", *part, run) if again else self._rows(f"{query} AND batch > {_PASSED}", *part)
            read.update(one for (one,) in found)
        return [one for one in rows if one not in read]

    def passed(self, run: str) -> set[int]:
        """The fingerprints of rows that were told to be new for a run, but were of no use to it."""
        return {one for (one,) in self._rows("SELECT fingerprint FROM reads WHERE run = ?", _passed(run))}

    def note(self, run: str, rows: Iterable[int], batch: int = 0) -> None:
        """Keep that a run has read rows; of those that it had read before nothing changes."""
        with _usable(self._file), self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO reads (fingerprint, run, batch) VALUES (?, ?, ?)", ((one, run, batch) for one in rows))

    def begin(self, run: str, number: int, new: New) -> None:
        """Let a batch (its number, from 0) be of these rows, on the disk when this returns; one that has begun stays what it is."""
        with _usable(self._file), self._transaction() as db:
            values = (run, number, new.declared_size, time.time())
            if db.execute("INSERT OR IGNORE INTO batches (run, number, declared, at) VALUES (?, ?, ?, ?)", values).rowcount:
                rows = [(one, run, number) for one in new.rows] + [(one, _passed(run), _PASSED) for one in new.passed]
                db.executemany("INSERT OR IGNORE INTO reads (fingerprint, run, batch) VALUES (?, ?, ?)", rows)

    def batch(self, run: str, number: int) -> Batches | None:
        """A batch that has begun, alone; None for another."""
        if not (found := self._rows("SELECT declared FROM batches WHERE run = ? AND number = ?", run, number)):
            return None
        rows = self._rows("SELECT fingerprint, batch FROM reads WHERE run = ? AND batch = ?", run, number)
        return Batches(self.key, int(found[0][0]), frozenset(rows))

    def until(self, run: str, number: int) -> frozenset[tuple[int, int]]:
        """The fingerprints of all batches until one, each with the number of its batch."""
        return frozenset(self._rows("SELECT fingerprint, batch FROM reads WHERE run = ? AND batch <= ?", run, number))

    def history(self) -> list[dict[str, Any]]:
        """How much each run has read, an online one in each batch, for the owner's eyes.

        Returns:
            By time `run`, `batch` (from 0), `begun` (Unix time; both None for a run that is not online) and `rows`, held-out ones included
            where they came with a batch.
        """
        query = (
            "SELECT reads.run, batch, at, count(*) FROM reads LEFT JOIN batches ON batches.run = reads.run AND number = batch"
            " WHERE batch > ? GROUP BY reads.run, batch ORDER BY at, reads.run"
        )
        found = self._rows(query, _PASSED)
        return [{"run": run, "batch": None if at is None else batch, "begun": at, "rows": rows} for run, batch, at, rows in found]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with _usable(self._file):
            return super()._rows(query, *values)


@contextmanager
def _usable(file: Path) -> Iterator[None]:
    """What stands in the way of SQLite, as an error that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LichenError(
            Code.OUTPUT_UNUSABLE,
            f"which rows were read can't be kept or looked up: {error}",
            where=str(file),
            fix="Look for a full disk or a missing permission; if it is damaged, move it away: then all rows are new to online runs.",
        ) from None


def _passed(run: str) -> str:
    return f"passed over by {run}"


def says(plan: Plan, columns: Mapping[str, Sequence[object]]) -> list[Sequence[object]]:
    """The columns by which rows are known: what the task reads but for the label, since a row with another label is the same row."""
    return [columns[plan.task.text_field]]


def new_rows(
    home: Path,
    plan: Plan,
    run: str,
    arrivals: Arrivals,
    settled: Settled | None = None,
    *,
    among: Set[object] | None = None,
    at_once: bool = False,
) -> New:
    """What an online run may read as new here. A row that its task can't use is an error; under privacy it is new, and passed over.

    Args:
        home: the node's.
        plan: the run's.
        run: its name.
        arrivals: the home's.
        settled: pieces without anything new, which are passed over while they stay as they are; added to.
        among: the states of the pieces that count; None: all.
        at_once: whether only what one batch may read: under privacy the oldest pieces, as many as δ permits; the others come with the next.

    Raises:
        LichenError: DATA_DECLARED_SIZE, if a piece that has new rows has no declared size, or PLAN_UNSOUND, if δ is above one in it; as
            `lichen.client.data.load`; DATA_LABEL.
    """
    size, new, passed, types = 0, list[int](), set[int](), _Types(plan)
    before = arrivals.passed(run) if plan.private else set[int]()
    check_split(home, plan, "train")
    for piece in sorted(pieces(home), key=Piece.changed):
        state = piece.state()
        if among is not None and state not in among:
            continue
        if settled is not None and (known_as := settled.get(piece.source.path)) is not None and known_as[0] == state:
            types.check(piece, known_as[1])
            continue
        rows, of_fields = piece.read(fields_read(plan), lenient=plan.private)
        types.check(piece, of_fields)
        found = list(_with_faults(piece, rows, plan))
        known = fingerprints(arrivals.key, "row", says(plan, {plan.task.text_field: [row[plan.task.text_field] for _, row, _ in found]}))
        sides = {one: side for one, (side, _, _) in zip(known, found, strict=True)}
        usable = {one for one, (_, _, fault) in zip(known, found, strict=True) if fault is None}
        own = arrivals.unread(run, list(sides), again=plan.continual.online.read_again)
        if all(sides[one] == "holdout" for one in own if one not in before):
            new += [one for one in own if one in before and one in usable]  # mended
            if settled is not None:
                settled[piece.source.path] = state, of_fields
            continue
        if piece.source.declared_size is None:
            raise LichenError(
                Code.DATA_DECLARED_SIZE,
                "no declared size, and the true one is not told",
                where=piece.source.path,
                fix="Add the source again with --declared-size N; of a watched folder it is each file's.",
            )
        if plan.private and too_large(plan, piece.source.declared_size):
            raise LichenError(
                Code.PLAN_UNSOUND,
                f"δ = {plan.privacy.delta:g} of this plan is above one in the declared size, {piece.source.declared_size}",
                where=piece.source.path,
                fix="Make smaller files, and declare a smaller size; or ask the operator for a smaller delta.",
            )
        if at_once and plan.private and too_large(plan, size + piece.source.declared_size):
            break
        size += piece.source.declared_size
        new += [one for one in own if one in usable]
        passed.update(one for one in own if one not in usable)
    return New(size, new, list(passed))


def check_split(home: Path, plan: Plan, split: Split) -> None:
    """Refuse a number of held-out rows where only a share is private.

    Raises:
        LichenError: DATA_FIELD; as `lichen.client.data.read_manifest`.
    """
    alone = plan.private and (plan.privacy.unit_field or split == "holdout")
    if alone and any(source.holdout >= 1 for source in read_manifest(home).sources):
        raise LichenError(
            Code.DATA_FIELD,
            "a number of held-out rows: one row more pushes another, of another entity, to training",
            where=str(home / "data.yaml"),
            fix="Add the source again with a share below 1 as --holdout.",
        )


class _Types:
    """The types of the fields of all pieces, which `lichen.client.data.load` wants alike, of what the plan does not read by source."""

    def __init__(self, plan: Plan) -> None:
        self._read = fields_read(plan)
        self._first: dict[tuple[str | None, str], tuple[Any, Piece]] = {}

    def check(self, piece: Piece, types: Mapping[str, Any]) -> None:
        for field, own in types.items():
            first, other = self._first.setdefault((None if field in self._read else piece.of, field), (own, piece))
            if own != first:
                what = f"{field!r} holds {own}, and {first} in {other.source.path}"
                raise LichenError(Code.DATA_FIELD, what, where=piece.source.path, fix="Export both alike.")


def _with_faults(piece: Piece, rows: Iterable[tuple[Split, Row]], plan: Plan) -> Iterator[tuple[Split, Row, str | None]]:
    """A piece's rows with their sides, and why the task can't use one.

    Under privacy those count too: the coordinator chooses the labels, and is told without noise whether anything is new.
    """
    for side, row in rows:
        fault = plan.task.fault(row)
        if fault is not None and not plan.private:
            raise LichenError(Code.DATA_LABEL, fault, where=piece.source.path, fix="Mend the row, or take it out.")
        yield side, row, fault


def take(home: Path, plan: Plan, run: str, number: int) -> Batches:
    """A batch (its number, from 0): as it has begun, or of the rows that are new, which it does not begin with (`begin`).

    Raises:
        LichenError: DATA_EMPTY, if nothing is new; as `new_rows`.
    """
    with Arrivals(home) as arrivals:
        if (found := arrivals.batch(run, number)) is not None:
            return found
        new = new_rows(home, plan, run, arrivals, at_once=True)
        if not new.declared_size:
            raise LichenError(Code.DATA_EMPTY, "no new rows since the last batch", where=str(home / "data.yaml"))
        return Batches(arrivals.key, new.declared_size, frozenset((one, number) for one in new.rows), frozenset(new.passed))


def begin(home: Path, run: str, number: int, batches: Batches) -> None:
    """Let a batch be of these rows from now on, just before they are trained on: what fails before that loses nothing."""
    with Arrivals(home) as arrivals:
        rows = [one for one, batch in batches.rows if batch == number]
        arrivals.begin(run, number, New(batches.declared_size or 0, rows, list(batches.passed)))


def until(home: Path, plan: Plan, run: str, number: int, *, new: bool) -> Batches:
    """All batches until one (its number, from 0); if that has not begun, and ``new``, it is of the rows that are new, and stays not begun.

    Raises:
        LichenError: as `new_rows`.
    """
    with Arrivals(home) as arrivals:
        rows = arrivals.until(run, number)
        if new and arrivals.batch(run, number) is None:
            rows |= {(one, number) for one in new_rows(home, plan, run, arrivals, at_once=True).rows}
        return Batches(arrivals.key, None, rows)


def dealt(declared_size: int | None, count: int) -> Batches:
    """The batches of a simulated node, so many, to which all its rows are dealt."""
    return Batches(b"", None if declared_size is None else max(1, declared_size // count), dealt=count)
