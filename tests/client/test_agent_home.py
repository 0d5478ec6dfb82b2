"""What an agent keeps in its home, and the commands of its owner: locks, status, pause, data, policy, ledger; nothing imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.client.arrivals import Arrivals, New
from lichen.client.cli import app
from lichen.client.data import add_source, read_manifest
from lichen.client.fetch import FetchedModel
from lichen.client.ledger import Ledger
from lichen.client.ledger_book import Limit, Limits
from lichen.client.locks import HomeLocks, agent_runs
from lichen.client.policy import pending, request
from lichen.client.score import Scored
from lichen.client.status import StatusFile, is_paused, read_status
from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment

runner = CliRunner()
FIELDS = {"text": "text", "label": "label"}


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "node"
    home.mkdir()
    return home


def write_rows(path: Path, count: int = 20) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": f"text {row}", "label": "ab"[row % 2]}) for row in range(count)))
    return path


def client(*arguments: object, home: Path, fails: Code | None = None) -> str:
    result = runner.invoke(app, [*map(str, arguments), "--home", str(home)])
    if fails is None:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert isinstance(result.exception, LichenError), result.output
        assert result.exception.code is fails
    return result.output


def test_nothing_but_the_worker_imports_torch() -> None:
    code = (
        "import sys, lichen.common.cli, lichen.client.cli, lichen.client.agent, lichen.client.worker, lichen.client.score;"
        "heavy = {'torch', 'transformers', 'scipy', 'pandas', 'pyarrow', 'flwr'} & set(sys.modules); print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_agent_a_home(home: Path) -> None:
    assert not agent_runs(home)
    locks = HomeLocks(home)
    assert agent_runs(home)
    with pytest.raises(LichenError) as caught:
        HomeLocks(home)
    assert caught.value.code is Code.AGENT_IN_USE
    locks.close()
    assert not agent_runs(home)
    HomeLocks(home).close()
    with pytest.raises(LichenError) as caught:
        HomeLocks(home / "nowhere")
    assert caught.value.code is Code.AGENT_HOME_MISSING


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ("d/a.jsonl", "d/a.jsonl", True),
        ("d", "d/a.jsonl", True),
        ("d/a.jsonl", "d", True),
        ("d/a.jsonl", "d/b.jsonl", False),
        ("link.jsonl", "d/a.jsonl", True),
    ],
)
def test_one_home_for_the_same_data(tmp_path: Path, first: str, second: str, conflict: bool) -> None:
    write_rows(tmp_path / "d" / "a.jsonl")
    write_rows(tmp_path / "d" / "b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "a.jsonl")
    homes = []
    for name, source in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        add_source(tmp_path / name, tmp_path / source, fields=FIELDS)
        homes.append(HomeLocks(tmp_path / name))
    homes[0].hold_data()
    homes[0].hold_data()
    if conflict:
        with pytest.raises(LichenError) as caught:
            homes[1].hold_data()
        assert caught.value.code is Code.AGENT_IN_USE
        # the first lets go of what its data.yaml names no longer
        (tmp_path / "one" / "data.yaml").write_text("format: 1\nholdout_key: " + "a" * 32 + "\nsources: []\n")
        homes[0].hold_data()
    homes[1].hold_data()
    for locks in homes:
        locks.close()


def test_a_file_and_its_folder_in_one_home(tmp_path: Path, home: Path) -> None:
    file = write_rows(tmp_path / "d" / "a.jsonl")
    add_source(home, file, fields=FIELDS)
    add_source(home, file.parent, fields=FIELDS)
    locks = HomeLocks(home)
    locks.hold_data()
    locks.close()


def test_status_is_true_when_the_agent_is_gone(home: Path) -> None:
    assert read_status(home).state == "stopped"
    locks = HomeLocks(home)
    file = StatusFile(home, "clinic-a", "127.0.0.1:1")
    file.change(state="training", run="7", round=3, worker_pid=1, connected=True)
    file.change(last_error="error 60")
    found = read_status(home)
    assert (found.state, found.run, found.round, found.last_error) == ("training", "7", 3, "error 60")
    assert (home / "status.json").stat().st_mode & 0o777 == 0o600
    client("policy", "--init", home=home)
    client("pause", home=home)
    assert read_status(home).state == "training"
    file.change(state="idle")
    assert read_status(home).state == "paused"
    locks.close()
    found = read_status(home)
    assert (found.state, found.connected, found.worker_pid, found.name) == ("stopped", False, None, "clinic-a")
    (home / "status.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(LichenError) as caught:
        read_status(home)
    assert caught.value.code is Code.STORE_VERSION


def test_pause_and_resume(home: Path) -> None:
    client("policy", "--init", home=home)
    client("pause", home=home)
    client("pause", home=home)
    assert is_paused(home)
    client("pause", "--resume", home=home)
    client("pause", "--resume", home=home)
    assert not is_paused(home)
    client("pause", home=home / "nowhere", fails=Code.AGENT_HOME_MISSING)


def test_data_add_and_check(tmp_path: Path, home: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 100)
    fields = ("--field", "text=text", "--field", "label=label")
    client("data", "add", rows, "--field", "text", home=home, fails=Code.DATA_FIELD)
    client("data", "add", rows, "--field", "text=nowhere", home=home, fails=Code.DATA_FIELD)
    told = client("data", "add", rows, *fields, home=home)
    assert "--declared-size 64" in told or "--declared-size 128" in told
    assert read_manifest(home).sources[0].declared_size is None
    assert "declared-size" not in client("data", "add", rows, *fields, "--declared-size", 64, "--holdout", 10, home=home)
    (source,) = read_manifest(home).sources
    assert (source.declared_size, source.holdout) == (64, 10)
    found = json.loads(client("data", "check", "--json", home=home))
    assert (found["usable"], found["rows"], found["sources"][0]["holdout"]) == (True, 100, 10)
    assert "90 rows to train on" in client("data", "check", home=home)
    rows.write_text(rows.read_text() + '\n{"text": null, "label": "a"}')
    bad = runner.invoke(app, ["data", "check", "--home", str(home)])
    assert bad.exit_code == Code.DATA_ROW
    assert "row 101" in bad.output


def test_a_folder_that_files_are_yet_to_come_to_is_told_of_watch(tmp_path: Path, home: Path) -> None:
    (inbox := tmp_path / "inbox").mkdir()
    arguments = ["data", "add", str(inbox), "--field", "text=text", "--home", str(home)]
    empty = runner.invoke(app, arguments).exception
    assert isinstance(empty, LichenError)
    assert (empty.code, "--watch" in empty.fix) == (Code.DATA_EMPTY, True)
    held_out = runner.invoke(app, [*arguments, "--watch", "--holdout", "5"]).exception
    assert isinstance(held_out, LichenError)
    assert (held_out.code, held_out.what.startswith("holdout of a watched folder must be a share")) == (Code.DATA_FIELD, True)
    assert "added" in client(*arguments[:-2], "--watch", home=home)


def test_data_are_removed_as_they_were_added(tmp_path: Path, home: Path) -> None:
    client("data", "remove", tmp_path / "rows.jsonl", home=home, fails=Code.DATA_NOT_FOUND)
    fields = ("--field", "text=text", "--field", "label=label")
    for place in (tmp_path, home):
        client("data", "add", write_rows(place / "rows.jsonl", 10), *fields, home=home)
    client("data", "remove", "rows.jsonl", home=home)  # relative to the home, as data.yaml has it
    assert [source.path for source in read_manifest(home).sources] == [str(tmp_path / "rows.jsonl")]
    client("data", "remove", tmp_path / "other.jsonl", home=home, fails=Code.DATA_NOT_FOUND)
    client("data", "remove", tmp_path / "rows.jsonl", home=home)
    assert read_manifest(home).sources == ()
    assert (tmp_path / "rows.jsonl").exists()


def test_what_runs_have_read_is_shown_to_the_owner(tmp_path: Path, home: Path) -> None:
    client("data", "history", home=tmp_path / "nowhere", fails=Code.AGENT_HOME_MISSING)
    client("data", "add", write_rows(tmp_path / "rows.jsonl", 10), "--field", "text=text", "--field", "label=label", home=home)
    assert "no run has read anything" in client("data", "history", home=home)
    assert json.loads(client("data", "history", "--json", home=home)) == []
    with Arrivals(home) as arrivals:
        arrivals.begin("online", 0, New(64, [1, 2], [3]))
        arrivals.note("planned", [1, 2, 4])
    *_, first, second = client("data", "history", home=home).splitlines()
    assert first.split() == ["planned", "3"]
    assert second.split()[:2] == ["online", "1"]
    assert second.split()[-1] == "2"
    assert [row["batch"] for row in json.loads(client("data", "history", "--json", home=home))] == [None, 1]


def test_policy_and_approvals(home: Path, tiny_plan: dict[str, Any]) -> None:
    assert "# Largest" in client("policy", home=home)
    assert json.loads(client("policy", "--json", home=home))["privacy"]["max_epsilon"] == 8.0
    client("policy", "--init", home=home)
    assert "max_epsilon: 8.0" in (home / "policy.yaml").read_text()
    client("policy", "--init", home=home, fails=Code.OUTPUT_EXISTS)
    assert "no plan waits" in client("pending", home=home)
    plan = parse_plan(tiny_plan)
    request(home, plan, plan.sha256())
    assert plan.sha256()[:12] in client("pending", home=home)
    assert json.loads(client("pending", "--json", home=home))[0]["sha256"] == plan.sha256()
    client("approve", "abc", home=home, fails=Code.POLICY_APPROVAL)
    client("reject", plan.sha256()[:12], home=home)
    client("approve", plan.sha256(), home=home)
    assert pending(home) == []


def test_a_policy_that_is_invalid_is_answered_with_what_is_valid(home: Path) -> None:
    (home / "policy.yaml").write_text("max_epsilon: 4\n")
    result = runner.invoke(app, ["policy", "--home", str(home)])
    assert result.exit_code == Code.POLICY_INVALID
    assert "max_epsilon: unknown key (nearest known: privacy.max_epsilon" in result.stderr
    assert "# Largest" in result.stdout
    assert "max_epsilon: 8.0" in result.stdout
    client("policy", "--json", home=home, fails=Code.POLICY_INVALID)


def test_ledger_tells_what_is_left(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client("ledger", home=tmp_path / "no-home", fails=Code.AGENT_HOME_MISSING)
    client("ledger", home=home, fails=Code.AGENT_HOME_MISSING)  # a folder, in which no node lives
    client("policy", "--init", home=home)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("LICHEN_LEDGER", str(tmp_path / "ledgers"))
        assert "nothing was spent" in client("ledger", home=home)
        empty = json.loads(client("ledger", "--json", home=home))
        assert not (tmp_path / "ledgers").exists(), "looking makes nothing"
    limits = Limits("example", Limit(8.0, 1e-5))
    with Ledger(home) as ledger:
        train, holdout = set(ledger.assign("train", [1, 2])), set(ledger.assign("holdout", [3]))
        for round in (1, 2):
            ledger.reserve("train", "7", f"{round:032x}", round, Segment(2.0, 0.1, 5), limits, train, as_of=ledger.split_at)
        ledger.reserve("train", "8", "8" * 32, 1, Segment(3.0, 0.1, 5), limits, train, as_of=ledger.split_at)
        ledger.reserve("holdout", "7", "7" * 32, 1, Segment(9.0, 1.0, 1), limits, holdout, as_of=ledger.split_at)
        spent, held_out = (ledger.spent(number, Limit(8.0, 1e-5)).epsilon for number in (1, 2))
    found = json.loads(client("ledger", "--json", home=home))
    assert found.keys() == empty.keys()
    assert [(run["split"], run["run"], run["rounds"], run["steps"]) for run in found["runs"]] == [
        ("train", "7", 2, 10),
        ("train", "8", 1, 5),
        ("holdout", "7", 1, 1),
    ]
    assert found["splits"][0] == {"split": "train", "epsilon": spent, "bound": "rdp-filter", "left": 8.0 - spent}
    assert [(row["segment"], row["records"], row["bound"], row["runs"]) for row in found["segments"]] == [
        (1, 2, "rdp-filter", 2),
        (2, 1, "pld", 1),
    ]
    assert (found["record"], found["delta"]) == (max(spent, held_out), 2e-5)  # of two bounds
    assert found["runs"][0]["epsilon"] < spent
    assert "is left" in client("ledger", home=home)


def test_a_model_without_a_loss_is_shown_beside_one_that_has_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = [Scored("run 2", 10, {"accuracy": 0.25}), Scored("start", 10, {"accuracy": 0.5, "loss": 1.25})]
    monkeypatch.setattr("lichen.client.enrolment.load_identity", lambda _: None)
    monkeypatch.setattr("lichen.client.fetch.fetch_model", lambda *_, **__: FetchedModel(2, home / "models" / "2"))
    monkeypatch.setattr("lichen.client.score.score_models", lambda *_: scored)
    *_, headings, first, second = client("model", home=home).splitlines()
    assert headings.split()[-2:] == ["accuracy", "loss"]
    assert (first.split()[-2:], second.split()[-2:]) == (["0.25", "–"], ["0.5", "1.25"])


def test_status_and_run_without_an_enrolment(home: Path) -> None:
    facts = json.loads(client("status", "--json", home=home))
    assert facts["state"] == "stopped"
    assert "error 100" in facts["certificate_error"]
    assert "stopped" in client("status", home=home)
    client("run", home=home, fails=Code.AGENT_HOME_MISSING)
    client("model", home=home, fails=Code.AGENT_HOME_MISSING)
