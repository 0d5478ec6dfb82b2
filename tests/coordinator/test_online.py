"""An online run's rounds with scripted clients: what was scored before a batch is charged whatever comes next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.common import records
from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code
from lichen.common.plan import Plan
from lichen.common.privacy.schedule import planned_evaluation
from lichen.coordinator.run_directory import RunDirectory
from scripted_clients import PRIVATE, Answer, Federation, answer, failing, honest, plan_from

ONLINE: dict[str, Any] = {"mode": "online", "online": {"rounds": 2, "clients": 3}}
GOOD, POOR = [4.0, 1.0, 0.0, 1.0, 4.0, 0.0, 0.0, 1.0, 4.0], [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 1.0]
"""Of which .8 and .2 are right."""


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        document = {"continual": ONLINE, "rounds": 4, "evaluation": {"federated_every": 2}} | changes
        return plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 0.3}, document)

    return make


def by_batch(then: Answer = honest) -> Answer:
    """Counts for each batch until the round's, the last one's poor before it was trained on; in training as another does."""

    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        if message.metadata.message_type != records.EVALUATE:
            return then(plan, assignment, message, name)
        earlier = GOOD * stage_of(plan, assignment.round).number
        about: dict[str, Any] = {"format": 1, "client": name, "round": assignment.round}
        about |= {"counts": [*earlier, *(POOR if assignment.before else GOOD)]}
        about |= {"noise_multiplier": planned_evaluation(plan).noise_multiplier} if plan.private else {"loss_sum": 9.0}
        return answer(message, about, None)

    return act


def every(act: Answer) -> dict[str, Answer]:
    return {f"client-{number}": act for number in range(3)}


def test_new_data_are_scored_before_a_batch_and_the_drift_is_told(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    federation = Federation(tmp_path, plan_of(), every(by_batch()))
    result = federation.run()
    assert [kind for kind, _, name in federation.asked if name == "client-0"] == ["evaluate", "train", "train", "evaluate"] * 2
    assert [told.drift for told in result.rounds] == [None, None, pytest.approx(0.8 - 0.2), None]
    assert [sorted(told.before_by_task) for told in result.rounds] == [["batch-1"], [], ["batch-1", "batch-2"], []]
    assert result.continual is not None
    (first, second), (later, last) = result.continual.matrix
    assert [first, second, later, last] == pytest.approx([0.8, 0.2, 0.8, 0.8]), "the second was scored before it began"


def test_what_was_scored_before_a_batch_is_charged_after_a_crash_in_its_first_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(privacy=PRIVATE)
    whole = Federation(tmp_path / "whole", plan, every(by_batch())).run()

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Federation(tmp_path / "b", plan, every(by_batch(killed))).run()
    state = RunDirectory(tmp_path / "b", plan).load_state()
    assert state is not None
    assert (state.round, {name: len(own) for name, own in state.evaluated.items()}) == (0, dict.fromkeys(every(honest), 1))
    again = Federation(tmp_path / "b", plan, every(by_batch()))
    result = again.run()
    assert [kind for kind, round, name in again.asked if name == "client-0" and round == 1] == ["train"], "it was not scored again"
    assert result.privacy.clients == whole.privacy.clients
    assert [told.before_by_task for told in result.rounds] == [told.before_by_task for told in whole.rounds]
    assert [told.drift for told in result.rounds] == [told.drift for told in whole.rounds]


def test_who_fails_before_a_batch_is_bounded_by_the_plan(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        return (failing(Code.WORKER_FAILED) if assignment.before else by_batch())(plan, assignment, message, name)

    result = Federation(tmp_path, plan_of(privacy=PRIVATE), every(by_batch()) | {"client-1": act}).run()
    assert [told.before_errors for told in result.rounds] == [{"client-1": Code.WORKER_FAILED}, {}] * 2
    assert [(told.errors, told.participants) for told in result.rounds] == [({}, 3)] * 4
    assert result.privacy.statement is not None
    bounds = result.privacy.statement.with_secret_noise
    assert bounds["client-1"].epsilon == PRIVATE["epsilon"]
    assert bounds["client-1"].epsilon_sum == 3 * PRIVATE["epsilon"]
    assert bounds["client-1"].how != bounds["client-0"].how


def test_a_batch_with_too_few_updates_moves_nothing_and_the_run_goes_on(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def fails_in(*rounds: int) -> Answer:
        def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
            return (failing(Code.DATA_ROW) if assignment.round in rounds else honest)(plan, assignment, message, name)

        return act

    lean = {"client-0": fails_in(2, 3), "client-1": fails_in(2, 3)}
    federation = Federation(tmp_path / "lean", plan_of(evaluation={"federated_every": 0}), lean)
    result = federation.run()
    assert result.status == "finished"
    assert [(told.participants, told.failed) for told in result.rounds] == [(3, 0), (0, 2), (0, 2), (3, 0)]
    whole = Federation(tmp_path / "whole", plan_of(evaluation={"federated_every": 0}))
    whole.run()
    moved = [RunDirectory(out, federation.plan).load_state() for out in (tmp_path / "lean", tmp_path / "whole")]
    assert all(state is not None for state in moved)
    assert any(not torch.equal(tensor, moved[1].model[name]) for name, tensor in moved[0].model.items())  # type: ignore[union-attr]


def test_later_rounds_of_a_batch_ask_those_of_its_first(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(evaluation={"federated_every": 0}, rounds=6, continual={"mode": "online", "online": {"rounds": 3, "clients": 3}})
    federation = Federation(tmp_path, plan)
    names = federation.grid.get_node_ids
    gone: set[int] = set()
    federation.grid.get_node_ids = lambda: [node for node in names() if node not in gone]  # type: ignore[method-assign]

    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        gone.clear()
        gone.update(names()[:1] if assignment.round == 1 else [])  # away in the second round, and back in the third
        return honest(plan, assignment, message, name)

    federation.actors = every(act)
    result = federation.run()
    assert [told.participants for told in result.rounds][:3] == [3, 2, 3]
