"""Files that come to the agents of an online run, one batch after another, and how soon the coordinator begins then."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lichen.client.data import Source, read_manifest, write_manifest
from lichen.client.status import read_status
from lichen.common.continual.stream import tasks_of
from lichen.coordinator.run_directory import COHORT
from lichen.coordinator.watch import read_rounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lichen.common.plan import Plan

INBOX = "inbox"
TO_COME = "to-come"
SETTLES_S = 4.0
"""After old files were renamed: time enough for a batch to begin by mistake."""


class Begin(NamedTuple):
    """How a batch began."""

    batch: int
    """From 1."""
    seconds: float
    """From when the last file was there that made enough, until the coordinator had drawn the cohort."""


class Deliveries:
    """The rows of nodes, as files of which each batch brings one to as many nodes as the plan waits for, to others in turn.

    Args:
        plan: an online one.
        homes: whose data are taken out of them, and put into files; each then watches a folder.
    """

    def __init__(self, plan: Plan, homes: Sequence[Path]) -> None:
        self._each, self._clients = plan.continual.online.rounds, min(plan.continual.online.clients, len(homes))
        self._homes, self._count = list(homes), len(tasks_of(plan))
        self._sent = 0
        self._at: float | None = None
        """When the batch under way had its files."""
        self._renamed: float | None = None
        self.begun: list[Begin] = []
        self.early = 0
        """Batches that began though files were only renamed."""
        for home in self._homes:
            _split(home, self._count)

    def go_on(self, run: Path) -> None:
        """Do what is next; called again and again while the run, whose directory it is, goes on."""
        asked = _round_asked(run)
        if self._at is not None:
            if asked is None or asked[0] <= (self._sent - 1) * self._each:
                return
            self.begun.append(Begin(self._sent, max(0.0, asked[1] - self._at)))
            self._at = None
        if self._sent == self._count or not self._all_look() or len(read_rounds(run)) < self._sent * self._each:
            return
        if self._renamed is None:
            self._rename()
            self._renamed = time.monotonic()
        if time.monotonic() - self._renamed < SETTLES_S:
            return
        self.early += asked is not None and asked[0] > self._sent * self._each
        for node in range(self._clients):
            self._deliver((self._sent + node) % len(self._homes))
        self._at, self._renamed = time.time(), None
        self._sent += 1

    def _all_look(self) -> bool:
        """Whether all agents know of the run, and have told what is new: nothing, before the first file."""
        return all(read_status(home).new_rows is not None for home in self._homes)

    def _deliver(self, node: int) -> None:
        """All that has come for a node until now: who was not in the last batch has two files."""
        home = self._homes[node]
        for file in sorted((home / TO_COME).iterdir())[: self._sent + 1]:
            if int(file.stem) <= self._sent:
                file.rename(home / INBOX / file.name)

    def _rename(self) -> None:
        for home in self._homes:
            for file in list((home / INBOX).iterdir()):
                file.rename(file.with_name(f"again-{file.name}"))


def _split(home: Path, count: int) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    manifest = read_manifest(home)
    (source,) = manifest.sources
    rows = pq.read_table(home / source.path)
    for folder in (INBOX, TO_COME):
        (home / folder).mkdir()
    for number, part in enumerate(np.array_split(np.arange(rows.num_rows), count)):
        pq.write_table(rows.take(part), home / TO_COME / f"{number:04d}.parquet")
    (home / source.path).unlink()
    each = max(1, (source.declared_size or rows.num_rows) // count)
    watched: Source = source.model_copy(update={"path": INBOX, "watch": True, "declared_size": each})
    write_manifest(home, manifest.model_copy(update={"sources": (watched,)}))


def _round_asked(run: Path) -> tuple[int, float] | None:
    """The round whose cohort was drawn last, and when."""
    try:
        file = run / COHORT
        return int(json.loads(file.read_text(encoding="utf-8"))["round"]), file.stat().st_mtime
    except FileNotFoundError:
        return None
