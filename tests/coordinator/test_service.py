"""The parts of the service on their own: home and certificate, the operators' door, submissions, backups."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cryptography import x509
from safetensors import SafetensorError

from lichen.common import pki
from lichen.common.channel.spool import Spool
from lichen.common.disk import disk_failed
from lichen.common.errors import Code, LichenError
from lichen.common.invite import Invite
from lichen.common.plan import Plan, digest_of, parse_plan
from lichen.common.result import read_result
from lichen.coordinator.admin import AdminServer, ask, served
from lichen.coordinator.backup import restore_backup, write_backup
from lichen.coordinator.export import export_model
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.home import Home, Runtime
from lichen.coordinator.models import ModelService
from lichen.coordinator.operations import NotServedError, Operations, find_run
from lichen.coordinator.runs import Runner
from lichen.coordinator.submission import check_base, keep_rows


def refused(code: Code, call: Callable[..., object], *args: object, **more: object) -> LichenError:
    with pytest.raises(LichenError) as caught:
        call(*args, **more)
    assert caught.value.code is code, str(caught.value)
    return caught.value


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", ["fl.example.org", "10.0.0.5"])


PLAN = {
    "rounds": 2,
    "task": {"labels": ["good", "bad"], "text_field": "text", "label_field": "label"},
    "model": {"base": "hub/name"},
    "local": {"steps": 1},
}


@pytest.fixture
def plan() -> Plan:
    return parse_plan(PLAN)


# --- home ---


def test_a_home_is_private_and_made_once(home: Home) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home.path, *home.path.rglob("*"))}
    assert {modes[name] for name in ("config.yaml", "ca.key", "server.pem", "store.sqlite")} == {0o600}
    assert modes["home"] == 0o700
    assert (home.config.bind, Home.create(home.path.parent / "b", ["localhost"]).config.bind) == ("0.0.0.0", "127.0.0.1")
    refused(Code.OUTPUT_EXISTS, Home.create, home.path, ["localhost"])
    refused(Code.CERTIFICATE_INVALID, Home.create, home.path.parent / "c", ["no host!"])
    refused(Code.HOME_MISSING, Home, home.path.parent / "c")
    assert not (home.path.parent / "c").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("format: 2\n", Code.STORE_VERSION),
        ("format: 1\nhost: a\n", Code.HOME_MISSING),
        ("hosts: [a]\nbind: a\nbind: b\nfleet_port: 1\nenrolment_port: 2\n", Code.HOME_MISSING),
        ("[", Code.HOME_MISSING),
        ("", Code.HOME_MISSING),
    ],
)
def test_a_configuration_that_cannot_be_understood(home: Home, text: str, code: Code) -> None:
    (home.path / "config.yaml").write_text(text, encoding="utf-8")
    refused(code, Home, home.path)


def hosts(certificate: bytes) -> set[str]:
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def test_the_server_certificate_is_kept_until_it_is_due_or_the_hosts_change(home: Home) -> None:
    authority, now = home.authority(), time.time()
    first = home.server_certificate(authority)
    assert hosts(first[1]) == {"fl.example.org", "10.0.0.5", "localhost", "127.0.0.1"}
    assert home.server_certificate(authority, now + 0.6 * pki.SERVER_DAYS * 86400) == first
    late = home.server_certificate(authority, now + 0.7 * pki.SERVER_DAYS * 86400)
    assert late != first
    config = yaml.safe_load((home.path / "config.yaml").read_text())
    (home.path / "config.yaml").write_text(yaml.safe_dump(config | {"hosts": ["new.example.org", "::1"]}))
    changed = Home(home.path)
    second = changed.server_certificate(authority, now)
    assert hosts(second[1]) == {"new.example.org", "::1", "localhost", "127.0.0.1"}
    assert changed.server_certificate(authority, now) == second
    assert changed.reached_at(1, 2).fleet == "new.example.org:1"
    (home.path / "config.yaml").write_text(yaml.safe_dump(config | {"fleet_address": "gate.example.org:443"}))
    assert Home(home.path).advertised() == Runtime("gate.example.org:443", "fl.example.org:7444")
    (home.path / "pki" / "server.pem").unlink()
    assert home.server_certificate(authority)[1] != second[1]
    (home.path / "pki" / "server.pem").chmod(0o644)
    refused(Code.KEY_EXPOSED, home.server_certificate, authority)


def test_one_service_a_home(home: Home) -> None:
    with home.lock():
        with pytest.raises(LichenError) as caught, home.lock():
            pass
        assert caught.value.code is Code.HOME_IN_USE
    with home.lock():
        pass


def test_nothing_loads_torch_before_a_run() -> None:
    code = (
        "import sys; import lichen.coordinator.cli, lichen.coordinator.service, lichen.coordinator.watch;"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'pandas', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- the runner ---


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_runs_wait_for_the_disk_one_after_the_other(home: Home) -> None:
    plan = parse_plan(PLAN | {"model": {"base": "/no/such/model"}})
    with closing(home.open_store()) as store:
        for run_id in (1, 2, 3):
            (home.runs / str(run_id)).mkdir()
            store.add_run(run_id, plan.canonical_json(), str(run_id))
            if run_id < 3:
                (home.runs / str(run_id) / "plan.yaml.tmp").symlink_to("/dev/full")
        runner = Runner(store, FleetServer(store, Spool(home.spool)), home.runs, retry_s=0.2)
        runner.start()
        until(lambda: store.run(1).error)
        assert (store.run(1).status, store.run(2).status) == ("running", "queued")
        assert "No space left" in str(store.run(1).error)
        assert runner.stop(1) == "stopped"
        until(lambda: store.run(2).error)
        (home.runs / "2" / "plan.yaml.tmp").unlink()  # there is space again
        until(lambda: store.run(3).status == "failed")
        assert "error 30 (model-not-found)" in str(store.run(2).error)
        assert runner.stop(3) == "failed"
        refused(Code.RUN_UNKNOWN, runner.stop, 4)
        until(lambda: runner.current is None)
        assert runner.close()


def test_a_run_that_an_older_lichen_began_goes_on(home: Home, older_text: Callable[[Plan], str]) -> None:
    plan = parse_plan(PLAN | {"model": {"base": "/no/such/model"}})
    text, directory = older_text(plan), home.runs / "1"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "plan.yaml").write_text(yaml.safe_dump(json.loads(text)))
    (directory / "checkpoints" / "plan.sha256").write_text(digest_of(text))
    with closing(home.open_store()) as store:
        store.add_run(1, text, "1")
        store.set_run_status(1, "running")
        runner = Runner(store, FleetServer(store, Spool(home.spool)), home.runs)
        runner.start()
        until(lambda: store.run(1).status == "failed")
        assert "error 30 (model-not-found)" in str(store.run(1).error), "and not that it holds a run of another plan"
        assert read_result(directory).plan_sha256 == digest_of(text)
        assert runner.close()


# --- operations without a service ---


def test_operations_on_a_home_at_rest(home: Home) -> None:
    with closing(home.open_store()) as store:
        offline = Operations(home, store, None)
        told = Invite.decode(offline.invite("clinic-a", 2)["invite"])
        assert (told.name, told.fleet, told.enrolment) == ("clinic-a", "fl.example.org:7443", "fl.example.org:7444")
        assert 7100 < told.expires_at - time.time() < 7300
        store.add_node("clinic-a", "f")
        store.note_certificate("clinic-a", 0.0)
        node = offline.nodes()[0]
        assert (node["connected"], node["last_seen"], node["certificate_ends"]) == (None, None, "1970-01-01T00:00:00+00:00")
        assert offline.revoke("clinic-a")["active"] is False
        for call in (lambda: offline.submit(PLAN), lambda: offline.stop("1"), offline.status):
            assert isinstance(refused(Code.SERVICE_UNREACHABLE, call), NotServedError)
        assert offline.runs() == []
        assert set(offline.remote_calls()) == {"status", "invite", "nodes", "revoke", "submit", "runs", "run", "stop"}


def test_ports_that_are_not_known_yet(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", ["127.0.0.1"], fleet_port=0, enrolment_port=0)
    with closing(home.open_store()) as store:
        refused(Code.SERVICE_UNREACHABLE, Operations(home, store, None).invite, "a", 1)


def test_a_run_is_found_by_a_beginning_of_its_id(home: Home, plan: Plan) -> None:
    with closing(home.open_store()) as store:
        refused(Code.RUN_UNKNOWN, find_run, store, "latest")
        for run_id in (12, 123, 45):
            store.add_run(run_id, plan.canonical_json(), str(run_id))
        assert [find_run(store, text).run_id for text in ("12", "123", "4", "latest")] == [12, 123, 45, 45]
        for text in ("1", "9", ""):
            refused(Code.RUN_UNKNOWN, find_run, store, text)
        assert Operations(home, store, None).run("45")["status"] == "queued"


def test_a_plan_that_a_later_lichen_refuses_takes_no_other_run_along(home: Home, plan: Plan) -> None:
    broken = plan.model_dump(mode="json")
    broken["privacy"]["clip"] = 1e-30
    directory = home.runs / "2"
    (directory / "versions").mkdir(parents=True)
    (directory / "plan.yaml").write_text(yaml.safe_dump(broken))
    with closing(home.open_store()) as store:
        store.add_run(1, plan.canonical_json(), "1")
        store.set_run_status(1, "finished")
        store.add_run(2, json.dumps(broken), "2")
        store.set_run_status(2, "stopped")
        assert [run["rounds"] for run in Operations(home, store, None).runs()] == [plan.rounds] * 2
        assert ModelService(store, home.runs)._with_model(0).run_id == 1


# --- the operators' door ---


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Serve calls on a socket; returns its path."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []

    def serve(calls: dict[str, Callable[..., Any]], directory: Path = tmp_path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        server = AdminServer(directory / "admin.sock", calls)
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        servers.append(server)
        return directory / "admin.sock"

    yield serve
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def fail(error: Exception) -> Callable[..., None]:
    def call(**_: object) -> None:
        raise error

    return call


def test_the_door_answers_its_owner_only(door: Callable[..., Path]) -> None:
    path = door(
        {"echo": lambda **values: values, "no": fail(LichenError(Code.NAME_TAKEN, "what", where="w", fix="f")), "bug": fail(KeyError(1))}
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert served(path)
    assert ask(path, "echo", {"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}
    error = refused(Code.NAME_TAKEN, ask, path, "no")
    assert (error.what, error.where, error.fix) == ("what", "w", "f")
    assert "KeyError" in refused(Code.INTERNAL, ask, path, "bug").what
    refused(Code.FRAME_INVALID, ask, path, "other")
    refused(Code.INTERNAL, ask, door({"none": lambda: None}, path.parent / "b"), "none", {"unexpected": 1})


@pytest.mark.parametrize("line", [b"\n", b"no json\n", b"[]\n", b'{"format": 1}\n', b'{"format": 2, "call": "echo", "arguments": {}}\n'])
def test_the_door_survives_nonsense(door: Callable[..., Path], line: bytes) -> None:
    path = door({"echo": lambda **values: values})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(line)
        answer = json.loads(connection.makefile().readline())
    assert answer["error"]["code"] in {Code.FRAME_INVALID, Code.PROTOCOL_VERSION}
    assert ask(path, "echo", {"a": 1}) == {"a": 1}


def test_the_door_of_a_home_with_a_long_path(door: Callable[..., Path], tmp_path: Path) -> None:
    path = door({"echo": lambda **values: values}, tmp_path / ("d" * 80) / ("e" * 80))
    assert ask(path, "echo", {"a": 1}) == {"a": 1}


def test_nobody_behind_the_door(tmp_path: Path) -> None:
    assert isinstance(refused(Code.SERVICE_UNREACHABLE, ask, tmp_path / "admin.sock", "status"), NotServedError)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "admin.sock"))  # as a killed service leaves it
    assert not served(tmp_path / "admin.sock")
    assert isinstance(refused(Code.SERVICE_UNREACHABLE, ask, tmp_path / "admin.sock", "status"), NotServedError)


# --- submissions ---

ROWS = [{"text": 'a, "b"\nc', "label": "good"}, {"text": "", "label": "bad"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        quoted = [mark.join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
        path.write_text("\n".join([mark.join(rows[0]), *quoted]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_rows_of_each_kind(tmp_path: Path, plan: Plan, suffix: str) -> None:
    renamed = [{"id": 7, "body": row["text"], "label": row["label"]} for row in ROWS]
    source = write(tmp_path / f"rows{suffix}", renamed)
    assert keep_rows(source, tmp_path / "out" / "test.parquet", plan, {"text": "body"}) == 2
    assert pq.read_table(tmp_path / "out" / "test.parquet").to_pylist() == ROWS


def test_labels_that_look_like_numbers(tmp_path: Path) -> None:
    plan = parse_plan(PLAN | {"task": {"labels": ["01", "true"]}})
    source = write(tmp_path / "rows.csv", [{"text": "a", "label": "01"}, {"text": "b", "label": "true"}])
    assert keep_rows(source, tmp_path / "out.parquet", plan, {}) == 2
    numbers = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}])
    assert keep_rows(numbers, tmp_path / "out.parquet", parse_plan(PLAN | {"task": {"labels": ["0", "1"]}}), {}) == 1


def test_rows_keep_what_deals_them_to_tasks_and_a_language_model_needs_no_label(tmp_path: Path) -> None:
    stream = {"stream": [{"name": "x", "where": {"site": ["a"]}}, {"name": "y", "between": {"year": [1900, 2000]}}]}
    document = PLAN | {"task": {"kind": "causal-lm"}, "rounds": 2, "continual": stream}
    rows = [{"text": text, "place": place, "year": year} for text, place, year in (("a", "a", 1850), ("b", "b", 1850), ("c", "c", 1950))]
    source = write(tmp_path / "rows.jsonl", rows)
    assert keep_rows(source, tmp_path / "out.parquet", parse_plan(document), {"site": "place"}) == 2
    kept = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert kept == [{"text": "a", "site": "a", "year": "1850"}, {"text": "c", "site": "c", "year": "1950"}], "b is of no task"
    with pytest.raises(LichenError, match="no column 'year'"):
        keep_rows(write(tmp_path / "less.jsonl", [{"text": "a", "site": "a"}]), tmp_path / "out.parquet", parse_plan(document), {})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_no_task_are_left_out_before_anything_of_them_is_looked_at(tmp_path: Path, suffix: str) -> None:
    stream = {"stream": [{"name": "early", "between": {"time": [0.0, 1.5]}}, {"name": "bad", "labels": ["bad"]}]}
    plan, out = parse_plan(PLAN | {"continual": stream}), tmp_path / "out.parquet"
    rows = [("a", "good", 0.25), ("b", "ugly", 1.5), ("c", "bad", 7.0), ("d", "good", 1e300)]
    source = write(tmp_path / f"rows{suffix}", [dict(zip(("text", "label", "time"), row, strict=True)) for row in rows])
    assert keep_rows(source, out, plan, {}) == 2
    kept = pq.read_table(out).to_pylist()
    assert [(row["text"], row["label"], float(row["time"])) for row in kept] == [("a", "good", 0.25), ("c", "bad", 7.0)]
    late = write(tmp_path / f"late{suffix}", [{"text": "b", "label": "good", "time": 1.5}])
    assert "between" in refused(Code.DATA_EMPTY, keep_rows, late, out, plan, {}).fix
    ugly = write(tmp_path / f"ugly{suffix}", [{"text": "b", "label": "ugly", "time": 0.5}])
    assert "'ugly'" in refused(Code.DATA_LABEL, keep_rows, ugly, out, plan, {}).what


def test_a_row_without_what_tells_its_task_is_of_none(tmp_path: Path) -> None:
    plan = parse_plan(
        PLAN | {"continual": {"stream": [{"name": name, "between": {"time": span}} for name, span in (("x", [0, 1]), ("y", [1, 2]))]}}
    )
    rows = [
        {"text": "a", "label": "good", "time": 0.5},
        {"text": None, "label": "bad", "time": None},
        {"text": "c", "label": "bad", "time": 1.0},
    ]
    assert keep_rows(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.parquet", plan, {}) == 2
    rows[2]["text"] = None
    assert "1 rows" in refused(Code.DATA_ROW, keep_rows, write(tmp_path / "rows.jsonl", rows), tmp_path / "out.parquet", plan, {}).what


def test_rows_that_will_not_do(tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out.parquet"

    def told(code: Code, rows: list[dict[str, Any]], name: str = "rows.jsonl", **fields: str) -> str:
        return refused(code, keep_rows, write(tmp_path / name, rows), out, plan, fields).what

    assert "there are body, label" in told(Code.DATA_FIELD, [{"body": "a", "label": "good"}])
    assert "1 rows" in told(Code.DATA_ROW, [{"text": "a", "label": "good"}, {"text": None, "label": "bad"}])
    assert "'ugly'" in told(Code.DATA_LABEL, [{"text": "a", "label": "ugly"}])
    told(Code.DATA_FIELD, [{"text": ["a"], "label": "good"}])
    numbers = write(tmp_path / "numbers.jsonl", [{"text": "a", "label": 1.5}])
    assert "--field label=COLUMN" in refused(Code.DATA_FIELD, keep_rows, numbers, out, plan, {}).fix
    told(Code.DATA_FIELD, ROWS, patient="id")
    (tmp_path / "rows.txt").write_text("a\n")
    refused(Code.DATA_FORMAT, keep_rows, tmp_path / "rows.txt", out, plan, {})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    refused(Code.DATA_FORMAT, keep_rows, tmp_path / "broken.parquet", out, plan, {})
    (tmp_path / "empty.csv").write_text("text,label\n")
    refused(Code.DATA_EMPTY, keep_rows, tmp_path / "empty.csv", out, plan, {})
    refused(Code.DATA_NOT_FOUND, keep_rows, tmp_path / "none.csv", out, plan, {})
    refused(Code.DATA_NOT_FOUND, keep_rows, tmp_path / "none.jsonl", out, plan, {})
    refused(Code.DATA_NOT_FOUND, keep_rows, tmp_path / "none.parquet", out, plan, {})
    assert not out.exists()


def test_base_models(tiny_model: Path, tmp_path: Path) -> None:
    for base in (str(tiny_model), "hub/name"):
        check_base(parse_plan(PLAN | {"model": {"base": base}}))
    for base in (str(tmp_path), "./nothing", "package:no-such-package/x"):
        refused(Code.MODEL_NOT_FOUND, check_base, parse_plan(PLAN | {"model": {"base": base}}))


def test_what_the_disk_did() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = LichenError(Code.OUTPUT_UNUSABLE, "can't write")
    wrapped.__context__ = full
    assert all(map(disk_failed, (full, wrapped, sqlite3.OperationalError("database or disk is full"))))
    assert disk_failed(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not any(map(disk_failed, (OSError(errno.ENOENT, "no"), LichenError(Code.COHORT_TOO_SMALL, "few"), ValueError(), None)))


def test_a_model_that_is_not_there_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(parse_plan(PLAN).to_yaml())
    refused(Code.NO_MODEL, export_model, tmp_path, tmp_path / "out")
    for directory in (tmp_path / "nowhere", tmp_path / "plan.yaml"):
        for version in (None, 1):
            with pytest.raises(LichenError, match="no run directory") as caught:
                export_model(directory, tmp_path / "out", version=version)
            assert caught.value.code is Code.OUTPUT_UNUSABLE
    with pytest.raises(LichenError, match="no stream of tasks, so its model has no versions"):
        export_model(tmp_path, tmp_path / "out", version=1)
    assert not (tmp_path / "out").exists()


# --- backups ---


@pytest.fixture
def backup(home: Home, tmp_path: Path, plan: Plan) -> Path:
    with closing(home.open_store()) as store:
        store.add_run(5, plan.canonical_json(), "5")
        (home.runs / "5" / "checkpoints").mkdir(parents=True)
        (home.runs / "5" / "checkpoints" / "round-00001.safetensors").write_bytes(b"x" * 100_000)
        (home.runs / "5" / "half.tmp").write_bytes(b"x")
        (home.runs / "5" / "model.tar").write_bytes(b"made of model/")
        home.spool.mkdir()
        (home.spool / ("a" * 64)).write_bytes(b"payload")
        told = write_backup(home, store, tmp_path / "backup.tar")
        refused(Code.OUTPUT_EXISTS, write_backup, home, store, tmp_path / "backup.tar")
        refused(Code.OUTPUT_UNUSABLE, write_backup, home, store, tmp_path / "no" / "backup.tar")
    assert told["files"] == 7
    assert not list(home.path.glob(".backup-*"))
    return tmp_path / "backup.tar"


def test_a_backup_is_the_home(home: Home, backup: Path, tmp_path: Path) -> None:
    restored = restore_backup(backup, tmp_path / "new")
    assert stat.S_IMODE(restored.path.stat().st_mode) == 0o700
    assert restored.config == home.config
    assert restored.authority().ca_pem == home.authority().ca_pem
    for name in ("runs/5/checkpoints/round-00001.safetensors", f"spool/{'a' * 64}"):
        assert (restored.path / name).read_bytes() == (home.path / name).read_bytes()
    assert not (restored.runs / "5" / "half.tmp").exists()
    with closing(restored.open_store()) as store:
        assert store.run(5).status == "queued"
    refused(Code.OUTPUT_EXISTS, restore_backup, backup, home.path)


def rebuilt(backup: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """The backup with each entry changed."""
    target = backup.with_name("changed.tar")
    with tarfile.open(backup) as old, tarfile.open(target, "w") as new:
        for entry in old:
            file = old.extractfile(entry)
            assert file is not None
            if (found := change(entry.name, file.read())) is not None:
                entry.name, entry.size = found[0], len(found[1])
                new.addfile(entry, io.BytesIO(found[1]))
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: (name, data[:-1] + b"y") if name.endswith("safetensors") else (name, data),
        lambda name, data: None if name.endswith("safetensors") else (name, data),
        lambda name, data: None if name == "manifest.json" else (name, data),
        lambda name, data: (name, b"{}") if name == "manifest.json" else (name, data),
        lambda name, data: ("../outside", data) if name == "config.yaml" else (name, data),
        lambda name, data: ("/outside", data) if name == "config.yaml" else (name, data),
    ],
)
def test_a_changed_backup_is_refused(backup: Path, tmp_path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    refused(Code.BACKUP_INVALID, restore_backup, rebuilt(backup, change), tmp_path / "new" / "home")
    assert not list((tmp_path / "new").iterdir())


def test_a_cut_or_newer_backup_is_refused(backup: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    for length in (0, 1000, backup.stat().st_size // 2):
        cut.write_bytes(backup.read_bytes()[:length])
        refused(Code.BACKUP_INVALID, restore_backup, cut, tmp_path / "new")
    refused(Code.BACKUP_INVALID, restore_backup, tmp_path / "none.tar", tmp_path / "new")

    def newer(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data.replace(b'"format": 1', b'"format": 2') if name == "manifest.json" else data

    refused(Code.STORE_VERSION, restore_backup, rebuilt(backup, newer), tmp_path / "new")
