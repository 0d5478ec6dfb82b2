"""What a submitted plan is checked for, and the coordinator's own evaluation rows: read, checked, kept as Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.common.continual.stream import fields_of, rows_by_task
from lichen.common.errors import Code, LichenError
from lichen.common.model.base import PACKAGE, resolve_base
from lichen.common.plan import Plan

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_SHOWN = 5


def check_base(plan: Plan) -> None:
    """Refuse a plan whose base model is surely not on this machine; a hub name may still come from the hub.

    Raises:
        LichenError: MODEL_NOT_FOUND.
    """
    base = plan.model.base
    if base.startswith(PACKAGE):
        resolve_base(base)
    elif base.startswith(("/", "./", "../", "~")) and not (Path(base) / "config.json").is_file():
        raise LichenError(
            Code.MODEL_NOT_FOUND,
            f"there is no model at {base!r} on the coordinator's machine",
            where="model.base",
            fix="Give an absolute path that is right on the coordinator and on every node, a hub name, or package:DISTRIBUTION/PATH.",
        )


def keep_rows(source: Path, target: Path, plan: Plan, fields: Mapping[str, str]) -> int:
    """Read evaluation rows, check them against the plan and write them as Parquet; returns their number.

    Of a stream those of its tasks: others, which may bear labels that the plan does not have, are never scored.

    Args:
        source: JSONL, CSV or Parquet.
        target: the Parquet file to write.
        plan: its task says which fields are read and which labels there are.
        fields: from the plan's field names to the file's columns; a field that is not named is its own column.

    Raises:
        LichenError: DATA_NOT_FOUND, DATA_FORMAT, DATA_FIELD, DATA_ROW, DATA_LABEL, DATA_EMPTY.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = tuple(dict.fromkeys([*plan.task.fields, *fields_of(plan)]))
    if strangers := sorted(set(fields) - set(wanted)):
        raise LichenError(
            Code.DATA_FIELD, f"the plan has no field {strangers[0]!r}", where="--field", fix=f"Its fields: {', '.join(wanted)}."
        )
    table = _read(source)
    columns = {}
    for field in wanted:
        column = fields.get(field, field)
        if column not in table.column_names:
            raise LichenError(
                Code.DATA_FIELD,
                f"no column {column!r} for the field {field!r}; there are {', '.join(table.column_names)}",
                where=str(source),
                fix=f"Name it: --field {field}=COLUMN",
            )
        values = table.column(column)
        number = pa.types.is_floating(values.type)
        if pa.types.is_nested(values.type) or (number and field in plan.task.fields):
            raise LichenError(
                Code.DATA_FIELD,
                f"column {column!r} holds {values.type}, not text",
                where=str(source),
                fix=f"Write it as text, or name another column: --field {field}=COLUMN",
            )
        columns[field] = values if number else values.cast(pa.string())
    table = pa.table(columns)
    if not table.num_rows:
        raise LichenError(Code.DATA_EMPTY, "no rows", where=str(source))
    if stream := plan.continual.stream:
        kept, _ = rows_by_task(plan, len(stream) - 1, table.to_pydict())
        table = table.take(pa.array(kept, pa.int64()))
        if not table.num_rows:
            raise LichenError(
                Code.DATA_EMPTY,
                "no row is of any task",
                where=str(source),
                fix="Hold the labels, where and between of continual.stream against the values in the file.",
            )
    for field in plan.task.fields:
        if nulls := table.column(field).null_count:
            column = fields.get(field, field)
            raise LichenError(Code.DATA_ROW, f"{nulls} rows have no value in column {column!r}", where=str(source), fix="Mend the rows.")
    found = pc.unique(table.column(plan.task.label_field)).to_pylist() if plan.task.labels else []
    if unknown := sorted(set(found) - set(plan.task.labels)):
        raise LichenError(
            Code.DATA_LABEL,
            f"labels that the plan does not have: {', '.join(map(repr, unknown[:_SHOWN]))}",
            where=str(source),
            fix=f"The plan's labels: {', '.join(plan.task.labels)}.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return int(table.num_rows)


def _read(source: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    suffix = source.suffix.lower()
    if suffix not in _SUFFIXES:
        raise LichenError(Code.DATA_FORMAT, f"a file of kind {suffix!r}", where=str(source), fix=f"Use one of {', '.join(_SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            return pa.parquet.read_table(source)
        if suffix in {".csv", ".tsv"}:
            parse = pa.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            # all columns as text: a label `01` or `true` is a name, not a number
            names = pa.csv.open_csv(source, parse_options=parse).schema.names
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            return pa.csv.read_csv(source, parse_options=parse, convert_options=convert)
        return pa.json.read_json(source)
    except FileNotFoundError:
        raise LichenError(Code.DATA_NOT_FOUND, "no such file", where=str(source)) from None
    except (OSError, pa.ArrowException) as error:
        raise LichenError(Code.DATA_FORMAT, f"unreadable: {str(error).splitlines()[0][:200]}", where=str(source)) from None
