"""What a run gives out, while others choose another version, or ask for it too."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lichen.common.model.export import save_models
from lichen.common.result import read_result, write_atomically
from lichen.coordinator.export import export_model, give_out
from lichen.coordinator.home import Home
from lichen.coordinator.models import ModelService
from scripted_clients import Federation, plan_from

A_WHILE = 2.0
"""Seconds in which whoever does not wait is done."""
STREAM = [{"name": "a", "labels": ["crop", "metal"]}, {"name": "b", "labels": ["money"]}]


@pytest.fixture
def home(tmp_path: Path, tiny_plan: dict[str, Any]) -> Home:
    """A coordinator's home with a finished run of two versions."""
    plan = plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 60}, {"rounds": 2, "continual": {"stream": STREAM}})
    made = Home.create(tmp_path / "home", ["127.0.0.1"])
    Federation(made.runs / "7", plan).run()
    store = made.open_store()
    store.add_run(7, plan.canonical_json(), "7")
    store.set_run_status(7, "finished")
    store.close()
    return made


def beside(work: Callable[[], None]) -> threading.Thread:
    """Begin that in another thread, for which locks are as for another process, and give it a while."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(A_WHILE)
    return thread


def labels_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as files:
        config = files.extractfile("model/config.json")
        assert config is not None
        return list(json.load(config)["id2label"].values())


def test_nodes_do_not_get_what_was_rolled_back_as_it_was_packed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, rollbacks, digest = home.runs / "7", list[threading.Thread](), hashlib.file_digest

    def slow(*arguments: Any) -> Any:  # the archive is written, and is not in its place yet
        rollbacks.extend([] if rollbacks else [beside(lambda: give_out(directory, 1))])
        return digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    store = home.open_store()
    service = ModelService(store, home.runs)
    assert labels_in(service._find(7)[1]) == ["crop", "metal", "money"], "as it was when it was asked for"
    rollbacks[0].join()
    told = read_result(directory).continual
    assert told is not None
    assert told.given_out == "1-a"
    _, path, ref = service._find(7)
    assert (labels_in(path), path.stat().st_size) == (["crop", "metal"], ref.length)
    store.close()


def test_two_may_ask_at_once_for_a_version_that_is_not_written_yet(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, others, saved = home.runs / "7", list[threading.Thread](), list[Path]()
    running = read_result(directory)
    running.status = "running"
    write_atomically(directory / "result.json", running.model_dump_json())

    def save(folder: Path, *arguments: Any) -> None:
        saved.append(folder)
        others.extend([] if others else [beside(lambda: export_model(directory, tmp_path / "second"))])
        save_models(folder, *arguments)

    monkeypatch.setattr("lichen.common.model.export.save_models", save)
    export_model(directory, tmp_path / "first")
    others[0].join()
    written = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "first", tmp_path / "second", directory / "model")]
    assert written[0] == written[1] == written[2]
    assert len(saved) == 1


def test_a_model_is_on_the_disk_before_it_is_in_its_place(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synced: set[str] = set()
    monkeypatch.setattr("lichen.common.model.export.sync", lambda path: synced.add(path.name))
    export_model(home.runs / "7", tmp_path / "out", version=1)
    assert {path.name for path in (tmp_path / "out").rglob("*")} <= synced
