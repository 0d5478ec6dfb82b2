"""`lichen coordinator versions`, `diff` and `rollback`, on the directory of a run that was really played."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.common.channel.archive import pack
from lichen.common.errors import Code, LichenError
from lichen.common.model.export import save_models
from lichen.common.plan import parse_plan
from lichen.common.result import read_result
from lichen.coordinator.cli import app
from lichen.coordinator.export import export_model
from lichen.coordinator.home import Home
from lichen.coordinator.models import ModelService
from lichen.coordinator.versions import Versions
from lichen.simulations.simulate import run

STREAM = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]


@pytest.fixture
def home(tmp_path: Path, csv_plan: dict[str, Any]) -> tuple[Path, Path]:
    """A coordinator's home with a finished run, and the run's directory."""
    plan = parse_plan(csv_plan | {"rounds": 2, "cohort": {"size": 3}, "continual": {"stream": STREAM, "tolerance": 1.0}})
    made = Home.create(tmp_path / "home", ["127.0.0.1"])
    store = made.open_store()
    directory = made.runs / "7"
    run(plan, directory, "inprocess")
    store.add_run(7, plan.canonical_json(), "7")
    store.set_run_status(7, "finished")
    store.close()
    return tmp_path / "home", directory


@pytest.fixture
def lichen(home: tuple[Path, Path]) -> Callable[..., Any]:
    def call(command: str, *arguments: str) -> Any:
        done = CliRunner().invoke(app, [command, "7", *arguments, "--home", str(home[0])])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


def test_versions_are_listed_with_what_they_scored(lichen: Callable[..., Any]) -> None:
    found = json.loads(lichen("versions", "--json"))
    assert [(version["number"], version["task"], version["parent"]) for version in found] == [
        (0, "start", None),
        (1, "fields", 0),
        (2, "banks", 1),
    ]
    lines = [line.split("\t") for line in lichen("versions").splitlines()]
    assert lines[0] == ["version", "parent", "round", "ε", "fields", "banks", ""]
    assert lines[3][0] == "2-banks"
    assert lines[3][-1] == "given out"


def test_the_scores_of_two_versions_side_by_side(lichen: Callable[..., Any]) -> None:
    found = json.loads(lichen("diff", "1", "2", "--json"))
    assert found["fields"]["accuracy"]["first"] > found["fields"]["accuracy"]["second"]
    lines = [line.split("\t") for line in lichen("diff", "1", "2").splitlines()]
    assert lines[0] == ["task", "metric", "1-fields", "2-banks", "change"]
    (change,) = (line[-1] for line in lines if line[:2] == ["banks", "accuracy"])
    assert change.startswith("+")
    with pytest.raises(LichenError) as caught:
        lichen("diff", "1", "9")
    assert caught.value.code is Code.NO_MODEL


def test_what_is_given_out_can_be_taken_back_and_forth(lichen: Callable[..., Any], home: tuple[Path, Path], tmp_path: Path) -> None:
    directory = home[1]

    def weights(name: str, version: int | None = None) -> bytes:
        export_model(directory, tmp_path / name, version=version)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first, second = weights("1", 1), weights("2", 2)
    assert weights("a") == second
    assert lichen("rollback", "1") == "1-fields is given out\n"
    assert weights("b") == first
    told = read_result(directory).continual
    assert told is not None
    assert (told.given_out, told.held_back) == ("1-fields", {"2-banks": "rolled back to 1-fields"})
    assert lichen("versions").splitlines()[3].endswith("rolled back to 1-fields")
    lichen("rollback", "2")
    assert weights("c") == second
    told = read_result(directory).continual
    assert told is not None
    assert (told.given_out, told.held_back) == ("2-banks", {})
    with pytest.raises(LichenError) as caught:
        lichen("rollback", "3")
    assert caught.value.code is Code.NO_MODEL


def test_a_rollback_that_was_killed_between_two_moves_is_done_again(lichen: Callable[..., Any], home: tuple[Path, Path]) -> None:
    directory = home[1]
    (directory / "model").rename(directory / "model.old")
    (directory / "model.new").mkdir()
    lichen("rollback", "1")
    assert (directory / "model" / "adapter_config.json").exists()
    assert not (directory / "model.old").exists()
    assert "rolled back to 1-fields" in (directory / "report.html").read_text(encoding="utf-8")


def test_nodes_fetch_what_is_given_out_after_a_rollback_too(lichen: Callable[..., Any], home: tuple[Path, Path]) -> None:
    made = Home(home[0])
    store = made.open_store()
    service = ModelService(store, made.runs)
    _, path, before = service._find(7)
    assert service._find(0) == (7, path, before)
    lichen("rollback", "1")
    assert service._find(7)[2].digest != before.digest
    lichen("rollback", "2")
    assert ModelService(store, made.runs)._find(7)[1:] == (path, before)
    store.close()


def test_before_its_end_a_stream_gives_out_the_newest_version(lichen: Callable[..., Any], home: tuple[Path, Path], tmp_path: Path) -> None:
    made, directory = Home(home[0]), home[1]
    store = made.open_store()
    store.set_run_status(7, "running")
    shutil.move(directory / "model", tmp_path / "final")
    lichen("export", "--out", str(tmp_path / "so-far"))
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("so-far", "final")}
    assert weights["so-far"] == weights["final"]
    run_id, path, ref = ModelService(store, made.runs)._find(0)
    assert (run_id, path.parent.name, path.stat().st_size) == (7, "2-banks", ref.length)
    shutil.rmtree(directory / "versions")
    for ask in (0, 7):
        with pytest.raises(LichenError) as caught:
            ModelService(store, made.runs)._find(ask)
        assert caught.value.code is Code.NO_MODEL
    store.close()


def test_a_model_of_several_folders_is_not_sent_in_part(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    continual = {"stream": STREAM, "method": "adapters"}
    run(parse_plan(csv_plan | {"rounds": 4, "cohort": {"size": 3}, "continual": continual}), tmp_path, "inprocess")
    with pytest.raises(LichenError) as caught:
        pack(tmp_path / "plan.yaml", tmp_path / "model", tmp_path / "model.tar")
    assert caught.value.code is Code.NO_MODEL
    assert not (tmp_path / "model.tar").exists()


def test_the_versions_of_an_online_run_are_told_by_batch(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    continual = {"mode": "online", "online": {"rounds": 1}}
    evaluation = {"federated_every": 1, "validation_fraction": 0.0}
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    changes = {"rounds": 2, "cohort": {"size": 3}, "continual": continual, "evaluation": evaluation}
    plan = parse_plan(csv_plan | changes | {"simulation": csv_plan["simulation"] | {"data": data}})
    made = Home.create(tmp_path / "home", ["127.0.0.1"])
    run(plan, made.runs / "7", "inprocess")
    store = made.open_store()
    store.add_run(7, plan.canonical_json(), "7")
    store.close()
    told = {}
    for command in (["versions", "7"], ["diff", "7", "1", "2"]):
        done = CliRunner().invoke(app, [*command, "--home", str(tmp_path / "home")], catch_exceptions=False)
        told[command[0]] = [line.split("\t") for line in done.stdout.splitlines()]
    assert told["versions"][0][4:6] == ["batch-1", "batch-2"]
    assert told["versions"][2][4] != "–"
    assert ["batch-1", "accuracy"] in [line[:2] for line in told["diff"]]


def test_a_run_that_goes_on_is_rolled_back_too(lichen: Callable[..., Any], home: tuple[Path, Path], tmp_path: Path) -> None:
    made, directory = Home(home[0]), home[1]
    store = made.open_store()
    store.set_run_status(7, "running")
    shutil.move(directory / "model", tmp_path / "final")
    before = (directory / "result.json").read_bytes()
    assert lichen("rollback", "1") == "1-fields is given out; training goes on from the newest version\n"
    assert not (directory / "model").exists()
    assert (directory / "result.json").read_bytes() == before, "which the run alone writes"
    assert ModelService(store, made.runs)._find(7)[1].parent.name == "1-fields"
    lichen("export", "--out", str(tmp_path / "first"))
    assert lichen("versions").splitlines()[3].endswith("rolled back to 1-fields")
    assert lichen("rollback", "--newest").startswith("2-banks is given out;")
    lichen("export", "--out", str(tmp_path / "newest"))
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "newest", "final")}
    assert weights["first"] != weights["newest"] == weights["final"]
    done = CliRunner().invoke(app, ["rollback", "7", "1", "--newest", "--home", str(home[0])])
    assert (done.exit_code, "or --newest" in done.output) == (2, True)
    store.close()


def test_a_model_that_was_saved_as_another_was_chosen_is_not_given_out(
    lichen: Callable[..., Any], home: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run that ends while it is rolled back, or a rollback that was killed once the version was pinned."""
    made, directory = Home(home[0]), home[1]
    final = (directory / "model" / "adapter_model.safetensors").read_bytes()
    (directory / "versions" / "pinned").write_text("1\n")
    lichen("export", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != final
    store = made.open_store()
    assert ModelService(store, made.runs)._find(7)[1].parent.name == "1-fields"
    store.close()
    (directory / "versions" / "pinned").write_text("?")
    with pytest.raises(LichenError) as caught:
        lichen("versions")
    assert caught.value.code is Code.OUTPUT_UNUSABLE
    lichen("rollback", "--newest")
    assert (directory / "model" / "adapter_model.safetensors").read_bytes() == final


@pytest.mark.parametrize(
    ("every", "words", "noted"),
    [(0, [], True), (4, [], True), (0, ["--test", "x.csv"], True), (3, [], False), (0, ["--validation", "x.csv"], False)],
)
def test_who_submits_a_stream_that_nothing_is_to_score_is_told(
    tmp_path: Path, csv_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, every: int, words: list[str], noted: bool
) -> None:
    monkeypatch.setattr("lichen.coordinator.cli.ask_service", lambda *_, **__: {"run_id": "5"})
    changes = {"rounds": 6, "cohort": {"size": 3}, "continual": {"stream": STREAM}, "evaluation": {"federated_every": every}}
    (tmp_path / "plan.yaml").write_text(parse_plan(csv_plan | changes).to_yaml())
    done = CliRunner().invoke(app, ["submit", str(tmp_path / "plan.yaml"), *words], catch_exceptions=False)
    assert done.stdout == "5\n"
    assert ("no version is ever held back" in done.stderr) == noted
    assert ("there is no R" in done.stderr) == (noted and "--test" not in words)


def test_a_version_that_is_chosen_while_the_final_model_is_saved_is_the_final_one(
    tmp_path: Path, csv_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parse_plan(csv_plan | {"rounds": 2, "cohort": {"size": 3}, "continual": {"stream": STREAM, "tolerance": 1.0}})
    saved = []

    def save(directory: Path, *arguments: Any) -> None:
        save_models(directory, *arguments)
        if not saved:
            Versions(directory.parent, plan).choose(1)
        saved.append(arguments[-2])

    monkeypatch.setattr("lichen.coordinator.app.save_models", save)
    result = run(plan, tmp_path / "run", "inprocess")
    assert saved == [1, 0]
    assert result.continual is not None
    assert (result.continual.given_out, list(result.continual.held_back)) == ("1-fields", ["2-banks"])
    assert list(json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"].values()) == ["crop", "metal"]
