"""The local data of a node: `data.yaml` (which files, which columns), its check, and its split into training and hold-out rows.

Rows stay here. Nothing in this file logs a row; the texts of its errors and warnings are for the data owner, and under differential
privacy only an error's number leaves the node.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self
from unicodedata import normalize

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lichen.client.readers import BadRow, Reader, Row, TextRows, find_files, refuse, to_table
from lichen.common.errors import Code, LichenError
from lichen.common.private_files import write_private
from lichen.common.yaml_files import read_yaml

log = logging.getLogger(__name__)

Split = Literal["train", "holdout"]
MANIFEST = "data.yaml"
CACHE = "cache"
"""The folder of a home for what is computed of its rows, and can be again."""
FORMAT: Final = 1
_EVERYTHING = 2**64


class Source(BaseModel):
    """One entry of `data.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    path: str
    """A file, or a folder of files: JSONL, CSV, Parquet or text, told by suffix. A relative path starts at the node's home."""
    fields: dict[str, str] = Field(min_length=1)
    """Task field → column, for example `text: BODY`, `label: TOPIC`, `patient: PATIENT_ID`. Text files have `text` and `file`."""
    declared_size: int | None = Field(default=None, ge=1)
    """A public constant that stands for the number of training rows. The owner chooses it; lichen never derives it from the data."""
    holdout: float = Field(default=0.1, ge=0)
    """Rows kept for local evaluation: below 1 a share, from 1 a number."""
    text_rows: TextRows = "line"
    """What one row of a text file is."""
    watch: bool = False
    """Whether it is a folder that new files come to: `declared_size` is each file's then."""
    added_at: str
    """When the owner added it (ISO 8601)."""

    @field_validator("holdout")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a share below 1 or a whole number of rows")
        return value

    @model_validator(mode="after")
    def _files_are_apart(self) -> Self:
        if self.watch and self.holdout >= 1:
            raise ValueError("holdout of a watched folder must be a share below 1, so that no file moves another's rows")
        return self


class Manifest(BaseModel):
    """The document `data.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    holdout_key: str = Field(pattern="^[0-9a-f]{32}$")
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class LocalData:
    """Rows of one split, in the order of the sources.

    Attributes:
        rows: a ``pyarrow.Table`` with one column a field, memory-mapped where it came from a node home.
        declared_size: sum of the sources' declared sizes; None if one source has none, and for the hold-out.
    """

    rows: Any
    declared_size: int | None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.rows.column_names)

    def column(self, field: str) -> list[Any]:
        """All values of a field, as Python objects."""
        return list(self.rows.column(field).to_pylist())

    def take(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """The rows of a batch: for each field the values at ``indices``, in that order, repeats allowed."""
        # Value by value: Table.take would first join the chunks, that is, copy the mapped file into memory.
        return {name: [self.rows.column(name)[int(index)].as_py() for index in indices] for name in self.fields}


@dataclass(frozen=True)
class SourceReport:
    """What `lichen client data check` shows of a source. For the owner's eyes only: it is made of true counts.

    Attributes:
        path: as in `data.yaml`.
        kinds: the kinds of its files.
        files: how many files.
        train: usable rows to train on.
        holdout: usable rows held out.
        bad_rows: how many rows can't be used.
        bad: the first of them.
        bad_files: what is wrong with files that fail as a whole.
        labels: how often each value of the field ``label`` occurs, the most frequent first (without such a field: empty).
        characters: for each text field the shortest, median and longest length in characters.
        repeated: rows that equal an earlier one.
        declared_size: as in `data.yaml`.
        watch: as in `data.yaml`.
    """

    path: str
    kinds: tuple[str, ...]
    files: int
    train: int
    holdout: int
    bad_rows: int
    bad: tuple[BadRow, ...]
    bad_files: tuple[str, ...]
    labels: dict[str, int]
    characters: dict[str, tuple[int, int, int]]
    repeated: int
    declared_size: int | None
    watch: bool


@dataclass(frozen=True)
class DataReport:
    """All sources of a node; see :class:`SourceReport`."""

    sources: tuple[SourceReport, ...]

    @property
    def rows(self) -> int:
        """Usable rows."""
        return sum(source.train + source.holdout for source in self.sources)

    @property
    def usable(self) -> bool:
        """Whether :func:`load` would succeed: no bad row, no bad file, and something to train on."""
        return sum(source.train for source in self.sources) > 0 and not any(source.bad_rows or source.bad_files for source in self.sources)


def read_manifest(home: Path) -> Manifest:
    """Read `data.yaml`.

    Raises:
        LichenError: DATA_NOT_FOUND if the node has none yet; DATA_FORMAT if it can't be understood or is of a newer lichen.
    """
    path = home / MANIFEST
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "Add a source: lichen client data add FILE --field text=COLUMN"
        raise LichenError(Code.DATA_NOT_FOUND, "this node has no data yet", where=str(path), fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(Code.DATA_NOT_FOUND, f"can't be read: {error}", where=str(path)) from None
    except yaml.YAMLError as error:
        raise LichenError(Code.DATA_FORMAT, f"not YAML: {' '.join(str(error).split())}", where=str(path)) from None
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise LichenError(
            Code.DATA_FORMAT, f"format {version} is newer than this lichen's {FORMAT}", where=str(path), fix="Upgrade lichen."
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"])
        raise LichenError(Code.DATA_FORMAT, f"{key or 'the document'}: {detail['msg']}", where=str(path)) from None


def write_manifest(home: Path, manifest: Manifest, *, durable: bool = True) -> None:
    """Write `data.yaml`, whole or not at all, readable by its owner only (its key would tell which rows are held out).

    What was computed of the rows before goes: nothing of rows that the owner takes away may stay. It is on the disk when this returns,
    unless it need not be ``durable``.
    """
    document = manifest.model_dump(mode="json")
    for source in document["sources"]:
        if not source["watch"]:
            del source["watch"]  # an older lichen need not know of it
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    write_private(home / MANIFEST, text.encode(), durable=durable)
    shutil.rmtree(home / CACHE, ignore_errors=True)


def add_source(
    home: Path,
    path: Path,
    *,
    fields: Mapping[str, str],
    declared_size: int | None = None,
    holdout: float = 0.1,
    text_rows: TextRows = "line",
    watch: bool = False,
) -> Source:
    """Check a file or folder, and write it into `data.yaml`; the entry of a path that is there already is replaced.

    Args:
        home: the node's home.
        path: the data; a relative one starts at the working directory. Stored relative to the home if it lies in it.
        fields: task field → column.
        declared_size: the public constant for its number of training rows; needed under differential privacy.
        holdout: share (below 1) or number of rows kept for local evaluation.
        text_rows: what one row of a text file is.
        watch: whether it is a folder that new files come to; it may be empty, and ``declared_size`` is each file's.

    Raises:
        LichenError: DATA_NOT_FOUND, DATA_FORMAT, DATA_FIELD, DATA_ROW, DATA_EMPTY for the data; DATA_DECLARED_SIZE for a size below 1;
            DATA_FIELD for no fields or a bad ``holdout``. Then nothing is written.
    """
    if declared_size is not None and declared_size < 1:
        raise LichenError(Code.DATA_DECLARED_SIZE, f"declared size {declared_size} is below 1", fix="Give a public constant, such as 4096.")
    place = path.expanduser().resolve()
    if watch and place.exists() and not place.is_dir():
        raise LichenError(Code.DATA_NOT_FOUND, "not a folder, and no files come to a file", where=str(path), fix="Leave --watch out.")
    try:
        source = Source(
            path=_stored(home, path),
            fields=dict(fields),
            declared_size=declared_size,
            holdout=holdout,
            text_rows=text_rows,
            watch=watch,
            added_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        told = [".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")]
        raise LichenError(Code.DATA_FIELD, ": ".join(filter(None, told)), where=str(path)) from None
    manifest = read_manifest(home) if (home / MANIFEST).exists() else Manifest(holdout_key=secrets.token_hex(16))
    if not count_training(home, source, manifest.holdout_key) and not watch:
        raise LichenError(Code.DATA_EMPTY, "every row is held out", where=str(path), fix="Lower --holdout.")
    others = tuple(other for other in manifest.sources if other.path != source.path)
    write_manifest(home, manifest.model_copy(update={"sources": (*others, source)}))
    return source


def remove_source(home: Path, path: Path) -> None:
    """Take an entry out of `data.yaml`; the data stay where they are, and what was spent on them stays in the ledger.

    Args:
        home: the node's home.
        path: as it was added, or as `data.yaml` has it.

    Raises:
        LichenError: DATA_NOT_FOUND, if there is no such entry; as `read_manifest`.
    """
    manifest = read_manifest(home)
    kept = tuple(source for source in manifest.sources if source.path not in {str(path), _stored(home, path)})
    if len(kept) == len(manifest.sources):
        there = ", ".join(source.path for source in manifest.sources) or "none"
        raise LichenError(Code.DATA_NOT_FOUND, "no such entry", where=str(path), fix=f"{home / MANIFEST} has: {there}.")
    write_manifest(home, manifest.model_copy(update={"sources": kept}))


def _stored(home: Path, path: Path) -> str:
    """A path as `data.yaml` has it: relative to the home if it lies in it."""
    place, base = path.expanduser().resolve(), home.resolve()
    return str(place.relative_to(base)) if place.is_relative_to(base) else str(place)


def count_training(home: Path, source: Source, holdout_key: str) -> int:
    """A source's rows to train on, each checked. Raises as :class:`lichen.client.readers.Reader`."""
    return sum(side == "train" for side, _ in _sides(home, source, holdout_key))


def load(home: Path, split: Split, fields: Sequence[str], *, lenient: bool = False) -> LocalData:
    """The rows of one split. Strictly, one bad row is an error; else it is left out, and told in this node's log alone.

    Under privacy nothing else will do: an error that leaves the node tells of the row, and rows that one row takes with it are more than
    the one that ε is for. So there a row is used or left out for what it says itself, and all values are read as text.

    A row's side is told by a hash of its mapped fields under the node's own key: it stays the same when the data is exported again in
    another order or format, equal rows are on one side, and nobody without the key can tell it. With a share, a row's side does not
    depend on other rows, so add/remove of one row changes one split by that row. With a
    number, that row may push another over to training: training rows still change by one, the hold-out by a swap.

    Args:
        home: the node's home.
        split: ``train`` or ``holdout``.
        fields: the task fields to read; every source must map each of them.
        lenient: see above.

    Raises:
        LichenError: DATA_FIELD if a source does not map a field, or two sources hold different types; DATA_EMPTY if no row is left to
            train on (an empty hold-out is none); DATA_NOT_FOUND, DATA_FORMAT, DATA_ROW as the data is. If ``lenient`` neither DATA_ROW
            nor DATA_EMPTY.
    """
    import pyarrow as pa

    manifest = read_manifest(home)
    if not manifest.sources:
        raise LichenError(Code.DATA_EMPTY, "no sources", where=str(home / MANIFEST))
    tables: list[Any] = []
    for source in manifest.sources:
        _check_fields(source, fields)
        left_out = _LeftOut(source.path)
        reader = _reader(home, source, left_out if lenient else refuse, apart=lenient)
        rows: Iterator[Row] = (row for side, row in _sides(home, source, manifest.holdout_key, reader) if side == split)
        table = to_table(reader, rows, home)
        left_out.tell()
        if not table.num_rows and source.watch and not lenient:
            continue  # no row has a type yet
        tables.append(table.select(list(fields)))
        if tables[-1].schema != tables[0].schema:
            what = f"its types differ from those of {manifest.sources[0].path}: {_types(tables[-1])}, not {_types(tables[0])}"
            raise LichenError(Code.DATA_FIELD, what, where=source.path, fix="Export both alike.")
    table = pa.concat_tables(tables or [pa.schema([(field, pa.string()) for field in fields]).empty_table()])
    if split == "train" and table.num_rows == 0 and not lenient:
        raise LichenError(Code.DATA_EMPTY, "no rows to train on", where=str(home / MANIFEST))
    return LocalData(table, _declared(home, manifest) if split == "train" else None)


class Piece(NamedTuple):
    """What comes at once: a file of a watched folder, or any other source whole."""

    home: Path
    source: Source
    """Its path is the piece's."""
    of: str
    """The path of the source in `data.yaml`."""
    holdout_key: str

    def read(self, fields: Sequence[str], *, lenient: bool) -> tuple[list[tuple[Split, Row]], dict[str, Any]]:
        """Its rows with their sides, and the types of its fields, if it has rows; ``lenient`` and raises as `load`."""
        _check_fields(self.source, fields)
        reader = _reader(self.home, self.source, (lambda _: None) if lenient else refuse, apart=lenient)
        rows = list(_sides(self.home, self.source, self.holdout_key, reader))
        return rows, dict(zip(reader.schema.names, reader.schema.types, strict=True))

    def state(self) -> object:
        """What tells whether it has changed: how it is read, and path, size and time of change of each file."""
        return self.source.model_dump_json(), self._files()

    def changed(self) -> int:
        """When one of its files was changed last (Unix time, ns)."""
        return max((at for _, _, at in self._files()), default=0)

    def _files(self) -> tuple[tuple[str, int, int], ...]:
        # a file of a watched folder may have gone since it was listed
        return _state([self.home / self.source.path] if self.source.watch else _read_of(self.home, self.source))


def pieces(home: Path) -> Iterator[Piece]:
    """What this node's data consist of. Raises as `load`."""
    manifest = read_manifest(home)
    for source in manifest.sources:
        if not source.watch:
            yield Piece(home, source, source.path, manifest.holdout_key)
            continue
        for file in _read_of(home, source):
            yield Piece(home, source.model_copy(update={"path": str(file)}), source.path, manifest.holdout_key)


def declared_size(home: Path) -> int | None:
    """The sum of the sources' declared sizes; None if one source has none, or there is no data.

    Raises:
        LichenError: as `read_manifest`.
    """
    return _declared(home, read_manifest(home)) if (home / MANIFEST).exists() else None


def _declared(home: Path, manifest: Manifest) -> int | None:
    total = 0
    for source in manifest.sources:
        if source.declared_size is None:
            return None
        files = len(_read_of(home, source)) if source.watch else 1
        total += source.declared_size * max(1, files)
    return total


def _check_fields(source: Source, fields: Sequence[str]) -> None:
    if missing := [field for field in fields if field not in source.fields]:
        what = f"no column is mapped to {', '.join(map(repr, missing))}; mapped: {', '.join(source.fields)}"
        raise LichenError(Code.DATA_FIELD, what, where=source.path, fix=f"Add it again with --field {missing[0]}=COLUMN.")


def said(value: object) -> str:
    """What a value says: a text's words, whatever the white space between them and their Unicode form."""
    return " ".join(normalize("NFC", value).split()) if isinstance(value, str) else repr(value)


def fingerprints(key: bytes, kind: str, columns: Sequence[Sequence[Any]]) -> list[int]:
    """64 keyed bits of each record's content, for the ledger: the same wherever and however the record is stored.

    Values count by what they say (`said`). Two records that are taken for one share a history, which is on the safe side.

    Args:
        key: the ledger's secret.
        kind: of record, ``row`` or ``entity:FIELD``: a row that reads like an entity's name is not it.
        columns: one or more, of equal length; a record is what stands at one place of all of them.
    """
    start = hashlib.blake2b(key=key, digest_size=8, person=hashlib.blake2b(kind.encode(), digest_size=16).digest())
    found = []
    for values in zip(*columns, strict=True):
        digest = start.copy()
        for value in values:
            data = said(value).encode()
            digest.update(len(data).to_bytes(8, "big") + data)
        found.append(int.from_bytes(digest.digest(), "big", signed=True))
    return found


def stamp(home: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells whether the data has changed: path, size and time of change of the manifest and of every file that is read.

    Raises:
        LichenError: as :func:`read_manifest`; DATA_NOT_FOUND, DATA_FORMAT for a source.
    """
    return _state([home / MANIFEST, *(file for source in read_manifest(home).sources for file in _read_of(home, source))])


def _read_of(home: Path, source: Source) -> list[Path]:
    """The files of a source that are read."""
    return [file for file, _ in find_files(home / source.path, empty=True, others=source.watch)]


def _state(files: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for file in files:
        try:
            with suppress(FileNotFoundError):  # it may go meanwhile
                told = file.stat()
                found.append((str(file), told.st_size, told.st_mtime_ns))
        except OSError as error:
            raise LichenError(Code.DATA_NOT_FOUND, f"can't be looked at: {error}", where=str(file)) from None
    return tuple(found)


def check(home: Path, *, limit: int = 20) -> DataReport:
    """Read everything, and report instead of stopping at the first bad row or file. For the owner's eyes only.

    Args:
        home: the node's home.
        limit: how many bad rows of a source are listed; all are counted.

    Raises:
        LichenError: DATA_NOT_FOUND, DATA_FORMAT, DATA_EMPTY as :func:`load`, where a source has no file, or no row in any.
    """
    manifest = read_manifest(home)
    return DataReport(tuple(_report(home, source, manifest, limit) for source in manifest.sources))


def _report(home: Path, source: Source, manifest: Manifest, limit: int) -> SourceReport:
    bad: list[BadRow] = []
    bad_files: list[str] = []
    count = 0

    def note(row: BadRow) -> None:
        nonlocal count
        count += 1
        if len(bad) < limit:
            bad.append(row)

    reader = _reader(home, source, note, on_bad_file=lambda error: bad_files.append(str(error).replace("\n", " ")))
    sides: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {}
    seen: set[int] = set()
    repeated = 0
    for side, row in _sides(home, source, manifest.holdout_key, reader, on_bad_file=lambda _: None):
        sides[side] += 1
        if "label" in row:
            labels[str(row["label"])] += 1
        for field, value in row.items():
            if isinstance(value, str) and field != "label":
                lengths.setdefault(field, []).append(len(value))
        digest = _digest(row, b"")
        repeated += digest in seen
        seen.add(digest)
    return SourceReport(
        path=source.path,
        kinds=tuple(sorted({kind for _, kind in reader.files})),
        files=len(reader.files),
        train=sides["train"],
        holdout=sides["holdout"],
        bad_rows=count,
        bad=tuple(bad),
        bad_files=tuple(bad_files),
        labels=dict(labels.most_common()),
        characters={field: (min(found), sorted(found)[len(found) // 2], max(found)) for field, found in lengths.items()},
        repeated=repeated,
        declared_size=source.declared_size,
        watch=source.watch,
    )


class _LeftOut:
    """Counts the rows of a source that can't be used, for its owner's log."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0
        self._first = ""

    def __call__(self, bad: BadRow) -> None:
        self._count += 1
        self._first = self._first or f"{bad.file}, row {bad.row}: {bad.reason}"

    def tell(self) -> None:
        """Warn, if there were any."""
        if self._count:
            log.warning(
                "%s: %d rows can't be used and were left out, the first: %s (lichen client data check)",
                self._source,
                self._count,
                self._first,
            )


def _reader(
    home: Path,
    source: Source,
    on_bad: Callable[[BadRow], None] = refuse,
    *,
    apart: bool = False,
    on_bad_file: Callable[[LichenError], None] | None = None,
) -> Reader:
    return Reader(
        home / source.path,
        source.fields,
        text_rows=source.text_rows,
        on_bad=on_bad,
        apart=apart,
        empty=source.watch,
        on_bad_file=on_bad_file,
    )


def _sides(
    home: Path,
    source: Source,
    holdout_key: str,
    reader: Reader | None = None,
    on_bad_file: Callable[[LichenError], None] | None = None,
) -> Iterator[tuple[Split, Row]]:
    """Every usable row with its side. A number of held-out rows takes one pass more, to find the hash below which they lie."""
    key = bytes.fromhex(holdout_key)
    if source.holdout < 1:
        bound = int(source.holdout * _EVERYTHING)
    else:
        digests = sorted(_digest(row, key) for row in _reader(home, source, lambda _: None, on_bad_file=on_bad_file))
        bound = digests[int(source.holdout)] if int(source.holdout) < len(digests) else _EVERYTHING
    for row in reader or _reader(home, source):
        yield ("holdout" if _digest(row, key) < bound else "train"), row


def _digest(row: Row, key: bytes) -> int:
    """64 keyed bits of a row's content; numbers count as their text, so that CSV and JSONL exports agree."""
    digest = hashlib.blake2b(key=key, digest_size=8)
    for field in sorted(row):
        for part in (field, row[field] if isinstance(row[field], str) else repr(row[field])):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big")


def _types(table: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in table.schema)
