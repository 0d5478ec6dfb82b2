"""What this node's records have paid in privacy: every reservation of steps, on disk before the first of them is taken.

A *record* is a row (or, under `unit: entity`, an entity), known by a keyed fingerprint of its content wherever it lies. For life it
belongs to the *data segment* in which it was first read: what was new then. A reservation charges every segment that it reads, so a
record's ε is that of its segment's history. All is in one log (client/ledger_log.py), but for the fingerprints themselves.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lichen.client import ledger_log
from lichen.client.ledger_book import Book, DataSegment, Entry, Grant, Limit, Limits, Spent, Split, bound
from lichen.common.database import Database
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, affordable_steps, epsilon, least_noise
from lichen.common.privacy.schedule import MOST_NOISE

FORMAT = 2
FILE = "ledger.sqlite"
FOLDER = "LICHEN_LEDGER"
"""The environment's word for the ledger's folder; a relative one starts at the node's home, so that `.` keeps it there."""
_SOUND = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)  # SQLite's primary codes for what is wrong around a file; text that is not UTF-8 has none, and is damage
_AT_ONCE = 500  # fingerprints looked up: SQLite takes 999 parameters and more


_SCHEMA = f"""
CREATE TABLE about (key BLOB NOT NULL) STRICT;
CREATE TABLE records (fingerprint INTEGER PRIMARY KEY, segment INTEGER NOT NULL) STRICT;
{ledger_log.SCHEMA}
"""


class Ledger(Database):
    """The privacy ledger (SQLite, write-ahead log, full synchronisation); several processes may use it at once.

    Args:
        folder: where it lies; see `open_ledger`.

    Raises:
        LichenError: PRIVACY_HISTORY, if the file is damaged or from a newer lichen; LEDGER_BROKEN, if its chain of hashes does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self._book = Book()
        self.path = folder / FILE
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it as open as the umask allows
            super().__init__(self.path, _SCHEMA, FORMAT)
        except (sqlite3.DatabaseError, OSError) as error:
            raise _unusable(self.path, error) from None
        except LichenError as error:
            raise _unusable(self.path, error) if error.code is Code.STORE_VERSION else error from None
        with self._transaction() as db:
            if not self._book.sequence:
                self._begin(db)
            row = db.execute("SELECT key FROM about").fetchone()
        if row is None:
            raise _unusable(self.path, "the key of its fingerprints is gone")
        self.fingerprint_key = bytes(row[0])

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """What no other ledger is called: the hash of its first entry."""
        return self._book.first.hex()

    def chosen(self) -> bool:
        """Whether any reservation was of a plan that says which records it reads (see `reserve`)."""
        self._refresh()
        return self._book.chosen

    @property
    def split_at(self) -> int:
        """The log's number of the last split, as this object's last transaction saw it; see `reserve`."""
        return self._book.split_at

    # --- records ---

    def assign(self, split: Split, fingerprints: Sequence[int], *, apart: bool = False) -> list[int]:
        """The data segment of each record that was read; those that are new make up a segment, on disk when this returns.

        Args:
            split: as which they were read.
            fingerprints: 64-bit ones, under `fingerprint_key`; equal ones are one record.
            apart: let no segment hold both these and others: where one does, these become a segment of its own, with the same history.
                For a stream of tasks, of which each reads a part of what an earlier run may have read whole.

        Raises:
            LichenError: LEDGER_BROKEN, if there are not as many fingerprints as the log says.
        """
        distinct = sorted(set(fingerprints))
        with self._transaction() as db:
            counted = dict(db.execute("SELECT segment, count(*) FROM records GROUP BY segment").fetchall())
            if counted != {number: segment.records for number, segment in self._book.segments.items() if segment.records}:
                raise _broken(self.path, "fingerprints are missing, or too many")
            known: dict[int, int] = {}
            for start in range(0, len(distinct), _AT_ONCE):
                part = distinct[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                known.update(db.execute(f"SELECT fingerprint, segment FROM records WHERE fingerprint IN ({marks})", part))  # noqa: S608
            if new := [one for one in distinct if one not in known]:
                number = 1 + len(self._book.segments)
                db.executemany("INSERT INTO records (fingerprint, segment) VALUES (?, ?)", ((one, number) for one in new))
                known.update(dict.fromkeys(new, number))
                body = {"segment": number, "split": split, "records": len(new), "digest": _digest(new)}
                self._append(db, {"kind": "segment", **body, "at": time.time()})
            if apart:
                known |= self._split_off(db, known)
        return [known[one] for one in fingerprints]

    def _split_off(self, db: sqlite3.Connection, known: Mapping[int, int]) -> dict[int, int]:
        """Give those of each segment that holds others too a segment of their own; returns what has changed."""
        by_segment: dict[int, list[int]] = {}
        for one, number in known.items():
            by_segment.setdefault(number, []).append(one)
        changed: dict[int, int] = {}
        for old, found in sorted(by_segment.items()):
            if len(found) == self._book.segments[old].records:
                continue
            number, own = 1 + len(self._book.segments), sorted(found)
            db.executemany("UPDATE records SET segment = ? WHERE fingerprint = ?", ((number, one) for one in own))
            rest = [one for (one,) in db.execute("SELECT fingerprint FROM records WHERE segment = ? ORDER BY fingerprint", (old,))]
            body = {"segment": number, "of": old, "records": len(own), "digest": _digest(own), "rest": _digest(rest)}
            self._append(db, {"kind": "split", **body, "at": time.time()})
            changed |= dict.fromkeys(own, number)
        return changed

    def paid(self, run: str, split: Split, message_id: str, as_of: int) -> frozenset[int]:
        """The data segments that a message of a run has paid for, but for those that nobody may read any more; ``as_of`` as in `reserve`.

        Raises:
            LichenError: LEDGER_MOVED.
        """
        self._refresh()
        self._check_unmoved(as_of)
        own = (entry.charged for entry in self._book.history(run=run) if (entry.split, entry.message_id) == (split, message_id))
        return frozenset(number for number in frozenset[int]().union(*own) if not self._book.segments[number].written_off)

    def read_outside(self, run: str, split: Split, first: int, last: int) -> frozenset[int]:
        """The data segments that a run has read in other rounds than these, earlier or later: the order in which it asks is its own."""
        self._refresh()
        own = (entry.charged for entry in self._book.history(run=run) if entry.split == split and not first <= entry.round <= last)
        return frozenset[int]().union(*own)

    # --- reservations ---

    def reserve(
        self,
        split: Split,
        run: str,
        message_id: str,
        round: int,
        planned: Segment,
        limits: Limits,
        reads: AbstractSet[int],
        *,
        as_of: int,
        ahead: int = 0,
        whole: bool = False,
        chosen: bool = False,
    ) -> Grant:
        """Charge the steps of one message to every data segment that it reads, before any step is taken.

        A message that comes again after a crash uses the reservation it has, as long as nothing of it was released; afterwards it
        pays again, and so does one that asks for other steps under the same id. Segments with nothing left may not be read: the
        others go on without their records. Where the bound for life asks for more noise than the plan, that much is granted.

        Args:
            split: as which the rows are read.
            run: the run's name.
            message_id: of the message that asks for the steps.
            round: of the run.
            planned: the steps it asks for.
            limits: what must hold afterwards.
            reads: the data segments of the records that are there.
            as_of: `split_at` when these were looked up. A record that has moved to another segment since would be read for nothing.
            ahead: steps that the run plans after these, for which there should be budget too.
            whole: all steps with the noise that was planned, or none.
            chosen: whether the plan says which records are read.

        Raises:
            LichenError: PRIVACY_BUDGET, if nothing that was read has enough left, or if other steps on it protected another unit;
                LEDGER_MOVED, if records have moved since; INTERNAL for no steps, or fewer than none ahead.
        """
        if planned.steps < 1 or ahead < 0:
            raise LichenError(Code.INTERNAL, f"{planned.steps} steps to reserve, {ahead} ahead")
        with self._transaction() as db:
            if reads:
                self._check_unmoved(as_of)
            for entry in reversed(self._book.history(run=run)):
                same = (entry.split, entry.message_id, entry.unit, entry.planned_noise, entry.segment.sample_rate)
                if same == (split, message_id, limits.unit, *planned[:2]):
                    readable = frozenset(number for number in entry.charged & reads if not self._book.segments[number].written_off)
                    if (entry.released_at is None or limits.repeats) and (readable or not reads):
                        return Grant(entry.segment._replace(steps=min(entry.segment.steps, planned.steps)), readable)
                    break
            grants = {number: self._affordable(number, run, planned, limits, ahead, whole=whole) for number in reads}
            usable = {number: granted for number, granted in grants.items() if granted and (granted == planned or not whole)}
            if reads and not usable:
                raise _spent(self.path, limits)
            segment, readable = self._together(usable, run, planned, limits)
            if reads and not readable:
                raise _spent(self.path, limits)
            self._reserve(db, split, run, message_id, round, segment, planned.noise_multiplier, limits.unit, readable, time.time(), chosen)
            return Grant(segment, readable)

    def _check_unmoved(self, as_of: int) -> None:
        if self._book.split_at > as_of:
            raise LichenError(
                Code.LEDGER_MOVED,
                "another process of this user has moved records to another data segment meanwhile",
                where=str(self.path),
                fix="Nothing was read. The coordinator may ask again.",
            )

    def _together(self, usable: Mapping[int, Segment], run: str, planned: Segment, limits: Limits) -> tuple[Segment, frozenset[int]]:
        """One kind of steps for all data segments, the most noise and the fewest that any needs, and the segments that can pay those.

        What fits one with its own noise may not fit with another's: it makes a history of two kinds, which another bound holds.
        """
        left = dict(usable)
        while True:
            noise = max((granted.noise_multiplier for granted in left.values()), default=planned.noise_multiplier)
            steps = min((granted.steps for granted in left.values()), default=planned.steps)
            segment = Segment(noise, planned.sample_rate, steps)
            # what was granted fits; what others need too may not
            if fitting := {
                number: granted for number, granted in left.items() if granted == segment or self._fits(number, run, segment, limits.life)
            }:
                if len(fitting) == len(left):
                    return segment, frozenset(left)
                left = fitting
            else:
                return segment, frozenset()

    def _fits(self, number: int, run: str, segment: Segment, life: Limit | None) -> bool:
        return life is None or bound(self._book.history(number), life, (run, segment)).epsilon <= life.epsilon

    def _affordable(self, number: int, run: str, planned: Segment, limits: Limits, ahead: int, *, whole: bool) -> Segment | None:
        """What one data segment can still pay of ``planned``: with the least noise that does, or fewer steps; None for nothing."""
        if self._book.segments[number].written_off:
            return None
        history = self._book.history(number)
        own = [entry.segment for entry in history if entry.run == run]
        steps = _steps_within(own, planned, ahead, limits.run)
        if steps == 0 or limits.life is None:
            return planned._replace(steps=steps) if steps else None
        self._same_unit(history, limits.unit)
        life, rest = limits.life, steps + (ahead if steps == planned.steps else 0)

        def fits(noise: float) -> bool:
            return self._fits(number, run, Segment(noise, planned.sample_rate, rest), life)

        # a run keeps the noise that it was given, unless more was spent meanwhile than was foreseen
        least = max([planned.noise_multiplier, *(segment.noise_multiplier for segment in own if not whole)])
        if fits(least):
            return Segment(least, planned.sample_rate, steps)
        if (noise := least_noise(fits, least, MOST_NOISE * planned.noise_multiplier)) is not None:
            return Segment(noise, planned.sample_rate, steps)
        return None

    def released(self, split: Split, run: str, message_id: str, *, again: bool = False) -> None:
        """Note that the result of a reservation may leave from now on: once, whoever else took the same message for its own.

        Args:
            split: as in `reserve`.
            run: as in `reserve`.
            message_id: as in `reserve`.
            again: whether the same result may leave another time (`Limits.repeats`).

        Raises:
            LichenError: PRIVACY_BUDGET, if it has left already; then this one may not.
        """
        with self._transaction() as db:
            own = [e for e in self._book.history(run=run) if (e.split, e.message_id, e.released_at) == (split, message_id, None)]
            if own:
                self._append(db, {"kind": "release", "entries": [entry.sequence for entry in own], "at": time.time()})
            elif not again:
                raise LichenError(
                    Code.PRIVACY_BUDGET,
                    f"what was reserved for message {message_id} of run {run} was used by another process of this user",
                    where=str(self.path),
                    fix="One result left. This one stays here; the coordinator may ask again, which is paid again.",
                )

    # --- what was spent ---

    def entries(self) -> list[Entry]:
        """Every reservation, the oldest first."""
        self._refresh()
        return list(self._book.entries.values())

    def segments(self) -> list[DataSegment]:
        """Every data segment, the oldest first."""
        self._refresh()
        return list(self._book.segments.values())

    def spent(self, segment: int, limit: Limit) -> Spent:
        """What a data segment has paid in all runs; ``limit`` is the bound for life, from which the filter's order follows."""
        self._refresh()
        return bound(self._book.history(segment), limit, None)

    def run_epsilon(self, run: str, split: Split, delta: float) -> float:
        """ε of a run on a split: the largest of its data segments', by the parameters that its plan fixed (PLD)."""
        self._refresh()
        own = [entry for entry in self._book.history(run=run) if entry.split == split]
        numbers = set[int]().union(*(entry.charged for entry in own))
        return max((epsilon([entry.segment for entry in own if number in entry.charged], delta) for number in numbers), default=0.0)

    def verify(self) -> int:
        """Check the whole chain of hashes from the first entry on, and every fingerprint; returns the number of entries.

        Raises:
            LichenError: LEDGER_BROKEN, with the entry.
        """
        with self._transaction():
            self._book = Book()
            self._catch_up()
            found: dict[int, list[int]] = {}
            for one, number in self._rows("SELECT fingerprint, segment FROM records ORDER BY fingerprint"):
                found.setdefault(number, []).append(one)
            for segment in self._book.segments.values():
                if segment.digest != _digest(found.pop(segment.number, [])):
                    raise _broken(self.path, f"the fingerprints of data segment {segment.number} are not those that were read")
            if found:
                raise _broken(self.path, "it holds fingerprints that were never read")
            return self._book.sequence

    # --- where it stands ---

    def sign(self, home: str) -> tuple[int, bytes]:
        """Note that a home signs for the ledger as it is; returns how many times it has, and the entry's hash.

        It is a count of its own, since how many entries lie between two says which records a plan has found here.
        """
        with self._transaction() as db:
            number = 1 + self._signed(home)
            self._append(db, {"kind": "signed", "home": home, "number": number})
            return number, self._book.head

    def signed(self, home: str) -> int:
        """How many times a home has signed, those included that a write-off stands for."""
        self._refresh()
        return self._signed(home)

    def _signed(self, home: str) -> int:
        return max(self._book.written_off_until.get(home, 0), next(reversed(self._book.signed.get(home, {})), 0))

    def signed_hash(self, home: str, number: int) -> bytes | None:
        """The hash of the entry of the time that a home signed; None if there is none."""
        self._refresh()
        return self._book.signed.get(home, {}).get(number)

    def written_off_until(self, home: str) -> int:
        """How many times a home may have signed for a ledger that it has written off; -1 for none."""
        self._refresh()
        return self._book.written_off_until.get(home, -1)

    def write_off(self, home: str, after: int = 0) -> int:
        """Take all that was ever read as spent for life, so that only new records can be read from now on.

        Args:
            home: whose records are known to be among those; see `Witness.name`.
            after: how many times it had signed for a lost ledger: it goes on behind that.

        Returns:
            How many data segments were written off.
        """
        with self._transaction() as db:
            numbers = sorted(self._book.segments)
            signed = max(after, self._signed(home))
            self._append(db, {"kind": "write-off", "segments": numbers, "home": home, "signed": signed, "at": time.time()})
        return len(numbers)

    # --- parts ---

    def _begin(self, db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO about (key) SELECT ? WHERE NOT EXISTS (SELECT 1 FROM about)", (secrets.token_bytes(32),))
        self._append(db, {"kind": "opened", "id": secrets.token_hex(16), "at": time.time()})

    def _reserve(
        self,
        db: sqlite3.Connection,
        split: Split,
        run: str,
        message_id: str,
        round: int,
        segment: Segment,
        planned_noise: float,
        unit: str,
        charged: Iterable[int],
        at: float,
        chosen: bool,
    ) -> None:
        body = {"split": split, "run": run, "message_id": message_id, "round": round, "unit": unit, "charged": sorted(charged), "at": at}
        self._append(db, {"kind": "reserve", "chosen": chosen, **body, **segment._asdict(), "planned_noise": planned_noise})

    def _append(self, db: sqlite3.Connection, body: dict[str, Any]) -> None:
        self._book.add(ledger_log.append(db, self._book.sequence, self._book.head, body))

    def _catch_up(self) -> None:
        """Read what the log holds beyond what this object knows."""
        try:
            for logged in ledger_log.read(self._db, self._book.sequence, self._book.head):
                self._book.add(logged)
        except (ledger_log.BrokenChainError, KeyError, TypeError) as error:
            raise _broken(self.path, str(error)) from None

    def _refresh(self) -> None:
        with self._transaction(durable=False):
            pass

    @staticmethod
    def _same_unit(history: Sequence[Entry], unit: str) -> None:
        """What was spent for rows bounds nothing for the entities they belong to, nor the other way round."""
        for entry in history:
            if entry.unit != unit:
                raise LichenError(
                    Code.PRIVACY_BUDGET,
                    f"run {entry.run} spent ε for each {entry.unit}, which can't be added to ε for each {unit}",
                    fix="Permit one unit only (policy.yaml, privacy.require), and keep to the one that was used.",
                )

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction on what the log holds now; if it fails, what it wrote is forgotten here too."""
        try:
            with super()._transaction(durable=durable) as db:
                if db.execute("PRAGMA user_version").fetchone()[0] == FORMAT:  # not while the file is being made or upgraded
                    self._catch_up()
                yield db
        except BaseException as error:
            self._book = Book()
            if isinstance(error, sqlite3.DatabaseError):
                raise _unusable(self.path, error) from None
            raise


def open_ledger(home: Path, *, own: bool = False) -> Ledger:
    """The ledger that a node home's data is charged in, made if it is not there; see `ledger_folder`.

    Args:
        home: the node's home.
        own: whether it has a ledger of its own in any case: a simulated node.

    Raises:
        LichenError: PRIVACY_HISTORY, LEDGER_BROKEN, OUTPUT_UNUSABLE.
    """
    if _format(home / FILE) == 1:
        raise LichenError(
            Code.PRIVACY_HISTORY,
            "the ledger is of format 1, from before the first release, which says nothing of single records",
            where=str(home / FILE),
            fix="Move it away, then: lichen client ledger --write-off, which takes all of this home's data as spent.",
        )
    return Ledger(ledger_folder(home, own=own))


def ledger_folder(home: Path, *, own: bool = False, make: bool = True) -> Path:
    """Where the ledger of a home lies: `~/.lichen`, one for all homes of this user, or the folder that `LICHEN_LEDGER` names.

    A home that was made with a ledger of its own keeps it, whatever the environment says later.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if the folder can't be made or written, or the user has no home directory and none is named.
    """
    if own or (home / FILE).exists():
        return home
    folder = Path(os.environ.get(FOLDER, "~/.lichen"))
    try:
        folder = home / folder.expanduser()
        if make and folder != home:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):  # made by another user, as whom an agent ran once
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows of a home directory of this user
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise LichenError(
            Code.OUTPUT_UNUSABLE,
            f"the ledger's folder can't be made or used: {why}",
            where=str(folder),
            fix=f"Set {FOLDER} to a folder that this user may write, the same for all that it runs.",
        ) from None
    return folder


def _format(path: Path) -> int | None:
    """A ledger's format; None if there is no such file, 0 for one that can't be read."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            return int(db.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError:
        return 0


def _steps_within(own: Sequence[Segment], planned: Segment, ahead: int, run: Limit) -> int:
    """How many of ``planned``'s steps a run's budget still allows after its ``own``.

    With all that are ahead they are as many in every round, so that the accountant knows their ε already; where these fit, fewer do.
    """
    whole = planned._replace(steps=planned.steps + ahead)
    return planned.steps if epsilon([*own, whole], run.delta) <= run.epsilon else affordable_steps(own, planned, run.epsilon, run.delta)


def _spent(path: Path, limits: Limits) -> LichenError:
    together = f", all runs together {limits.life.epsilon:g}" if limits.life else ""
    return LichenError(
        Code.PRIVACY_BUDGET,
        f"not one more step fits: this run may spend ε = {limits.run.epsilon:g}{together}",
        where=str(path),
        fix="`lichen client ledger` shows what was spent, and by which run.",
    )


def _digest(fingerprints: Sequence[int]) -> str:
    """SHA-256 of sorted fingerprints."""
    digest = hashlib.sha256()
    for one in fingerprints:
        digest.update(one.to_bytes(8, "big", signed=True))
    return digest.hexdigest()


def _unusable(path: Path, why: Exception | str) -> LichenError:
    """Where the system stands in the way, nothing is said against the file: an older copy of it must not be put in its place."""
    fix = (
        "Restore the file as it was last; an older copy of it is refused. If it is lost: move what is there away, then"
        " lichen client ledger --write-off."
    )
    told = str(why)
    if isinstance(why, OSError) or (isinstance(why, sqlite3.Error) and getattr(why, "sqlite_errorcode", 0) & 0xFF in _SOUND):
        fix = "The file itself may be sound: look for a full disk, a missing permission or another process, and try again."
    elif isinstance(why, LichenError):
        told, fix = why.what, why.fix
    return LichenError(Code.PRIVACY_HISTORY, f"the ledger can't be used: {told}", where=str(path), fix=fix)


def _broken(path: Path, why: str) -> LichenError:
    return LichenError(
        Code.LEDGER_BROKEN,
        f"the ledger's chain of hashes is broken: {why}",
        where=str(path),
        fix="Restore the ledger as it was last, or, if that is lost: delete it, then lichen client ledger --write-off.",
    )
