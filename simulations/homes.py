"""The node homes of simulated clients, each written when its client is first asked: most of a large population never are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lichen.client.data import MANIFEST, Manifest, Source, count_training, write_manifest
from lichen.common.errors import Code, LichenError
from lichen.simulations.rows import Groups, StoredRows


class NodeHomes:
    """``root/client-0/`` with ``data.parquet`` and ``data.yaml``, and so on.

    Writing one again replaces these two files and nothing else in the home (the accountant's history stays).

    Args:
        root: the folder of the homes.
        rows: all rows.
        parts: the rows of each client, as :func:`lichen.simulations.partition.partition` deals them.
        fields: task field → column; every column under its own name if None.
        declared_size: what every client declares. None: the power of two nearest to its true number of training rows. That choice is
            the simulator's, which sees all data; in a deployment the owner declares a public constant, and lichen never derives it.
        holdout: share (below 1) or number of rows that each client keeps for evaluation; a client that it would leave nothing to train
            on keeps none.
        seed: of the keys that choose the held-out rows, so that a simulation repeats.

    Raises:
        LichenError: PARTITION_INVALID for a client without rows.
    """

    def __init__(
        self,
        root: Path,
        rows: StoredRows,
        parts: Groups,
        *,
        fields: Mapping[str, str] | None = None,
        declared_size: int | None = None,
        holdout: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not parts.sizes.all():
            what = f"client {np.argmin(parts.sizes)} has no rows"
            raise LichenError(Code.PARTITION_INVALID, what, where="simulation.partition")
        self._root = root
        self._rows = rows
        self._parts = parts
        self._fields = {name: name for name in rows.columns} if fields is None else dict(fields)
        self._declared_size = declared_size
        self._holdout = holdout
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Path:
        """Where a client's home lies, whether it is there yet or not."""
        return self._root / f"client-{number}"

    def __iter__(self) -> Iterator[Path]:
        return (self[number] for number in range(len(self)))

    def open(self, number: int) -> Path:
        """A client's home, which is written now if it is not there.

        Raises:
            LichenError: OUTPUT_UNUSABLE if it can't be written; DATA_* as :func:`lichen.client.data.load`.
        """
        home = self[number]
        if not (home / MANIFEST).exists():  # it is the last that is written
            self._write(number, home)
        return home

    def write_again(self) -> None:
        """Write those that are there, as an earlier try has left them. Raises as :meth:`open`."""
        for number, home in enumerate(self):
            if (home / MANIFEST).exists():
                self._write(number, home)

    def write_all(self) -> list[Path]:
        """Write those that are not there, for who can't ask for each; then the rows are in the homes alone. Raises as :meth:`open`."""
        homes = [self.open(number) for number in range(len(self))]
        self._rows.path.unlink()
        return homes

    def _write(self, number: int, home: Path) -> None:
        import pyarrow.parquet as pq

        part = self._parts[number]
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            pq.write_table(self._rows.take(part), home / "data.parquet.new")
            os.replace(home / "data.parquet.new", home / "data.parquet")
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"cannot write: {error.strerror}", where=str(home)) from None
        key = hashlib.sha256(f"lichen simulation {self._seed} {number}".encode()).hexdigest()[:32]
        source = Source(
            path="data.parquet", fields=self._fields, declared_size=1, holdout=self._holdout, added_at="1970-01-01T00:00:00+00:00"
        )
        # with nothing held out all are kept: they need not be read again to be counted
        kept = count_training(home, source, key) if self._holdout else len(part)
        if not kept:
            source, kept = source.model_copy(update={"holdout": 0.0}), len(part)
        source = source.model_copy(update={"declared_size": self._declared_size or nearest_power_of_two(kept)})
        write_manifest(home, Manifest(holdout_key=key, sources=(source,)), durable=False)  # after a power cut it is dealt again


def nearest_power_of_two(count: int) -> int:
    """The power of two that is nearest to ``count`` (the larger of two equally near); 1 for less than 1."""
    if count <= 1:
        return 1
    below = 1 << (count.bit_length() - 1)
    return below if count - below < 2 * below - count else 2 * below
