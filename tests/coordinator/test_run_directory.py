"""A run's directory: checkpoints that come back as they were, writes that are whole or not there, and what it refuses."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, digest_of, load_plan, parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.statement import make_statement
from lichen.common.result import Privacy, Result, Round, Transfer, read_result
from lichen.coordinator.run_directory import KEPT, RunDirectory, ServerState, open_for, versions


@pytest.fixture
def plan(tiny_plan: dict[str, Any]) -> Plan:
    return parse_plan(tiny_plan)


@pytest.fixture
def directory(tmp_path: Path, plan: Plan) -> RunDirectory:
    return RunDirectory(tmp_path / "run", plan)


def state(round: int, seed: int = 0) -> ServerState:
    torch.manual_seed(seed + round)
    tensors = {"layer.lora_A.weight": torch.randn(2, 5), "a/b": torch.randn(3), "transposed": torch.randn(4, 2).T}
    return ServerState(
        round,
        model=tensors,
        velocity={name: tensor * 2 for name, tensor in tensors.items()},
        average={name: tensor * 3 for name, tensor in tensors.items()},
        spent={"client-0": [Segment(0.8731, 0.1, 4), Segment(0.8731, 0.1, 3)], "client-1": [Segment(1.5, 1.0, 1)]},
        evaluated={"client-1": [Segment(2.5, 1.0, 1)]},
    )


def same(left: ServerState, right: ServerState) -> None:
    assert (left.round, left.spent, left.evaluated) == (right.round, right.spent, right.evaluated)
    for part in ("model", "velocity", "average"):
        one, other = getattr(left, part), getattr(right, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def refuses(code: Code, work: Callable[[], Any]) -> LichenError:
    with pytest.raises(LichenError) as caught:
        work()
    assert caught.value.code is code, str(caught.value)
    return caught.value


def test_a_checkpoint_comes_back_as_it_was(directory: RunDirectory, plan: Plan) -> None:
    assert directory.load_state() is None
    directory.save_state(state(1))
    same(state(1), RunDirectory(directory.path, plan).load_state() or state(9))


def test_the_line_of_a_round_that_waits_for_its_score_comes_back(directory: RunDirectory) -> None:
    written = state(1)
    written.told = told(1).rounds[0]
    written.told.train_loss = float("nan")
    directory.save_state(written)
    found = directory.load_state()
    assert found is not None
    assert found.told == told(1).rounds[0].model_copy(update={"train_loss": None})


def test_the_operators_line_of_a_round_is_found_and_replaced(directory: RunDirectory) -> None:
    assert directory.load_for_operator(1) is None
    lines = told(3).rounds
    for line in lines:
        directory.save_for_operator(line)
    scored = lines[2].model_copy(update={"validation": {"accuracy": 0.5}})
    directory.save_for_operator(scored)
    assert [directory.load_for_operator(round) for round in (1, 2, 3, 4)] == [*lines[:2], scored, None]


def test_an_empty_velocity_and_average_come_back_empty(directory: RunDirectory) -> None:
    directory.save_state(ServerState(1, {"a": torch.ones(1)}, {}, {}))
    found = directory.load_state()
    assert found is not None
    assert (found.velocity, found.average, found.spent, found.evaluated) == ({}, {}, {}, {})


def test_histories_survive_to_the_last_bit(directory: RunDirectory) -> None:
    written = state(1)
    written.spent = {"c": [Segment(0.1 + 0.2, 1 / 3, 2**40)]}
    directory.save_state(written)
    assert directory.load_state() is not None
    assert directory.load_state().spent == written.spent  # type: ignore[union-attr]


def test_the_newest_counts_and_only_the_last_few_are_kept(directory: RunDirectory) -> None:
    for round in (1, 2, 9, 10, 11):
        directory.save_state(state(round))
    kept = sorted(path.name for path in (directory.path / "checkpoints").glob("round-*"))
    assert kept == ["round-00010.safetensors", "round-00011.safetensors"]
    assert len(kept) == KEPT
    same(state(11), directory.load_state() or state(1))


def test_a_half_written_checkpoint_is_not_looked_at(directory: RunDirectory) -> None:
    directory.save_state(state(1))
    whole = next((directory.path / "checkpoints").glob("round-*")).read_bytes()
    (directory.path / "checkpoints" / "round-00002.tmp").write_bytes(whole[: len(whole) // 2])
    same(state(1), directory.load_state() or state(9))
    directory.save_state(state(2))  # the round is done again, over the leavings
    same(state(2), directory.load_state() or state(9))
    assert not list(directory.path.rglob("*.tmp"))


def test_a_write_that_fails_leaves_the_old_checkpoint(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.save_state(state(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        directory.save_state(state(2))
    monkeypatch.undo()
    same(state(1), directory.load_state() or state(9))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * len(data), lambda data: data[:20]])
def test_a_damaged_checkpoint_is_told_by_number(directory: RunDirectory, damage: Callable[[bytes], bytes]) -> None:
    directory.save_state(state(1))
    path = next((directory.path / "checkpoints").glob("round-*"))
    path.write_bytes(damage(path.read_bytes()))
    assert path.name in refuses(Code.OUTPUT_UNUSABLE, directory.load_state).where


def test_a_file_of_other_tensors_is_no_checkpoint(directory: RunDirectory) -> None:
    save_file({"model/a": torch.ones(1)}, directory.path / "checkpoints" / "round-00001.safetensors")
    refuses(Code.OUTPUT_UNUSABLE, directory.load_state)


def test_a_newer_format_is_refused_with_what_to_do(directory: RunDirectory) -> None:
    directory.save_state(state(1))
    path = next((directory.path / "checkpoints").glob("round-*"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["lichen"]) | {"format": 2, "what-we-do-not-know-yet": 1}
    header["__metadata__"]["lichen"] = json.dumps(about)
    header["news/a"] = header.pop("model/a/b")
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    error = refuses(Code.OUTPUT_UNUSABLE, directory.load_state)
    assert "format 2" in error.what
    assert "Upgrade" in error.fix


def test_a_checkpoint_says_its_format_and_its_plan(directory: RunDirectory, plan: Plan) -> None:
    directory.save_state(state(3))
    with safe_open(next((directory.path / "checkpoints").glob("round-*")), framework="pt") as file:
        about = json.loads(file.metadata()["lichen"])
    assert (about["format"], about["round"], about["plan_sha256"]) == (1, 3, plan.sha256())


def test_another_plan_is_refused_and_overwrites_nothing(directory: RunDirectory, tiny_plan: dict[str, Any]) -> None:
    before = (directory.path / "plan.yaml").read_bytes()
    refuses(Code.OUTPUT_UNUSABLE, lambda: RunDirectory(directory.path, parse_plan(tiny_plan | {"seed": 99})))
    assert (directory.path / "plan.yaml").read_bytes() == before


def test_a_plan_in_an_older_lichens_words_is_the_same_and_keeps_them(
    directory: RunDirectory, tiny_plan: dict[str, Any], plan: Plan, older_text: Callable[[Plan], str]
) -> None:
    text = older_text(plan)
    (directory.path / "plan.yaml").write_text(yaml.safe_dump(json.loads(text), sort_keys=False))
    (directory.path / "checkpoints" / "plan.sha256").write_text(digest_of(text))
    files = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
    open_for(directory.path, resume=True, plan=plan)
    found = RunDirectory(directory.path, plan)
    assert (found.text, found.plan_sha256) == (text, digest_of(text)) != (plan.canonical_json(), plan.sha256())
    other = parse_plan(tiny_plan | {"seed": 99})
    assert "another plan" in refuses(Code.OUTPUT_UNUSABLE, lambda: RunDirectory(directory.path, other)).what
    assert "another plan" in refuses(Code.OUTPUT_UNUSABLE, lambda: open_for(directory.path, resume=True, plan=other)).what
    assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == files
    (directory.path / "plan.yaml").unlink()
    refuses(Code.PLAN_UNREADABLE, lambda: RunDirectory(directory.path, plan))


def test_the_plan_that_is_kept_is_the_plan(directory: RunDirectory, plan: Plan) -> None:
    assert load_plan(directory.path / "plan.yaml") == plan


def test_a_place_that_can_not_be_written_is_told_by_number(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").write_text("")
    refuses(Code.OUTPUT_UNUSABLE, lambda: RunDirectory(tmp_path / "file" / "run", plan))


def test_the_cohort_of_a_round_that_was_begun_is_kept_for_that_round_alone(directory: RunDirectory, plan: Plan) -> None:
    assert directory.load_cohort(1) is None
    directory.save_cohort(1, [2**62 + 1, 5])
    assert RunDirectory(directory.path, plan).load_cohort(1) == [2**62 + 1, 5]
    assert directory.load_cohort(2) is None
    directory.save_cohort(2, [7])
    assert (directory.load_cohort(1), directory.load_cohort(2)) == (None, [7])
    directory.forget_cohort()
    directory.forget_cohort()
    assert directory.load_cohort(2) is None


def told(rounds: int) -> Result:
    lines = [Round(round=n, participants=2, failed=0, uplink_bytes=1, downlink_bytes=1, seconds=0.5) for n in range(1, rounds + 1)]
    return Result(
        run_id="1",
        status="running",
        plan_sha256="",
        engine="inprocess",
        seed=0,
        versions=versions(),
        seconds=1,
        rounds=lines,
        privacy=Privacy(unit="none"),
        transfer=Transfer(uplink_bytes=0, downlink_bytes=0),
    )


def test_metrics_hold_a_line_a_round_and_those_after_the_checkpoint_are_left_out(directory: RunDirectory) -> None:
    assert directory.load_rounds(5) == []
    directory.save_result(told(3))
    assert len((directory.path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [line.round for line in directory.load_rounds(2)] == [1, 2]
    written = read_result(directory.path)
    assert written.privacy.statement == make_statement(directory.plan, written)
    written.privacy.statement = None
    assert written == told(3)


def test_a_diverged_loss_is_null_and_can_be_read_again(directory: RunDirectory) -> None:
    result = told(1)
    result.rounds[0].validation = {"loss": float("nan"), "accuracy": 0.5}
    result.rounds[0].train_loss = float("inf")
    directory.save_result(result)
    found = read_result(directory.path)
    assert found.rounds[0].validation == {"loss": None, "accuracy": 0.5}
    assert (found.rounds[0].train_loss, directory.load_rounds(1)) == (None, found.rounds)


def test_versions_name_what_the_result_depends_on() -> None:
    assert {"python", "lichen", "flwr", "torch", "opacus", "transformers", "peft", "dp-accounting"} <= versions().keys()


def test_a_new_or_empty_directory_is_free(tmp_path: Path) -> None:
    open_for(tmp_path / "new", resume=False)
    open_for(tmp_path, resume=False)
    open_for(tmp_path, resume=True)


def test_a_run_is_there_already(directory: RunDirectory) -> None:
    assert "--resume" in refuses(Code.OUTPUT_EXISTS, lambda: open_for(directory.path, resume=False)).fix
    open_for(directory.path, resume=True)
    open_for(directory.path, resume=True, plan=directory.plan)
    other = directory.plan.model_copy(update={"seed": directory.plan.seed + 1})
    assert "another plan" in refuses(Code.OUTPUT_UNUSABLE, lambda: open_for(directory.path, resume=True, plan=other)).what


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "plan.yaml"])  # a folder with somebody's own plan is no run directory either
def test_a_foreign_directory_is_refused(tmp_path: Path, resume: bool, name: str) -> None:
    (tmp_path / name).write_text("mine")
    refuses(Code.OUTPUT_UNUSABLE, lambda: open_for(tmp_path, resume=resume))
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refuses(Code.OUTPUT_UNUSABLE, lambda: open_for(tmp_path / "out", resume=False))
