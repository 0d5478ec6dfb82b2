"""The versions of a stream's model: what is kept of them, which is given out, and what they tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.result import Metrics
from lichen.coordinator.versions import EVERY, FOLDER, Versions, scores_hold_outs

DOCUMENT: dict[str, Any] = {"task": {"labels": ["a", "b"]}, "model": {"base": "some/model"}, "local": {"steps": 5}}


def online(rounds: int = 6, **continual: Any) -> Plan:
    return parse_plan(DOCUMENT | {"rounds": rounds, "continual": {"mode": "online"} | continual})


def add(versions: Versions, plan: Plan, *rounds: int, scores: dict[str, Metrics | None] | None = None) -> None:
    for number in rounds:
        versions.add(stage_of(plan, number), {"w": torch.full((1,), float(number))}, scores or {}, None, "hold-outs")


def left(out: Path) -> list[list[str]]:
    """What is left of each version, in order."""
    folders = sorted((out / FOLDER).glob("*-*"), key=lambda folder: int(folder.name.partition("-")[0]))
    return [sorted(path.name for path in folder.iterdir()) for folder in folders]


WHOLE, TOLD = ["state.safetensors", "version.json"], ["version.json"]


def test_of_old_versions_the_scores_alone_are_kept(tmp_path: Path) -> None:
    plan = online(keep=2)
    versions = Versions(tmp_path, plan)
    add(versions, plan, 1)
    (tmp_path / FOLDER / "1-batch-1" / "model").mkdir()
    (tmp_path / FOLDER / "1-batch-1" / "model.tar").touch()
    add(versions, plan, 2)
    assert left(tmp_path) == [["model", "model.tar", *WHOLE], WHOLE]
    add(versions, plan, 3, 4)
    assert left(tmp_path) == [TOLD, TOLD, WHOLE, WHOLE]
    assert [version.number for version in Versions(tmp_path, plan).all()] == [1, 2, 3, 4]
    assert versions.current().number == 4
    for ask in (lambda: versions.find(1), lambda: versions.choose(1), lambda: versions.state(versions.all()[0])):
        with pytest.raises(LichenError) as caught:
            ask()
        assert caught.value.code is Code.NO_MODEL
        assert "continual.keep: 2" in caught.value.what
        assert "3-batch-3, 4-batch-4." in str(caught.value.fix)
    assert versions.given_out() == "4-batch-4", "what could not be chosen was not"


def test_what_is_given_out_is_kept_for_as_long_and_what_would_be_without_a_rollback(tmp_path: Path) -> None:
    plan = online(keep=1, tolerance=0.1)
    versions = Versions(tmp_path, plan)
    add(versions, plan, 1, 2, scores={EVERY: {"accuracy": 0.9}})
    versions.choose(2)
    add(versions, plan, 3, scores={EVERY: {"accuracy": 0.9}})
    add(versions, plan, 4, 5, scores={EVERY: {"accuracy": 0.2}})
    assert left(tmp_path) == [TOLD, WHOLE, WHOLE, TOLD, WHOLE], "pinned; the newest that is not held back; the newest"
    assert versions.current().number == 2
    versions.choose(None)
    assert versions.current().number == 3
    assert float(versions.state(versions.current())["w"]) == 3
    add(versions, plan, 6, scores={EVERY: {"accuracy": 0.9}})
    assert left(tmp_path) == [TOLD] * 5 + [WHOLE]


def test_new_versions_do_not_displace_one_that_was_rolled_back_to(tmp_path: Path) -> None:
    plan = online()
    versions = Versions(tmp_path, plan)
    add(versions, plan, 1, 2)
    Versions(tmp_path, plan).choose(1)  # an operator's process
    add(versions, plan, 3)
    told = versions.summary()
    assert told is not None
    why = "rolled back to 1-batch-1"
    assert (told.given_out, told.held_back) == ("1-batch-1", {"2-batch-2": why, "3-batch-3": why})
    assert [version.held_back for version in Versions(tmp_path, plan).all()] == [None, why, why]
    Versions(tmp_path, plan).choose(3)
    assert (versions.given_out(), [version.held_back for version in versions.all()]) == ("3-batch-3", [None] * 3)
    Versions(tmp_path, plan).choose(None)
    add(versions, plan, 4)
    assert versions.given_out() == "4-batch-4"


def test_one_that_was_held_back_may_be_given_out(tmp_path: Path) -> None:
    plan = online(tolerance=0.1)
    versions = Versions(tmp_path, plan)
    for number, score in ((1, 0.9), (2, 0.2), (3, 0.3)):
        add(versions, plan, number, scores={EVERY: {"accuracy": score}})
    assert versions.given_out() == "1-batch-1"
    versions.choose(2)
    found = versions.all()
    assert (versions.given_out(), found[1].held_back) == ("2-batch-2", None)
    assert "has fallen" in str(found[2].held_back), "its own reason stands"


def test_without_scores_it_is_told_what_there_is_and_what_is_given_out(tmp_path: Path) -> None:
    plan = online()
    versions = Versions(tmp_path / "online", plan)
    versions.add_start({})
    assert versions.summary() is None
    add(versions, plan, 1, 2)
    told = versions.summary()
    assert told is not None
    assert (told.tasks, told.split, told.matrix, told.acc, told.given_out) == (["batch-1", "batch-2"], None, [], None, "2-batch-2")
    stream = [{"name": "one", "labels": ["a", "b"]}, {"name": "two", "labels": ["b"]}]
    planned = parse_plan(DOCUMENT | {"rounds": 2, "continual": {"stream": stream}})
    versions = Versions(tmp_path / "planned", planned)
    versions.add_start({})
    add(versions, planned, 1)
    told = versions.summary()
    assert told is not None
    assert (told.tasks, told.split, told.matrix, told.start, told.given_out) == (["one", "two"], None, [], None, "1-one")


def test_what_very_many_versions_tell_is_soon_told(tmp_path: Path) -> None:
    plan = online(rounds=10_000)
    versions = Versions(tmp_path, plan)
    add(versions, plan, 1)
    text = (tmp_path / FOLDER / "1-batch-1" / "version.json").read_text()
    for number in range(2, 2001):
        folder = tmp_path / FOLDER / f"{number}-batch-{number}"
        folder.mkdir()
        told = text.replace('"number": 1', f'"number": {number}').replace('"batch-1"', f'"batch-{number}"')
        (folder / "version.json").write_text(told)
    versions.summary()  # which reads them
    began = time.monotonic()
    found = versions.summary()
    assert time.monotonic() - began < 0.5
    assert found is not None
    assert (len(found.tasks), found.given_out) == (2000, "2000-batch-2000")


def test_hold_outs_are_scored_where_a_task_ends_with_an_evaluation() -> None:
    stream = [{"name": "one", "labels": ["a", "b"], "rounds": 2}, {"name": "two", "labels": ["b"], "rounds": 3}]
    for every, scored in ((0, False), (1, True), (2, True), (3, False), (5, True)):
        plan = parse_plan(DOCUMENT | {"rounds": 5, "continual": {"stream": stream}, "evaluation": {"federated_every": every}})
        assert scores_hold_outs(plan) == scored, every


def test_a_version_that_is_told_of_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = list[str](), os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        done.append(f"make {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    plan = online()
    add(Versions(tmp_path, plan), plan, 1)
    state = ["sync state.tmp", "make state.safetensors", "sync 1-batch-1"]
    assert done == [*state, "sync version.json.tmp", "make version.json", "sync 1-batch-1", f"sync {FOLDER}"]
