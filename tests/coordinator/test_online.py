"""An online run's rounds with scripted clients: what was scored before a batch is charged whatever comes next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.common import records
from lichen.common.aggregation import KEPT
from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code
from lichen.common.model.adapter import State
from lichen.common.plan import Plan
from lichen.common.privacy.schedule import evaluations, planned_evaluation
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.engine import InProcessGrid
from scripted_clients import PRIVATE, Answer, Federation, answer, failing, honest, plan_from, report_of, update_of

ONLINE: dict[str, Any] = {"mode": "online", "online": {"rounds": 2, "clients": 3}}
GOOD, POOR = [4.0, 1.0, 0.0, 1.0, 4.0, 0.0, 0.0, 1.0, 4.0], [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 1.0]
"""Of which .8 and .2 are right."""


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        document = {"continual": ONLINE, "rounds": 4, "evaluation": {"federated_every": 2}} | changes
        return plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 0.3}, document)

    return make


def by_batch(then: Answer = honest, times: float = 1.0) -> Answer:
    """Counts for each batch until the round's, the last one's poor before it was trained on; in training as another does.

    Args:
        then: that other.
        times: so many times more rows are held out: noise matters less.
    """

    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        if message.metadata.message_type != records.EVALUATE:
            return then(plan, assignment, message, name)
        earlier = GOOD * stage_of(plan, assignment.round).number
        about: dict[str, Any] = {"format": 1, "client": name, "round": assignment.round}
        about |= {"counts": [times * count for count in (*earlier, *(POOR if assignment.before else GOOD))]}
        about |= {"noise_multiplier": planned_evaluation(plan).noise_multiplier} if plan.private else {"loss_sum": 9.0}
        return answer(message, about, None)

    return act


def every(act: Answer) -> dict[str, Answer]:
    return {f"client-{number}": act for number in range(3)}


class Arriving(InProcessGrid):
    """To each client a row more comes whenever it is waited for."""

    rows = 0

    def new_rows(self) -> dict[int, int]:
        return dict.fromkeys(self.get_node_ids(), self.rows)

    def wait_for_news(self, timeout: float) -> None:
        self.rows += 1


def drifting(plan_of: Callable[..., Plan], least: float, **online: Any) -> Plan:
    """Three batches of two rounds, each scored at its end, where drift is .6."""
    continual = {"mode": "online", "online": {"rounds": 2, "clients": 3, "drift": least} | online}
    return plan_of(privacy=PRIVATE, rounds=6, continual=continual)


def looks_of(federation: Federation, name: str = "client-0") -> list[int]:
    """Of each batch the looks at one client's hold-out before it."""
    asked = [(kind, round) for kind, round, own in federation.asked if own == name]
    return [asked.count((records.EVALUATE, first)) for first in range(1, federation.plan.rounds, 2)]


@pytest.mark.parametrize(("least", "looks"), [(0.5, [1, 1, 1]), (0.9, [1, 3, 3])])
def test_no_more_looks_are_made_than_the_noise_is_for(
    tmp_path: Path, plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture, least: float, looks: list[int]
) -> None:
    caplog.set_level("INFO")
    federation = Federation(tmp_path, drifting(plan_of, least), every(by_batch(times=1000)), Arriving)
    result = federation.run()
    assert looks_of(federation) == looks
    assert [told.drift is None for told in result.rounds] == [True, True, False, True, False, True]
    most = evaluations(federation.plan)
    assert most == (1 + 1) + 2 * (3 + 1)
    state = RunDirectory(tmp_path, federation.plan).load_state()
    assert state is not None
    assert {name: len(own) for name, own in state.evaluated.items()} == dict.fromkeys(every(honest), sum(looks) + 3)
    assert result.privacy.max_epsilon is not None
    assert result.privacy.statement is not None
    bounds = result.privacy.statement.with_secret_noise
    assert max([result.privacy.max_epsilon, *(bound.epsilon for bound in bounds.values())]) <= PRIVATE["epsilon"]  # type: ignore[operator]
    for client in result.privacy.clients.values():
        assert (client.segments["holdout"] > 7.9) == (sum(looks) + 3 == most), "noise is for all that may be made"
    waits = [record.getMessage() for record in caplog.records if "below continual.online.drift (0.9)" in record.getMessage()]
    begins = [told for told in waits if "after 3 looks (continual.online.looks) it begins" in told]
    assert (len(waits), len(begins)) == ((6, 2) if least > 0.5 else (0, 0))
    assert [told.rpartition(" ")[2] for told in begins] == (["12", "21"] if begins else []), "as much again, three times"
    assert federation.grid.rows == (7 if begins else 1)  # type: ignore[attr-defined]


def test_a_look_that_is_cut_off_is_made_again_and_counts_once(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = drifting(plan_of, 0.9, clients=2)
    whole = Federation(tmp_path / "whole", plan, every(by_batch(times=1000)), Arriving).run()
    looked: list[str] = []

    def killed(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        looked.extend([name] if assignment.before and assignment.round == 3 else [])
        if len(looked) == 2:
            raise KeyboardInterrupt
        return by_batch(times=1000)(plan, assignment, message, name)

    def broken(name: str) -> Federation:
        with pytest.raises(KeyboardInterrupt):
            Federation(tmp_path / name, plan, every(by_batch(times=1000)) | {"client-1": killed}, Arriving).run()
        looked.clear()
        return Federation(tmp_path / name, plan, every(by_batch(times=1000)), Arriving)

    again = broken("again")
    result = again.run()
    assert looks_of(again)[1:] == [2, 3], "one of three was over"
    assert result.privacy == whole.privacy
    assert [told.before_errors for told in result.rounds] == [{}] * 6
    assert [told.before_by_task for told in result.rounds] == [told.before_by_task for told in whole.rounds]

    lean = broken("lean")
    lean.grid.new_rows = lambda: dict.fromkeys(lean.grid.get_node_ids()[1:], lean.grid.rows)  # type: ignore[attr-defined, method-assign]
    result = lean.run()
    assert [told.before_errors for told in result.rounds][2] == {"client-0": None}, "it may have paid for what nobody has counted"
    assert result.privacy.statement is not None
    bounds = result.privacy.statement.with_secret_noise
    assert bounds["client-0"].how != bounds["client-2"].how
    assert max(bound.epsilon for bound in bounds.values()) <= PRIVATE["epsilon"]  # type: ignore[operator]


def test_a_restart_after_the_last_look_makes_no_other(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = drifting(plan_of, 0.9, looks=2)

    class Stopped(Arriving):
        def wait_for_news(self, timeout: float) -> None:
            super().wait_for_news(timeout)
            if self.rows == 3:
                raise KeyboardInterrupt

    first = Federation(tmp_path, plan, every(by_batch(times=1000)), Stopped)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert looks_of(first) == [1, 2, 0], "that much more is waited for"
    again = Federation(tmp_path, plan, every(by_batch(times=1000)), Arriving)
    result = again.run()
    assert looks_of(again) == [0, 0, 2]
    assert [told.drift for told in result.rounds][2] == pytest.approx(0.6, abs=0.05)
    assert result.privacy.max_epsilon is not None
    assert result.privacy.max_epsilon <= PRIVATE["epsilon"]  # type: ignore[operator]


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


@pytest.mark.parametrize("average_last", [1, 2])
def test_a_batch_of_failures_is_no_teacher(tmp_path: Path, plan_of: Callable[..., Plan], average_last: int) -> None:
    before = f"{KEPT}.before."
    models: dict[int, State] = {}

    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        models[assignment.round] = records.get_tensors(message.content, None)
        if assignment.round <= 2 and name != "client-2":
            return records.error_reply(message, int(Code.WORKER_FAILED), "")
        start = {key: tensor for key, tensor in models[assignment.round].items() if not key.startswith(before)}
        return answer(message, report_of(plan, assignment, name), update_of(start, name, assignment.number))

    changes = {"rounds": 6, "evaluation": {"federated_every": 0}, "aggregation": {"average_last": average_last}}
    result = Federation(tmp_path, plan_of(continual=ONLINE | {"method": "lwf"}, **changes), every(act)).run()
    assert [told.participants for told in result.rounds] == [0, 0, 3, 3, 3, 3]
    taught = {round: any(tensor.any() for key, tensor in model.items() if key.startswith(before)) for round, model in models.items()}
    assert taught == {round: round > 4 for round in range(1, 7)}
    assert all(torch.equal(tensor, models[3][key]) for key, tensor in models[1].items()), "nothing has moved"
    kept = {key: tensor for key, tensor in models[5].items() if key.startswith(before)}
    assert all(torch.allclose(tensor, models[5][key.removeprefix(before)], atol=1e-6) for key, tensor in kept.items())


@pytest.mark.parametrize("kinds", [(records.PREPARE, records.TRAIN), (records.TRAIN,)])
def test_who_fails_is_left_out_until_it_tells_something_else(
    tmp_path: Path, plan_of: Callable[..., Plan], kinds: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    class Telling(InProcessGrid):
        waits, rows = 0, (32, 32, 32)

        def new_rows(self) -> dict[int, int]:
            return dict(zip(self.get_node_ids(), self.rows, strict=True))

        def wait_for_news(self, timeout: float) -> None:
            self.waits += 1
            if self.waits == 5:
                mended.add(True)
                self.rows = (64, 32, 32)
            assert self.waits < 10

    mended: set[bool] = set()

    def act(plan: Plan, assignment: records.Assignment, message: Any, name: str) -> Any:
        fails = message.metadata.message_type in kinds and not mended
        return (failing(Code.DATA_FIELD) if fails else honest)(plan, assignment, message, name)

    plan = plan_of(evaluation={"federated_every": 0}, continual={"mode": "online", "online": {"rounds": 1, "clients": 3}})
    federation = Federation(tmp_path, plan, {"client-0": act}, Telling)
    result = federation.run()
    first = [] if records.PREPARE in kinds else [2]
    assert [told.participants for told in result.rounds] == [*first, *[3] * (4 - len(first))]
    assert federation.grid.waits == 5  # type: ignore[attr-defined]
    assert "waits: 2 of 3 clients have 1 new rows; not asked since they failed: client-0" in caplog.text


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
