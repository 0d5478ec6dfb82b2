"""What a node's data has paid in privacy: every reservation of steps, on disk before the first of them is taken."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lichen.common.database import Database
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, affordable_steps, epsilon

FORMAT = 1
Split = Literal["train", "holdout"]
"""Training rows and hold-out rows are disjoint, so each has a history of its own (parallel composition)."""


@dataclass(frozen=True)
class Entry:
    """One reservation."""

    split: Split
    run: str
    message_id: str
    round: int
    segment: Segment
    unit: str
    """Whom the steps were noised for: `example`, or `entity:FIELD`."""
    reserved_at: float
    """Unix time."""


@dataclass(frozen=True)
class Limit:
    """A bound on ε."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Limits:
    """What a reservation must stay under."""

    unit: str
    """Whom the bounds protect: `example`, or `entity:FIELD`."""
    run: Limit
    """For one run: the plan's."""
    life: Limit | None = None
    """For all runs on this data together: the policy's."""
    repeats: bool = False
    """Whether doing a message again gives the same result bit for bit (a seeded simulation), which costs nothing."""


_SCHEMA = """
CREATE TABLE spent (
    id INTEGER PRIMARY KEY,
    split TEXT NOT NULL,
    run TEXT NOT NULL,
    message_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    unit TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    reserved_at REAL NOT NULL,
    released_at REAL
)
"""


class Ledger(Database):
    """The privacy ledger of one node home (SQLite, write-ahead log, full synchronisation).

    Raises:
        LichenError: PRIVACY_HISTORY, if the file is damaged or from a newer lichen.
    """

    def __init__(self, home: Path) -> None:
        path = home / "ledger.sqlite"
        try:
            super().__init__(path, _SCHEMA, FORMAT)
        except sqlite3.DatabaseError as error:
            raise _unusable(path, str(error)) from None
        except LichenError as error:
            raise _unusable(path, error.what) from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reserve(
        self,
        split: Split,
        run: str,
        message_id: str,
        round: int,
        planned: Segment,
        limits: Limits,
    ) -> int:
        """Charge the steps of one message, all or as many as fit, before any is taken.

        A message that comes again after a crash uses the reservation it has, as long as nothing of it was released; afterwards it
        pays again, and so does one that asks for other steps under the same id.

        Args:
            split: which rows are read.
            run: the run's name.
            message_id: of the message that asks for the steps.
            round: of the run.
            planned: the steps it asks for.
            limits: what must hold afterwards.

        Returns:
            Steps granted, at least 1.

        Raises:
            LichenError: PRIVACY_BUDGET, if not one step fits, or if other steps on this data protected another unit.
        """
        with self._transaction():
            row = self._db.execute(
                "SELECT steps, released_at FROM spent WHERE split = ? AND run = ? AND message_id = ? AND unit = ? "
                "AND noise_multiplier = ? AND sample_rate = ? ORDER BY id DESC LIMIT 1",
                (split, run, message_id, limits.unit, planned.noise_multiplier, planned.sample_rate),
            ).fetchone()
            if row is not None and (row[1] is None or limits.repeats):
                return min(int(row[0]), planned.steps)
            steps = affordable_steps(self.history(split, run), planned, limits.run.epsilon, limits.run.delta)
            if limits.life is not None:
                self._same_unit(split, limits.unit)
                steps = affordable_steps(self.history(split), planned._replace(steps=steps), limits.life.epsilon, limits.life.delta)
            if steps == 0:
                raise LichenError(
                    Code.PRIVACY_BUDGET,
                    f"not one more step fits: this run may spend ε = {limits.run.epsilon:g}"
                    + (f", all runs together {limits.life.epsilon:g}" if limits.life else ""),
                    where=str(self.path),
                    fix="`lichen client ledger` shows what was spent, and by which run.",
                )
            self._db.execute(
                "INSERT INTO spent (split, run, message_id, round, unit, noise_multiplier, sample_rate, steps, reserved_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (split, run, message_id, round, limits.unit, planned.noise_multiplier, planned.sample_rate, steps, time.time()),
            )
            return steps

    def released(self, split: Split, run: str, message_id: str) -> None:
        """Note that the result of a reservation may leave from now on."""
        with self._transaction():
            self._db.execute(
                "UPDATE spent SET released_at = ? WHERE split = ? AND run = ? AND message_id = ? AND released_at IS NULL",
                (time.time(), split, run, message_id),
            )

    def history(self, split: Split, run: str | None = None) -> list[Segment]:
        """All that was reserved on a split, of one run or of all."""
        return [entry.segment for entry in self.entries() if entry.split == split and run in {None, entry.run}]

    def spent(self, split: Split, delta: float, run: str | None = None) -> float:
        """ε of `history` at ``delta``."""
        return epsilon(self.history(split, run), delta)

    def entries(self) -> list[Entry]:
        """Every reservation, the oldest first."""
        query = "SELECT split, run, message_id, round, noise_multiplier, sample_rate, steps, unit, reserved_at FROM spent ORDER BY id"
        try:
            rows = self._rows(query)
        except sqlite3.DatabaseError as error:
            raise _unusable(self.path, str(error)) from None
        return [
            Entry(split, run, message_id, number, Segment(noise, rate, steps), unit, at)
            for split, run, message_id, number, noise, rate, steps, unit, at in rows
        ]

    def _same_unit(self, split: Split, unit: str) -> None:
        """What was spent for rows bounds nothing for the entities they belong to, nor the other way round."""
        for entry in self.entries():
            if entry.split == split and entry.unit != unit:
                raise LichenError(
                    Code.PRIVACY_BUDGET,
                    f"run {entry.run} spent ε for each {entry.unit}, which can't be added to ε for each {unit}",
                    where=str(self.path),
                    fix="Permit one unit only (policy.yaml, privacy.require), and keep to the one that was used.",
                )

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        try:
            with super()._transaction(durable=durable) as db:
                yield db
        except sqlite3.DatabaseError as error:
            raise _unusable(self.path, str(error)) from None


def _unusable(path: Path, why: str) -> LichenError:
    return LichenError(
        Code.PRIVACY_HISTORY, f"the ledger can't be used: {why}", where=str(path), fix="Restore the node's home from its backup."
    )
