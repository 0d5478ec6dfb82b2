"""What the ledger says, for its owner's eyes: by run, by split and by data segment, with the bound that each ε is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lichen.client.ledger import Ledger
from lichen.client.ledger_book import DataSegment, Entry, Limit


def spending(ledger: Ledger, limit: Limit) -> dict[str, Any]:
    """The whole ledger, verified.

    Args:
        ledger: whose chain of hashes is checked first.
        limit: the bound for life.

    Returns:
        ``runs`` (by split, run and mechanism), ``segments``, ``splits`` (the largest of the segments that were read as such), ``record``
        (ε of one record: the largest of all segments) and its ``delta``. Of a person with several records nothing is said: they were
        drawn into the same steps, so that their ε do not add up.

    Raises:
        LichenError: LEDGER_BROKEN.
    """
    verified = ledger.verify()
    entries, segments = ledger.entries(), ledger.segments()
    told = [_segment(ledger, limit, segment, entries) for segment in segments]
    splits = []
    for split in dict.fromkeys(entry.split for entry in entries):
        read = set[int]().union(*(entry.charged for entry in entries if entry.split == split))
        largest = max((row for row in told if row["segment"] in read), key=lambda row: row["epsilon"], default=None)
        if largest is not None:
            splits.append({"split": split, **{key: largest[key] for key in ("epsilon", "bound", "left")}})
    return {
        "ledger": str(ledger.path),
        "entries": verified,
        "delta": limit.delta * (2 if any(row["bound"] == "rdp-filter" for row in told) else 1),
        "max_epsilon": limit.epsilon,
        "runs": _runs(ledger, entries, limit),
        "splits": splits,
        "segments": told,
        "record": max((row["epsilon"] for row in told), default=0.0),
    }


def unspent(file: Path, limit: Limit) -> dict[str, Any]:
    """What `spending` would tell of a ledger that is not there yet."""
    empty: dict[str, Any] = {"runs": [], "splits": [], "segments": [], "record": 0.0}
    return {"ledger": str(file), "entries": 0, "delta": limit.delta, "max_epsilon": limit.epsilon} | empty


def _segment(ledger: Ledger, limit: Limit, segment: DataSegment, entries: list[Entry]) -> dict[str, Any]:
    spent = ledger.spent(segment.number, limit)
    return {
        "segment": segment.number,
        "split": segment.split,
        "records": segment.records,
        "opened": segment.opened_at,
        "runs": len({entry.run for entry in entries if segment.number in entry.charged}),
        "epsilon": spent.epsilon,
        "bound": spent.bound,
        "left": 0.0 if segment.written_off else max(0.0, limit.epsilon - spent.epsilon),
        "written_off": segment.written_off,
    }


def _runs(ledger: Ledger, entries: list[Entry], limit: Limit) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, float, float], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.split, entry.run, entry.segment.noise_multiplier, entry.segment.sample_rate), []).append(entry)
    return [
        {
            "split": split,
            "run": run,
            "unit": own[0].unit,
            "rounds": len({entry.round for entry in own}),
            "steps": sum(entry.segment.steps for entry in own),
            "noise_multiplier": noise,
            "sample_rate": rate,
            "epsilon": ledger.run_epsilon(run, own[0].split, limit.delta),
            "first": own[0].reserved_at,
            "last": own[-1].reserved_at,
        }
        for (split, run, noise, rate), own in groups.items()
    ]
