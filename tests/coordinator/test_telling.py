"""A round is scored and told beside the next one, in order, and whatever happens meanwhile."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from lichen.common.continual.stream import Stage
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.schedule import planned_steps
from lichen.common.result import Metrics, Result, read_result
from lichen.coordinator.app import OwnData
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.engine import InProcessGrid
from scripted_clients import (
    DECLARED,
    PRIVATE,
    SIZES,
    Broken,
    Federation,
    plan_from,
)


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    return lambda **changes: plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 0.3}, changes)


class Apart(InProcessGrid):
    """Its clients do without the coordinator's model, as those in other processes do."""

    works_here = False  # type: ignore[assignment]


Score = Callable[[int, State], Metrics | None]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], None]:
    """Score models by a function of how many were scored before, and the model."""

    def use(score: Score) -> None:
        done: list[int] = []

        def validation(self: OwnData, state: State, stage: Stage) -> Metrics | None:
            done.append(1)
            return score(len(done), state)

        monkeypatch.setattr(OwnData, "validation", validation)
        monkeypatch.setattr(OwnData, "has_validation", True)

    return use


def size_of(state: State) -> Metrics:
    """A score that tells models apart, to the last bit and in any order of their tensors."""
    return {"accuracy": math.fsum(value**2 for tensor in state.values() for value in tensor.flatten().tolist())}


def untimed(result: Result) -> dict[str, Any]:
    """All but what no two runs have in common."""
    found = result.model_dump()
    for told in [found, *found["rounds"]]:
        told["seconds"] = None
    return found


SCORED: dict[str, Any] = {"rounds": 4, "privacy": PRIVATE, "evaluation": {"federated_every": 2}}


@pytest.mark.parametrize("every", [1, 3])
def test_scores_made_beside_the_rounds_are_those_made_between_them(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], every: int
) -> None:
    scoring(lambda _, state: size_of(state))
    plan = plan_of(**SCORED | {"evaluation": {"federated_every": 2, "every": every}})
    between = Federation(tmp_path / "between", plan).run()
    beside = Federation(tmp_path / "beside", plan, grid=Apart).run()
    assert untimed(between) == untimed(beside)
    assert [told.validation is None for told in beside.rounds] == [every > 1, every > 1, False, False]
    lines = [json.loads(line) for line in (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [json.loads(told.model_dump_json()) for told in beside.rounds]


def test_what_a_round_spends_is_computed_beside_it(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two rounds an accountant would hold the next up."""
    scoring(lambda _, state: size_of(state))
    asked: dict[str, list[int]] = {}

    def noted(history: list[Segment], delta: float) -> float:
        asked.setdefault(threading.current_thread().name, []).append(sum(segment.steps for segment in history))
        return epsilon(history, delta)

    monkeypatch.setattr("lichen.coordinator.telling.epsilon", noted)
    plan = plan_of(rounds=3, privacy=PRIVATE)
    steps = planned_steps(plan, DECLARED).steps
    Federation(tmp_path / "all", plan, grid=Apart).run()
    assert asked.pop("scoring") == [2 * steps] * len(SIZES) + [3 * steps] * len(SIZES)
    for few, grid in (("two of three", Apart), ("not beside", InProcessGrid)):
        changes = {"cohort": {"size": 2, "minimum": 2, "deadline_s": 30}} if grid is Apart else {}
        Federation(tmp_path / few, plan_of(rounds=3, privacy=PRIVATE, seed=2, **changes), grid=grid).run()
    assert asked.pop("scoring") == [2 * steps] * 2, "as long as only two are known"
    assert asked.keys() == {threading.current_thread().name}


class Watched(Apart):
    """Says when a round is asked for."""

    begun: dict[str, threading.Event]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = list(messages)
        self.begun[asked[0].metadata.group_id].set()
        return list(super().send_and_receive(asked))


def test_the_next_round_begins_before_the_score_is_there_and_lines_are_told_in_order(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None]
) -> None:
    federation = Federation(tmp_path, plan_of(rounds=3), grid=Watched)
    federation.grid.begun = begun = {str(number): threading.Event() for number in (1, 2, 3)}  # type: ignore[attr-defined]
    told: list[int] = []

    def score(number: int, state: State) -> Metrics:
        if number < 3:
            assert begun[str(number + 1)].wait(20)
        if number == 1:
            time.sleep(0.5)  # longer than the second round
            assert not begun["3"].is_set(), "no more than one model waits for its score"
        told.append(len(RunDirectory(tmp_path, federation.plan).load_rounds(3)))
        return size_of(state)

    scoring(score)
    result = federation.run()
    assert told[:3] == [0, 1, 2]
    assert [line.round for line in result.rounds] == [1, 2, 3]
    assert all(line.validation for line in result.rounds)
    assert (result.rounds[0].seconds or 0) < 0.5, "a round's seconds are without its score"


@pytest.mark.parametrize("grid", [InProcessGrid, Apart])
@pytest.mark.parametrize("fails", [1, 2, 4])
def test_a_crash_between_checkpoint_and_score_loses_neither(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], grid: type[InProcessGrid], fails: int
) -> None:
    plan = plan_of(**SCORED)
    scoring(lambda _, state: size_of(state))
    whole = Federation(tmp_path / "whole", plan).run()

    def score(number: int, state: State) -> Metrics:
        if number == fails:
            raise MemoryError("killed")
        return size_of(state)

    scoring(score)
    federation = Federation(tmp_path / "killed", plan, grid=grid)
    with pytest.raises(MemoryError, match="killed"):
        federation.run()
    left = read_result(federation.out)
    assert (left.status, left.error) == ("failed", "MemoryError: killed")
    assert [told.round for told in left.rounds] == list(range(1, fails))
    asked = len(federation.asked)
    assert untimed(federation.run()) == untimed(whole)
    assert all(round > fails for _, round, _ in federation.asked[asked:]), "what was done is not done again"


def test_a_score_that_fails_is_not_hidden_by_a_round_that_fails_and_the_other_way_round(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], caplog: pytest.LogCaptureFixture
) -> None:
    def score(number: int, state: State) -> Metrics:
        raise ValueError("no score")

    class Both(Apart, Broken):
        error = LichenError(Code.RUN_STOPPED, "by the operator")

    scoring(score)
    result = Federation(tmp_path, plan_of(rounds=3), grid=Both).fails(Code.RUN_STOPPED)
    assert (result.status, result.rounds) == ("stopped", [])
    assert "no score" in caplog.text


def test_what_was_spent_stays_told_if_a_run_fails_before_its_last_round_is_scored(
    tmp_path: Path, plan_of: Callable[..., Plan], scoring: Callable[[Score], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    scoring(lambda number, state: size_of(state) if number == 1 else fail())
    federation = Federation(tmp_path, plan_of(rounds=2, privacy=PRIVATE), grid=Apart)
    with pytest.raises(RuntimeError):
        federation.run()
    spent = epsilon([planned_steps(federation.plan, DECLARED)] * 2, 1e-3)
    assert read_result(tmp_path).privacy.max_epsilon == spent
    monkeypatch.setattr(OwnData, "__init__", fail)
    with pytest.raises(RuntimeError):
        federation.run()
    assert (read_result(tmp_path).privacy.max_epsilon, len(read_result(tmp_path).rounds)) == (spent, 1)
