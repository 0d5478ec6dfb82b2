"""Training rows in an Arrow file, of which a client's share alone comes into memory; and the numbers by which rows are dealt."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lichen.common.errors import Code, LichenError

Row = dict[str, Any]
Indices = npt.NDArray[np.int64]
BATCH = 1024
"""Rows that are read at once."""
K = TypeVar("K", bound=Hashable)


class StoredRows:
    """Rows of an Arrow file, or some of them. It is open only while rows are read, so that no page of it counts as this process's memory.

    Args:
        path: the file, as :func:`store` writes it.
        starts: where its batches begin, and its number of rows.
        chosen: which of its rows these are, ascending; None: all.
    """

    def __init__(self, path: Path, starts: Indices, chosen: Indices | None = None) -> None:
        self.path = path
        self._starts = starts
        self._chosen = chosen

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Row:
        return dict(self.take(np.array([index])).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for batch in self._batches(None):
            yield from batch.to_pylist()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        import pyarrow as pa

        with pa.memory_map(str(self.path)) as file:
            return list(pa.ipc.open_file(file).schema.names)

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column, as Python objects; None for each row where there is no such column."""
        columns = self.columns
        if name not in columns:
            yield from (None for _ in range(len(self)))
            return
        for batch in self._batches([columns.index(name)]):
            yield from batch.column(0).to_pylist()

    def choose(self, indices: Indices) -> StoredRows:
        """Some of these rows, ascending."""
        return StoredRows(self.path, self._starts, indices if self._chosen is None else self._chosen[indices])

    def take(self, indices: Indices) -> Any:
        """Some of these rows, ascending, as a ``pyarrow.Table`` in memory."""
        import pyarrow as pa

        places = indices if self._chosen is None else self._chosen[indices]
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            # batch by batch: Table.take would first join the batches, that is, copy the mapped file into memory
            found = [reader.get_batch(number).take(pa.array(within)) for number, within in self._within(places)]
            return pa.Table.from_batches(found, schema=reader.schema).combine_chunks()

    def _batches(self, fields: list[int] | None) -> Iterator[Any]:
        """The chosen rows, batch by batch: read, not mapped, so that a pass over all rows leaves none in memory."""
        import pyarrow as pa

        with pa.OSFile(str(self.path)) as file:
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            if self._chosen is None:
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                for number, within in self._within(self._chosen):
                    yield reader.get_batch(number).take(pa.array(within))

    def _within(self, places: Indices) -> Iterator[tuple[int, Indices]]:
        """Each batch that holds some of the places, with where in it they are."""
        cuts = np.searchsorted(places, self._starts)
        for number in np.flatnonzero(np.diff(cuts)):
            yield int(number), places[cuts[number] : cuts[number + 1]] - self._starts[number]


def store(path: Path, batches: Iterable[Any]) -> StoredRows:
    """Write ``pyarrow.RecordBatch``es as an Arrow file, readable by its owner only; whole or not at all.

    Args:
        path: where; one that is there is replaced.
        batches: at least one, all of one schema.

    Raises:
        LichenError: OUTPUT_UNUSABLE if it can't be written; besides what ``batches`` raises.
    """
    import pyarrow as pa

    rest = iter(batches)
    first = next(rest)
    starts, temporary = [0], path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
            for batch in chain([first], rest):
                for start in range(0, batch.num_rows, BATCH):
                    piece = batch.slice(start, BATCH)
                    writer.write_batch(piece)
                    starts.append(starts[-1] + piece.num_rows)
        temporary.replace(path)
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"cannot write: {error.strerror or error}", where=str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return StoredRows(path, np.array(starts))


Rows = Sequence[Row] | StoredRows


def values_of(rows: Rows, field: str) -> Iterator[Any]:
    """A field of every row; None where it has no such field."""
    return rows.column(field) if isinstance(rows, StoredRows) else (row.get(field) for row in rows)


def numbered(values: Iterable[K]) -> tuple[Indices, list[K]]:
    """Each value's number, and the values by number, in the order in which they first come."""
    numbers: dict[K, int] = {}
    found = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64)
    return found, list(numbers)


class Groups:
    """Rows in groups: one array of row numbers, ascending within each group, and where the groups begin.

    Args:
        of: each row's group.
        count: of groups; one may be empty.
    """

    def __init__(self, of: Indices, count: int) -> None:
        self._rows = np.argsort(of, kind="stable").astype(np.int64, copy=False)
        self.sizes: Indices = np.bincount(of, minlength=count)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> Indices:
        return self._rows[self._starts[number] : self._starts[number + 1]]

    def __iter__(self) -> Iterator[Indices]:
        return (self[number] for number in range(len(self)))

    def each(self) -> Indices:
        """Each row's group."""
        found = np.empty_like(self._rows)
        found[self._rows] = np.repeat(np.arange(len(self)), self.sizes)
        return found
