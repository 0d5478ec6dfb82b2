"""Rows out of JSONL, CSV, Parquet and text files: every row is checked, and a bad one is told by file, line and reason.

One pass, row by row, so that a file may be larger than memory and one broken row does not hide the others. No text of a row is ever
put into an error or a log: reasons name fields and types only.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from lichen.common.errors import Code, LichenError

Kind = Literal["jsonl", "csv", "parquet", "text"]
TextRows = Literal["line", "document"]
Row = dict[str, Any]

SUFFIXES: Mapping[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
MAX_ROW_CHARACTERS = 16 * 2**20
_BATCH_ROWS = 1024
_LIST_ALL = "On a node `lichen client data check` lists all bad rows."


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used. For the owner's eyes only.

    Attributes:
        file: its file.
        row: its number from 1: the line where it begins (JSONL, CSV, text), or the row (Parquet).
        reason: what is wrong with it; names fields and types, never values.
    """

    file: str
    row: int
    reason: str


def refuse(bad: BadRow) -> None:
    """The strict way to treat a bad row.

    Raises:
        LichenError: DATA_ROW, always.
    """
    raise LichenError(Code.DATA_ROW, bad.reason, where=f"{bad.file}, row {bad.row}", fix=f"Mend the row. {_LIST_ALL}")


class _Swallowed(str):
    """The fault of a row that took the rest of its file with it, so that one row would decide over others."""

    __slots__ = ()


class Reader:
    """The checked rows of one source, under the names that the task uses.

    Args:
        path: a file, or a folder whose files are read in sorted order (hidden ones, and names that begin with ``_``, are left out).
        fields: task field → column. Text files have the columns ``text`` and ``file``. Empty: every column of the first row, by its name.
        text_rows: what one row of a text file is; blank lines are no rows.
        on_bad: told of each bad row, which is then left out; by default it raises.
        apart: whether a row can be used may depend on that row alone, which privacy needs: all values are read as text, whatever type other
            rows have, a JSON row without a column is a bad row also where it is the first, and no rows are no error.
        empty: whether no files and no rows are no error: of a folder that files come to; those of no known kind are passed over.
        on_bad_file: told what is wrong with a file that fails as a whole, after which the next one is read; by default that raises.

    Iterating raises LichenError: DATA_NOT_FOUND, DATA_FORMAT (no known kind, or damaged as a whole), DATA_FIELD (no such column) and
    DATA_EMPTY (a file of no bytes, or no row at all), besides what ``on_bad`` raises.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, str],
        *,
        text_rows: TextRows = "line",
        on_bad: Callable[[BadRow], None] = refuse,
        apart: bool = False,
        empty: bool = False,
        on_bad_file: Callable[[LichenError], None] | None = None,
    ) -> None:
        self.files = find_files(path, empty=apart or empty, others=empty)
        self._empty = apart or empty
        self._apart = apart
        self._path = path
        self._fields = dict(fields)
        self._text_rows = text_rows
        self._on_bad, self._on_bad_file = on_bad, on_bad_file
        self._types: dict[str, Any] = {}

    @property
    def schema(self) -> Any:
        """The Arrow schema; known once a row was read."""
        import pyarrow as pa

        return pa.schema([(field, pa.string()) for field in self._fields] if self._apart else list(self._types.items()))

    def __iter__(self) -> Iterator[Row]:
        seen = False
        for file, kind in self.files:
            try:
                for row in self._rows_of(file, kind):
                    seen = True
                    if row is not None:
                        yield row
            except LichenError as error:
                if self._on_bad_file is None:
                    raise
                seen = True
                self._on_bad_file(error)
        if not seen and not self._empty:
            raise LichenError(Code.DATA_EMPTY, "no rows", where=str(self._path), fix="Check that the export ran to its end.")

    def _rows_of(self, file: Path, kind: Kind) -> Iterator[Row | None]:
        """Each row of a file; None in place of a bad one."""
        try:
            for number, found in self._raw(file, kind):
                reason = found if isinstance(found, str) else None
                row: Row = {}
                if isinstance(found, dict):
                    row, reason = self._as_text(file, kind, found) if self._apart else self._checked(file, found)
                elif self._apart and isinstance(found, _Swallowed):
                    raise LichenError(Code.DATA_FORMAT, f"row {number} {found}", where=str(file), fix=f"Mend it. {_LIST_ALL}")
                if reason is not None:
                    self._on_bad(BadRow(str(file), number, reason))
                yield row if reason is None else None
        except OSError as error:
            raise LichenError(Code.DATA_NOT_FOUND, f"can't be read: {error.strerror or error}", where=str(file)) from None

    def _raw(self, file: Path, kind: Kind) -> Iterator[tuple[int, Row | str]]:
        """Each row's number, with its columns or with the reason why it has none."""
        with file.open("rb") as binary:
            start = binary.read(4)
        if not start and self._apart:
            return
        try:
            _sniff(file, start, kind)
        except LichenError as error:
            if not (self._apart and kind == "text" and self._text_rows == "document"):
                raise
            yield 1, error.what  # the file is the row
            return
        if kind == "parquet":
            yield from _parquet_rows(file, set(self._fields.values()))
            return
        # Bytes that are no UTF-8 become lone surrogates here, so that value_fault finds them in their row.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="" if kind == "csv" else "\n") as stream:
            if kind == "csv":
                yield from _csv_rows(file, stream)
            elif kind == "jsonl":
                yield from _jsonl_rows(stream)
            else:
                yield from _text_rows(stream, file.name, self._text_rows)

    def _checked(self, file: Path, found: Row) -> tuple[Row, str | None]:
        if not self._fields:
            self._fields = {name: name for name in found}
        if not self._types:
            for field, column in self._fields.items():
                if column not in found:
                    raise self._no_column(file, field, column, found)
        row: Row = {}
        types: dict[str, Any] = {}
        for field, column in self._fields.items():
            if column not in found:
                return {}, f"has no {column!r}"
            value = found[column]
            fault = value_fault(value)
            if fault is None:
                types[field], fault = _arrow_type(value, self._types.get(field))
            if fault is not None:
                return {}, f"{column!r} {fault}"
            row[field] = value
        self._types = types  # only of whole rows: a bad first row does not decide
        return row, None

    def _as_text(self, file: Path, kind: Kind, found: Row) -> tuple[Row, str | None]:
        """A row with every value as text; its fault, if it has one, is its own."""
        row: Row = {}
        for field, column in self._fields.items():
            if column not in found:
                if kind == "jsonl":
                    return {}, f"has no {column!r}"
                raise self._no_column(file, field, column, found)
            value = found[column]
            fault = value_fault(value)
            if fault is None and isinstance(value, list | tuple | dict | bytes):
                fault = "is neither text nor a number"
            if fault is not None:
                return {}, f"{column!r} {fault}"
            row[field] = value if isinstance(value, str) else repr(value)
        return row, None

    @staticmethod
    def _no_column(file: Path, field: str, column: str, found: Row) -> LichenError:
        return LichenError(
            Code.DATA_FIELD,
            f"no column {column!r} for the field {field!r}; columns: {', '.join(map(str, found))}",
            where=str(file),
            fix=f"Map {field!r} to one of these.",
        )


def find_files(path: Path, *, empty: bool = False, others: bool = False) -> list[tuple[Path, Kind]]:
    """The files of a source, sorted, each with its kind by its suffix.

    Args:
        path: a file or a folder.
        empty: whether a folder without files will do.
        others: whether files of no known kind are passed over, such as those that are still on their way.

    Raises:
        LichenError: DATA_NOT_FOUND if there is nothing; DATA_EMPTY for a folder without files; DATA_FORMAT for a file of no known kind,
            also within a folder.
    """
    if not path.exists():
        raise LichenError(Code.DATA_NOT_FOUND, "no such file or folder", where=str(path))
    found = [path]
    if path.is_dir():
        try:
            inside = [file for file in path.rglob("*") if file.is_file()]
        except OSError as error:
            raise LichenError(Code.DATA_NOT_FOUND, f"can't be looked at: {error}", where=str(path)) from None
        found = sorted(file for file in inside if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts))
        if not found and not empty:
            fix = "If files are yet to come to it: lichen client data add … --watch."
            raise LichenError(Code.DATA_EMPTY, "the folder has no files", where=str(path), fix=fix)
    kinds: list[tuple[Path, Kind]] = []
    for file in found:
        kind = SUFFIXES.get(file.suffix.lower())
        if kind is None and others:
            continue
        if kind is None:
            hint = " A JSON array is written as JSONL with one object a line." if file.suffix.lower() == ".json" else ""
            raise LichenError(
                Code.DATA_FORMAT,
                f"files of kind {file.suffix or 'no suffix'!r} are not read",
                where=str(file),
                fix=f"Known: {', '.join(SUFFIXES)}.{hint} Other files must lie outside the folder.",
            )
        kinds.append((file, kind))
    return kinds


def read_path(path: Path, fields: Mapping[str, str]) -> Any:
    """All rows of a file or folder, strictly, as a ``pyarrow.Table`` in memory. Raises as :class:`Reader`."""
    reader = Reader(path, fields)
    return to_table(reader, iter(reader), None)


def to_batches(reader: Reader, rows: Iterator[Row]) -> Iterator[Any]:
    """Rows as ``pyarrow.RecordBatch``es. Raises as :class:`Reader`."""
    import pyarrow as pa

    while pending := list(islice(rows, _BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(pending, schema=reader.schema)


def to_table(reader: Reader, rows: Iterator[Row], folder: Path | None) -> Any:
    """Rows as a ``pyarrow.Table``: memory-mapped from an unnamed file in ``folder``, or in memory where that is None.

    The file has no name, so that no copy of the rows outlives the process, and a source that its owner deletes is gone.

    Raises:
        LichenError: as :class:`Reader`; OUTPUT_UNUSABLE if the disk is full.
    """
    import mmap
    import tempfile

    import pyarrow as pa

    if folder is None:
        batches = list(to_batches(reader, rows))
        return pa.Table.from_batches(batches, schema=reader.schema)
    with tempfile.TemporaryFile(dir=folder) as file:
        writer: Any = None
        try:
            for batch in to_batches(reader, rows):
                writer = writer or pa.ipc.new_stream(file, batch.schema)
                writer.write_batch(batch)
            if writer is None:
                return reader.schema.empty_table()
            writer.close()
            file.flush()
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"can't be written: {error.strerror}", where=str(folder)) from None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))).read_all()


def _sniff(file: Path, start: bytes, kind: Kind) -> None:
    fault = None
    if not start:
        raise LichenError(Code.DATA_EMPTY, "the file is empty", where=str(file), fix="Check that the export ran to its end.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        fault = "this is UTF-16 text"
    elif start.startswith(b"\x1f\x8b") or start.startswith(b"PK\x03\x04"):
        fault = "this is a compressed file"
    elif kind != "parquet" and start == b"PAR1":
        fault = "this is a Parquet file"
    if fault:
        raise LichenError(Code.DATA_FORMAT, fault, where=str(file), fix="Save it as plain UTF-8, or name it for what it is.")


def _lines(stream: TextIO) -> Iterator[tuple[int, str | None]]:
    """Numbered lines; None for one that is too long, of which no more than the limit is ever held."""
    number = 0
    while line := stream.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        if len(line) <= MAX_ROW_CHARACTERS:
            yield number, line
            continue
        yield number, None
        while line and not line.endswith(("\n", "\r")):
            line = stream.readline(MAX_ROW_CHARACTERS)


_TOO_LONG = f"is longer than {MAX_ROW_CHARACTERS} characters"


def _jsonl_rows(stream: TextIO) -> Iterator[tuple[int, Row | str]]:
    def constant(_: str) -> None:
        raise ValueError

    for number, line in _lines(stream):
        if line is None:
            yield number, _TOO_LONG
        elif line.strip():
            try:
                row = json.loads(line, parse_constant=constant)
            except json.JSONDecodeError as error:
                yield number, f"is not JSON: {error.msg} at character {error.pos + 1}"
            except (ValueError, RecursionError):
                yield number, "is not JSON: NaN, a number too long, or nested too deeply"
            else:
                yield number, row if isinstance(row, dict) else "is not a JSON object"


def _csv_rows(file: Path, stream: TextIO) -> Iterator[tuple[int, Row | str]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARACTERS))
    ended_early = False

    def lines() -> Iterator[str]:
        nonlocal ended_early
        for _, line in _lines(stream):
            if line is None:
                ended_early = True
                return
            yield line

    reader = csv.reader(lines(), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None:
                raise LichenError(Code.DATA_FORMAT, f"the header is not CSV: {error}", where=str(file)) from None
            fault = f"is not CSV: {error}"
            yield number, _Swallowed(fault) if "unexpected end of data" in fault else fault
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if double := sorted({name for name in header if header.count(name) > 1}):
                raise LichenError(Code.DATA_FIELD, f"columns that occur twice: {', '.join(double)}", where=str(file))
        elif len(cells) != len(header):
            yield number, f"has {len(cells)} cells where the header has {len(header)}"
        else:
            yield number, dict(zip(header, cells, strict=True))
    if ended_early:
        yield reader.line_num + 1, _Swallowed(f"{_TOO_LONG}; the rest of the file was not read")


def _text_rows(stream: TextIO, name: str, unit: TextRows) -> Iterator[tuple[int, Row | str]]:
    if unit == "document":
        text = stream.read(MAX_ROW_CHARACTERS + 1)
        if text.strip():
            yield 1, _TOO_LONG if len(text) > MAX_ROW_CHARACTERS else {"text": text.strip("\r\n"), "file": name}
        return
    for number, line in _lines(stream):
        if line is None:
            yield number, _TOO_LONG
        elif line.strip():
            yield number, {"text": line.rstrip("\r\n"), "file": name}


def _parquet_rows(file: Path, columns: set[str]) -> Iterator[tuple[int, Row | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            # With a column missing all are read, so that the error can list them.
            wanted = sorted(columns) if columns and columns <= set(parquet.schema_arrow.names) else None
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                try:
                    rows: list[Row | str] = batch.to_pylist()
                except UnicodeDecodeError:
                    rows = [_parquet_row(batch.slice(position, 1)) for position in range(batch.num_rows)]
                for row in rows:
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise LichenError(Code.DATA_FORMAT, f"not a whole Parquet file ({type(error).__name__})", where=str(file)) from None


def _parquet_row(one: Any) -> Row | str:
    try:
        return dict(one.to_pylist()[0])
    except UnicodeDecodeError:
        return "holds bytes that are not UTF-8"


def value_fault(value: Any) -> str | None:
    """Why a value can't be used, or None."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        return _text_fault(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, list | tuple):
        return next((fault for item in value if (fault := value_fault(item))), None if value else "is empty")
    return None


def _text_fault(value: str) -> str | None:
    if not value.strip():
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds bytes that are not UTF-8"
    return None


def _arrow_type(value: Any, known: Any) -> tuple[Any, str | None]:
    """The column's Arrow type (that of its first value), and the fault of a value that does not fit it."""
    import pyarrow as pa

    scalars = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    own = scalars.get(type(value))
    if own is not None and own == known and (type(value) is not int or -(2**63) <= value < 2**63):
        return known, None
    try:
        kind = own or pa.infer_type([value])
        if known is not None and (own is not None or known in scalars.values()):
            return known, f"holds {kind} where the first row holds {known}" if kind != known else "is too large a number"
        pa.array([value], type=known or kind)
    except (pa.ArrowException, OverflowError):
        return known, "holds a value that does not fit its column"
    return known or kind, None
