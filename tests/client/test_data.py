"""Local data: what is read, what is refused and how it is told, and which rows are held out."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.client import readers
from lichen.client.data import MANIFEST, add_source, check, load, read_manifest
from lichen.client.readers import Reader, read_path
from lichen.common.errors import Code, LichenError

FIELDS = {"text": "body", "label": "topic"}
ROWS = [{"body": f"text {number}, with a comma", "topic": "ab"[number % 2]} for number in range(200)]


def write(path: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    """Write rows by the path's suffix, with other tools than the readers'."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in {".csv", ".tsv"}:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def refused(code: Code, path: Path, fields: dict[str, str] = FIELDS) -> LichenError:
    with pytest.raises(LichenError) as caught:
        read_path(path, fields)
    assert caught.value.code is code
    assert path.name in caught.value.where
    return caught.value


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.tsv", "d.parquet"])
def test_each_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    table = read_path(write(tmp_path / name), FIELDS)
    assert table.to_pylist() == [{"text": row["body"], "label": row["topic"]} for row in ROWS]


def test_text_gives_a_row_a_line_or_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\ufefffirst\r\n\r\n second \n", encoding="utf-8")
    (tmp_path / "a.md").write_text("# one\n\ntwo\n", encoding="utf-8")
    fields = {"text": "text", "entity": "file"}
    assert read_path(tmp_path, fields).to_pylist() == [
        {"text": "# one", "entity": "a.md"},
        {"text": "two", "entity": "a.md"},
        {"text": "first", "entity": "b.txt"},
        {"text": " second ", "entity": "b.txt"},
    ]
    assert [row["text"] for row in Reader(tmp_path, fields, text_rows="document")] == ["# one\n\ntwo", "first\r\n\r\n second "]


def test_without_fields_every_column_keeps_its_name(tmp_path: Path) -> None:
    assert read_path(write(tmp_path / "d.jsonl"), {}).column_names == ["body", "topic"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0")).map("x{}".format), st.integers(-9, 9)),
        min_size=1,
        max_size=20,
    )
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_nothing_is_lost(tmp_path: Path, suffix: str, rows: list[tuple[str, int]]) -> None:
    wanted = [{"body": text, "topic": number} for text, number in rows]
    table = read_path(write(tmp_path / f"d{suffix}", wanted), FIELDS)  # type: ignore[arg-type]
    assert table.column("text").to_pylist() == [text for text, _ in rows]
    assert [int(value) for value in table.column("label").to_pylist()] == [number for _, number in rows]


def test_csv_keeps_quoted_line_breaks_and_tells_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfbody,topic\r\n"two\r\nlines, ""quoted""",a\r\n\r\none\r\n')
    bad: list[readers.BadRow] = []
    rows = list(Reader(path, FIELDS, on_bad=bad.append))
    assert rows == [{"text": 'two\r\nlines, "quoted"', "label": "a"}]
    assert [(row.row, row.reason) for row in bad] == [(5, "has 1 cells where the header has 2")]


BAD = {
    "null": (b'{"body": null, "topic": "a"}', "'body' is null"),
    "missing key": (b'{"topic": "a"}', "has no 'body'"),
    "empty text": (b'{"body": " ", "topic": "a"}', "'body' is empty"),
    "broken UTF-8": (b'{"body": "\xff\xfe", "topic": "a"}', "'body' holds bytes that are not UTF-8"),
    "lone surrogate": (b'{"body": "\\ud83d", "topic": "a"}', "'body' holds bytes that are not UTF-8"),
    "NUL": (b'{"body": "a\\u0000b", "topic": "a"}', "'body' holds a NUL character"),
    "no object": (b"[1, 2]", "is not a JSON object"),
    "no JSON": (b'{"body": ', "is not JSON: Expecting value at character 11"),
    "NaN": (b'{"body": NaN, "topic": "a"}', "is not JSON: NaN, a number too long, or nested too deeply"),
    "deep": (b'{"body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON: NaN, a number too long, or nested too deeply"),
    "infinite": (b'{"body": 1e999, "topic": "a"}', "'body' is not a finite number"),
    "other type": (b'{"body": 5, "topic": "a"}', "'body' holds int64 where the first row holds string"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_by_file_row_and_reason_and_hides_no_other(tmp_path: Path, name: str) -> None:
    line, reason = BAD[name]
    good = b'{"body": "secret words", "topic": "a"}\n'
    path = tmp_path / "d.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    error = refused(Code.DATA_ROW, path)
    assert error.where == f"{path}, row 3"
    assert error.what == reason
    assert "secret" not in str(error)
    bad: list[readers.BadRow] = []
    assert len(list(Reader(path, FIELDS, on_bad=bad.append))) == 2
    assert [(row.row, row.reason) for row in bad] == [(3, reason)]


def test_a_huge_line_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_CHARACTERS", 1000)
    good = '{"body": "x", "topic": "a"}\n'
    path = tmp_path / "d.jsonl"
    path.write_text(good + '{"body": "' + "x" * 5000 + '"}\n' + good)
    bad: list[readers.BadRow] = []
    assert len(list(Reader(path, FIELDS, on_bad=bad.append))) == 2
    assert bad[0].row == 2
    path = tmp_path / "d.csv"
    path.write_text("body,topic\nx,a\n" + "y" * 5000 + ",a\nz,a\n")
    assert "the rest of the file was not read" in refused(Code.DATA_ROW, path).what


def test_an_open_quote_is_told_not_swallowed(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('body,topic\nx,a\n"y,a\nz,a\n')
    error = refused(Code.DATA_ROW, path)
    assert error.where.endswith("row 3")
    assert "is not CSV" in error.what


def test_a_broken_byte_in_parquet_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"body": text, "topic": ["a", "b", "a"]}), tmp_path / "d.parquet")
    assert refused(Code.DATA_ROW, tmp_path / "d.parquet").where.endswith("row 2")


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("d.jsonl", b"", Code.DATA_EMPTY, "empty"),
        ("d.jsonl", b"\n\n", Code.DATA_EMPTY, "no rows"),
        ("d.csv", b"body,topic\n", Code.DATA_EMPTY, "no rows"),
        ("d.csv", b"text,topic\nx,a\n", Code.DATA_FIELD, "no column 'body' for the field 'text'; columns: text, topic"),
        ("d.csv", b"body,body\nx,a\n", Code.DATA_FIELD, "twice"),
        ("d.csv", "\ufeffbody,topic\nx,a\n".encode("utf-16"), Code.DATA_FORMAT, "UTF-16"),
        ("d.csv", b"\x1f\x8b\x08\x00", Code.DATA_FORMAT, "compressed"),
        ("d.csv", b"PAR1....", Code.DATA_FORMAT, "Parquet"),
        ("d.parquet", b"PAR1 but no more of it PAR1", Code.DATA_FORMAT, "not a whole Parquet file"),
        ("d.json", b"[]", Code.DATA_FORMAT, "'.json'"),
        ("d", b"x", Code.DATA_FORMAT, "no suffix"),
    ],
)
def test_files_that_fail_as_a_whole(tmp_path: Path, name: str, data: bytes, code: Code, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert words in refused(code, tmp_path / name).what


def test_absent_unreadable_and_odd_folders(tmp_path: Path) -> None:
    refused(Code.DATA_NOT_FOUND, tmp_path / "nowhere.csv")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(Code.DATA_EMPTY, folder)
    write(folder / "a.jsonl", ROWS[:3])
    (folder / "_SUCCESS").touch()
    (folder / ".hidden").touch()
    assert read_path(folder, FIELDS).num_rows == 3
    (folder / "notes.docx").touch()
    with pytest.raises(LichenError, match=r"notes\.docx"):
        read_path(folder, FIELDS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv")
    path.chmod(0)
    refused(Code.DATA_NOT_FOUND, path)


def test_add_check_and_load(tmp_path: Path) -> None:
    home = tmp_path / "home"
    source = add_source(home, write(tmp_path / "d.jsonl"), fields=FIELDS, declared_size=256, holdout=0.2)
    assert Path(source.path) == tmp_path / "d.jsonl"
    assert (home / MANIFEST).stat().st_mode & 0o777 == 0o600
    train, held = load(home, "train", ("text", "label")), load(home, "holdout", ("text", "label"))
    assert len(train) + len(held) == 200
    assert 20 <= len(held) <= 60
    assert set(train.column("text")).isdisjoint(held.column("text"))
    assert (train.declared_size, held.declared_size) == (256, None)
    assert train.take([3, 3, 0])["text"] == [train.column("text")[index] for index in (3, 3, 0)]
    assert load(home, "train", ("label",)).fields == ("label",)
    report = check(home)
    assert report.usable
    assert report.rows == 200
    assert (report.sources[0].train, report.sources[0].holdout, report.sources[0].labels) == (len(train), len(held), {"a": 100, "b": 100})
    assert sorted(path.name for path in home.iterdir()) == [MANIFEST]  # no copy of the rows stays behind


def test_a_row_keeps_its_side_when_it_is_exported_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    numbered = [{"body": row["body"], "topic": index % 3} for index, row in enumerate(ROWS)]
    add_source(home, write(tmp_path / "d.jsonl", numbered), fields=FIELDS)  # type: ignore[arg-type]
    before = set(load(home, "holdout", ("text",)).column("text"))
    add_source(home, write(tmp_path / "e.csv", [*numbered[::-1], {"body": "new", "topic": 1}]), fields=FIELDS)  # type: ignore[arg-type]
    manifest = yaml.safe_load((home / MANIFEST).read_text())
    manifest["sources"] = manifest["sources"][1:]
    (home / MANIFEST).write_text(yaml.safe_dump(manifest))
    assert set(load(home, "holdout", ("text",)).column("text")) - {"new"} == before
    other = tmp_path / "other"
    add_source(other, tmp_path / "d.jsonl", fields=FIELDS)
    assert set(load(other, "holdout", ("text",)).column("text")) != before  # another node's key


def test_a_number_of_rows_can_be_held_out(tmp_path: Path) -> None:
    add_source(tmp_path, write(tmp_path / "d.jsonl"), fields=FIELDS, holdout=17)
    assert len(load(tmp_path, "holdout", ("text",))) == 17
    assert len(load(tmp_path, "train", ("text",))) == 183
    add_source(tmp_path, tmp_path / "d.jsonl", fields=FIELDS, holdout=0)
    assert len(read_manifest(tmp_path).sources) == 1
    assert len(load(tmp_path, "holdout", ("text", "label"))) == 0
    for bad in (200, 1.5, -1):
        with pytest.raises(LichenError):
            add_source(tmp_path, tmp_path / "d.jsonl", fields=FIELDS, holdout=bad)
    assert read_manifest(tmp_path).sources[0].holdout == 0


def test_nothing_is_written_for_bad_data(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("body,topic\nx\n")
    with pytest.raises(LichenError, match=r"data-row"):
        add_source(tmp_path, path, fields=FIELDS)
    with pytest.raises(LichenError, match=r"data-declared-size"):
        add_source(tmp_path, write(path), fields=FIELDS, declared_size=0)
    with pytest.raises(LichenError, match=r"data-field"):
        add_source(tmp_path, path, fields={})
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(LichenError, match=r"this node has no data yet"):
        load(tmp_path, "train", ("text",))


def test_sources_add_up(tmp_path: Path) -> None:
    add_source(tmp_path, write(tmp_path / "d.jsonl"), fields=FIELDS, declared_size=128, holdout=0)
    add_source(tmp_path, write(tmp_path / "e.parquet", ROWS[:50]), fields=FIELDS, declared_size=64, holdout=0)
    data = load(tmp_path, "train", ("text", "label"))
    assert (len(data), data.declared_size) == (250, 192)
    add_source(tmp_path, write(tmp_path / "f.csv", ROWS[:5]), fields=FIELDS, holdout=0)
    assert load(tmp_path, "train", ("text",)).declared_size is None  # one did not declare
    with pytest.raises(LichenError, match=r"no column is mapped to 'entity'"):
        load(tmp_path, "train", ("entity",))
    add_source(tmp_path, write(tmp_path / "g.jsonl", [{"body": "x", "topic": 1}]), fields=FIELDS, holdout=0)
    with pytest.raises(LichenError, match=r"label int64, not label string"):
        load(tmp_path, "train", ("label",))


def test_check_goes_on_after_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "z", "label": "a"}\n')
    add_source(tmp_path, folder, fields={"text": "text", "label": "label"}, holdout=1)
    (folder / "a.csv").write_text("")
    (folder / "c.parquet").write_bytes(b"PAR1 and no more")
    (folder / "d.csv").write_text("text,other\nx,y\n")
    (folder / "e.csv").write_text("text,label\ny,b\n")
    report = check(tmp_path)
    (source,) = report.sources
    assert not report.usable
    assert (source.files, source.train + source.holdout) == (5, 3)
    assert [any(name in told for told in source.bad_files) for name in ("a.csv", "c.parquet")] == [True, True]
    assert Path(source.bad[0].file).name == "d.csv"


def test_check_lists_bad_rows_up_to_a_limit_and_counts_all(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl")
    add_source(tmp_path, path, fields=FIELDS, holdout=10)
    with path.open("a") as file:
        file.write("{}\n" * 50 + json.dumps(ROWS[0]) + "\n")
    source = check(tmp_path, limit=7).sources[0]
    assert (source.bad_rows, len(source.bad), source.bad[0].row) == (50, 7, 201)
    assert (source.train + source.holdout, source.repeated) == (201, 1)
    assert not check(tmp_path).usable
    with pytest.raises(LichenError, match=r"row 201"):
        load(tmp_path, "train", ("text",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format: 2\n", "newer"),
        ("sources: []\n", "holdout_key"),
        ("- 1\n", "the document"),
        ("a: [\n", "not YAML"),
        ("sources: []\nsources: []\n", "'sources' is given twice"),
        (f"holdout_key: {'a' * 32}\nsources: [{{path: x, fields: {{text: t}}, added_at: '', size: 3}}]\n", r"sources\.0\.size"),
    ],
)
def test_a_bad_manifest_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(LichenError, match=words) as caught:
        load(tmp_path, "train", ("text",))
    assert caught.value.code is Code.DATA_FORMAT


def test_what_is_told_of_a_manifest_that_is_not_yaml_shows_none_of_it(tmp_path: Path) -> None:
    """Such an error may reach the coordinator, and the key tells which rows are held out."""
    for text in ("holdout_key: 5ec7e7\nholdout_key: 5ec7e7\n", "holdout_key: 5ec7e7: [\n"):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(LichenError, match="not YAML") as caught:
            load(tmp_path, "train", ("text",))
        assert "line" in caught.value.what
        assert "5ec7e7" not in str(caught.value)


def test_rows_are_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        add_source(tmp_path, write(tmp_path / "d.jsonl"), fields=FIELDS)
        load(tmp_path, "train", ("text", "label"))
        check(tmp_path)
    assert "text" not in caplog.text


def test_lists_of_tokens_pass(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"tokens": ["a", "b"], "tags": [0, 1]}, {"tokens": ["c"], "tags": [2]}]
    table = read_path(write(tmp_path / "d.jsonl", rows), {"tokens": "tokens", "tags": "tags"})
    assert table.to_pylist() == rows
    refused(Code.DATA_ROW, write(tmp_path / "e.jsonl", [*rows, {"tokens": [3], "tags": [2]}]), {"tokens": "tokens"})
    refused(Code.DATA_ROW, write(tmp_path / "f.jsonl", [*rows, {"tokens": [], "tags": [2]}]), {"tokens": "tokens"})


# --- rows by themselves ---------------------------------------------------------------------------------------------------------


def apart(path: Path, fields: dict[str, str] = FIELDS, **more: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """Usable rows, and the numbers of the others, where each is judged by itself."""
    bad: list[int] = []
    rows = list(Reader(path, fields, on_bad=lambda row: bad.append(row.row), apart=True, **more))
    return rows, bad


@pytest.mark.parametrize("first", [{"body": 5, "topic": "a"}, {"topic": "a"}, {"body": None, "topic": "a"}, {"body": ["x"], "topic": "a"}])
def test_by_itself_no_row_decides_over_others(tmp_path: Path, first: dict[str, Any]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *ROWS]))
    rows, bad = apart(path)
    assert rows[-len(ROWS) :] == [{"text": row["body"], "label": row["topic"]} for row in ROWS]
    assert rows[: -len(ROWS)] == ([{"text": "5", "label": "a"}] if first.get("body") == 5 else [])
    assert bad == ([] if first.get("body") == 5 else [1])


def test_by_themselves_all_kinds_agree(tmp_path: Path) -> None:
    typed = [{"body": f"t{n}", "topic": n} for n in range(5)]
    read = [apart(write(tmp_path / name, typed)) for name in ("d.jsonl", "d.csv", "d.parquet")]
    assert read == [([{"text": f"t{n}", "label": str(n)} for n in range(5)], [])] * 3


def test_by_itself_a_ragged_row_is_left_out_and_an_open_quote_is_the_files_fault(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('body,topic\nx,a\ny\nz,b\n"p"q,a\nr,a\n')
    assert apart(path) == ([{"text": text, "label": label} for text, label in ("xa", "zb", "ra")], [3, 5])
    path.write_text('body,topic\nx,a\n"y,a\nz,a\n')
    with pytest.raises(LichenError) as caught:
        apart(path)
    assert caught.value.code is Code.DATA_FORMAT
    path.write_text("body,other\nx,a\n")
    with pytest.raises(LichenError) as caught:
        apart(path)
    assert caught.value.code is Code.DATA_FIELD, "a header is the file's"


def test_by_themselves_no_rows_are_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    assert apart(folder, {"text": "text"}, text_rows="document") == ([], [])
    for name in ("empty.jsonl", "empty.csv", "empty.txt"):
        (tmp_path / name).write_text("")
        assert apart(tmp_path / name) == ([], [])
    (tmp_path / "header.csv").write_text("body,topic\n")
    assert apart(tmp_path / "header.csv") == ([], [])


def test_where_a_file_is_a_row_its_faults_are_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes("UTF-16".encode("utf-16"))
    (folder / "c.txt").write_text("")
    rows, bad = apart(folder, {"text": "text"}, text_rows="document")
    assert (rows, bad) == ([{"text": "good"}], [1])
    with pytest.raises(LichenError) as caught:
        apart(folder, {"text": "text"})
    assert caught.value.code is Code.DATA_FORMAT
