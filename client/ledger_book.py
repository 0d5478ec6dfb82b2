"""What the ledger's log says, as a book: reservations, data segments, and the ε that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from lichen.client import ledger_log
from lichen.common.privacy.accounting import Segment, epsilon, filter_epsilon, filter_order

Split = Literal["train", "holdout"]


@dataclass(frozen=True)
class Entry:
    """One reservation."""

    sequence: int
    """Its number in the log."""
    split: Split
    run: str
    message_id: str
    round: int
    segment: Segment
    """The steps."""
    planned_noise: float
    """The plan's σ, of which the steps have as much or more."""
    unit: str
    """Whom the steps were noised for: `example`, or `entity:FIELD`."""
    charged: frozenset[int]
    """The data segments that were read."""
    reserved_at: float
    """Unix time."""
    released_at: float | None = None
    """From when on its result may have left; None if it did not."""


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


class Grant(NamedTuple):
    """What a reservation permits."""

    segment: Segment
    """Steps, with at least the plan's noise and at its sample rate."""
    readable: frozenset[int]
    """The data segments that may be read: those that were charged."""


@dataclass(frozen=True)
class DataSegment:
    """Records that were new when they were first read, or a part of such, with all that was charged to it.

    Attributes:
        number: from 1.
        split: as which they were first read.
        records: how many.
        opened_at: Unix time.
        digest: SHA-256 of the sorted fingerprints.
        written_off: whether nothing of it may be read any more.
    """

    number: int
    split: Split
    records: int
    opened_at: float
    digest: str
    written_off: bool = False


class Spent(NamedTuple):
    """ε of one data segment over all runs, and by which bound: `pld` (one run, its parameters fixed) or `rdp-filter` (see `life`)."""

    epsilon: float
    bound: Literal["pld", "rdp-filter"]


@dataclass
class Book:
    """What the log says, read up to ``sequence``."""

    sequence: int = 0
    head: bytes = ledger_log.START
    entries: dict[int, Entry] = field(default_factory=dict)
    segments: dict[int, DataSegment] = field(default_factory=dict)
    first: bytes = b""
    """The hash of the first entry."""
    signed: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """By home, the hashes of the entries that say that it signed, by how many times it had."""
    written_off_until: dict[str, int] = field(default_factory=dict)
    """By home, how many times it may have signed for entries that were lost, as its last write-off has it."""
    chosen: bool = False
    """Whether any plan has said which records it reads, as a stream of tasks does: whom its runs were charged to then tells of them."""
    split_at: int = 0
    """The number of the last split; 0: no records have ever moved from one data segment to another."""

    def add(self, logged: ledger_log.Logged) -> None:
        """Take in the next entry of the log."""
        body = logged.body
        match body["kind"]:
            case "reserve":
                self.chosen |= body["chosen"]
                steps = Segment(body["noise_multiplier"], body["sample_rate"], body["steps"])
                self.entries[logged.sequence] = Entry(
                    sequence=logged.sequence,
                    split=body["split"],
                    run=body["run"],
                    message_id=body["message_id"],
                    round=body["round"],
                    segment=steps,
                    planned_noise=body["planned_noise"],
                    unit=body["unit"],
                    charged=frozenset(body["charged"]),
                    reserved_at=body["at"],
                )
            case "release":
                for number in body["entries"]:
                    self.entries[number] = replace(self.entries[number], released_at=body["at"])
            case "segment":
                number = body["segment"]
                self.segments[number] = DataSegment(number, body["split"], body["records"], body["at"], body["digest"])
            case "split":
                self.split_at = logged.sequence
                number, old = body["segment"], self.segments[body["of"]]
                self.segments[number] = replace(old, number=number, records=body["records"], digest=body["digest"])
                self.segments[old.number] = replace(old, records=old.records - body["records"], digest=body["rest"])
                for sequence, entry in self.entries.items():
                    if old.number in entry.charged:
                        self.entries[sequence] = replace(entry, charged=entry.charged | {number})
            case "write-off":
                self.written_off_until[body["home"]] = body["signed"]
                for number in body["segments"]:
                    self.segments[number] = replace(self.segments[number], written_off=True)
            case "signed":
                self.signed.setdefault(body["home"], {})[body["number"]] = logged.hash
        self.sequence, self.head, self.first = logged.sequence, logged.hash, self.first or logged.hash

    def history(self, segment: int | None = None, run: str | None = None) -> list[Entry]:
        """The reservations, of one data segment or all, of one run or all; the oldest first."""
        return [e for e in self.entries.values() if (segment is None or segment in e.charged) and run in {None, e.run}]


def bound(history: Sequence[Entry], life: Limit, more: tuple[str, Segment] | None) -> Spent:
    """ε of a data segment's history, and perhaps of more steps of a run.

    One run with one kind of steps had its parameters fixed in its plan: the sequence is one mechanism, and PLD bounds it. Anything else
    may have been chosen by what earlier steps released; a filter admits it, whose order follows from the first steps alone. Which of the
    two bounds a life ends under may follow from releases too, so that over a life δ counts twice, once for each (a union bound).
    """
    steps = [entry.segment for entry in history] + ([more[1]] if more else [])
    runs = {entry.run for entry in history} | ({more[0]} if more else set())
    if len(runs) <= 1 and len({segment[:2] for segment in steps}) <= 1:
        return Spent(epsilon(steps, life.delta), "pld")
    order = filter_order(*steps[0][:2], life.epsilon, life.delta)
    return Spent(filter_epsilon(steps, life.delta, order), "rdp-filter")
