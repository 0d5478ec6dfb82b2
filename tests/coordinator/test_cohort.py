"""Who is asked in a round, who is waited for, and that all get ready before the first one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from lichen.common import records
from lichen.common.errors import Code
from lichen.common.plan import Plan
from lichen.coordinator.cohort import note_on_draws
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.engine import InProcessGrid
from scripted_clients import (
    PRIVATE,
    SIZES,
    Answer,
    Federation,
    close,
    expected,
    failing,
    honest,
    plan_from,
)

WRONG = next(iter(SIZES))


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    return lambda **changes: plan_from(tiny_plan, {"size": 3, "minimum": 2, "deadline_s": 0.3}, changes)


def trained(federation: Federation) -> list[list[str]]:
    rounds = sorted({round for _, round, _ in federation.asked})
    return [[name for kind, number, name in federation.asked if (kind, number) == ("train", round)] for round in rounds]


def test_the_cohort_follows_from_the_seed_and_changes_with_the_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def cohorts(where: str, seed: int) -> list[list[str]]:
        federation = Federation(tmp_path / where, plan_of(rounds=8, seed=seed, cohort={"size": 2, "minimum": 1}))
        federation.run()
        return trained(federation)

    first = cohorts("a", 1)
    assert first == cohorts("b", 1)
    assert first != cohorts("c", 2)
    assert all(len(names) == 2 for names in first)
    assert len({tuple(names) for names in first}) > 1


class Shuffled(InProcessGrid):
    """The same clients under other ids, as nodes have in a deployment."""

    def __init__(self, client_app: ClientApp, homes: list[Path], run_id: int) -> None:
        super().__init__(client_app, list(reversed(homes)), run_id)


def test_the_cohort_is_drawn_by_name_not_by_id(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=6, cohort={"size": 1, "minimum": 1})
    plain, other = Federation(tmp_path / "a", plan), Federation(tmp_path / "b", plan, grid=Shuffled)
    plain.run(), other.run()
    assert trained(plain) == trained(other)


def test_the_cohort_of_a_round_that_was_begun_is_asked_again(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2, cohort={"size": 1, "minimum": 1})
    drawn = Federation(tmp_path / "a", plan)
    drawn.run()
    began = Federation(tmp_path / "b", plan)
    other = next(name for name in SIZES if name not in trained(drawn)[0])
    node = next(node for node in began.grid.get_node_ids() if began.grid.name_of(node) == other)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "cohort.json").write_text(json.dumps({"round": 1, "nodes": [node]}))
    began.run()
    assert trained(began) == [[other], trained(drawn)[1]]


def test_too_few_nodes_are_waited_for_and_then_told(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    federation = Federation(tmp_path, plan_of(cohort={"size": 5, "minimum": 4, "deadline_s": 0.4}))
    began = time.monotonic()
    result = federation.fails(Code.COHORT_TOO_SMALL)
    assert 0.4 <= time.monotonic() - began < 30
    assert "3 nodes are connected, cohort.minimum is 4" in (result.error or "")
    assert federation.asked == []


def test_fewer_nodes_than_wished_but_enough_go_on(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = Federation(tmp_path, plan_of(cohort={"size": 5, "minimum": 3, "deadline_s": 0.2})).run()
    assert result.rounds[0].participants == 3


class Late(InProcessGrid):
    """Its first client never answers in time."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        assert timeout == 0.3
        return [reply for reply in super().send_and_receive(messages) if self.name_of(reply.metadata.src_node_id) != WRONG]


@pytest.mark.parametrize("private", [False, True])
def test_a_late_node_is_left_out_and_not_waited_for_a_second_time(tmp_path: Path, plan_of: Callable[..., Plan], private: bool) -> None:
    plan = plan_of(evaluation={"federated_every": 1}, **({"privacy": PRIVATE} if private else {}))
    federation = Federation(tmp_path, plan, grid=Late)
    (told,) = federation.run().rounds
    assert (told.participants, told.failed, told.errors) == (2, 1, {WRONG: None})
    assert [name for kind, _, name in federation.asked if kind == "evaluate"] == ["client-1", "client-2"]
    close(federation.model(), expected(plan, 1, SIZES.keys() - {WRONG}))


class Machines(InProcessGrid):
    """Its clients are machines of their own, which may tell what they can do."""

    def profile_of(self, node: int) -> None:
        return None


def test_machines_get_ready_before_the_first_round_and_who_can_not_is_asked_all_the_same(
    tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    def unready(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        act = failing(Code.MODEL_NOT_FOUND) if message.metadata.message_type == records.PREPARE else honest
        return act(plan, assignment, message, name)

    federation = Federation(tmp_path, plan_of(rounds=2), {WRONG: unready}, grid=Machines)
    assert [(told.participants, told.errors) for told in federation.run().rounds] == [(3, {}), (3, {})]
    kinds = [(kind, number) for kind, number, _ in federation.asked]
    assert kinds == [(records.PREPARE, 1)] * 3 + [(records.TRAIN, 1)] * 3 + [(records.TRAIN, 2)] * 3


def test_a_first_round_that_takes_the_first_to_come_does_not_wait_until_all_are_ready(
    tmp_path: Path, plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation = Federation(tmp_path, plan_of(cohort={"size": 2, "oversample": 1.5}), grid=Machines)
    assert federation.run().rounds[0].participants == 2
    assert "round 1: 2 of 3 nodes are ready" in caplog.text


TASKS: list[dict[str, Any]] = [
    {"name": "all", "labels": ["crop", "metal"], "rounds": 2},
    {"name": "north", "where": {"site": ["north"]}, "rounds": 4},
    {"name": "south", "where": {"site": ["south"]}, "rounds": 1},
]


def lacking(rounds: Iterable[int], code: Code = Code.DATA_EMPTY) -> Answer:
    """Fails in these rounds, by default since no row is of their task."""
    return lambda plan, asked, *rest: (failing(code) if asked.round in rounds else honest)(plan, asked, *rest)


def stream_of(plan_of: Callable[..., Plan]) -> Plan:
    """Of whose seed it follows that round 3 draws the first two of three."""
    return plan_of(rounds=7, seed=0, cohort={"size": 2, "minimum": 1}, continual={"stream": TASKS})


def test_a_streams_round_passes_whose_cohort_has_no_rows_of_the_task_and_the_next_asks_others(
    tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    north = range(3, 7)
    federation = Federation(tmp_path, stream_of(plan_of), {"client-0": lacking(north), "client-1": lacking(north)})
    result = federation.run()
    assert trained(federation)[2:6] == [["client-0", "client-1"], *[["client-2"]] * 3]
    assert len(trained(federation)[6]) == 2, "of the next task they may have rows"
    assert [told.participants for told in result.rounds] == [2, 2, 0, 1, 1, 1, 2]
    assert result.rounds[2].errors == {"client-0": 43, "client-1": 43}


def test_who_has_no_rows_is_asked_again_where_nobody_else_is_left(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = stream_of(plan_of)
    federation = Federation(tmp_path, plan, dict.fromkeys(SIZES, lacking(range(3, 6))))
    result = federation.run()
    assert [told.participants for told in result.rounds] == [2, 2, 0, 0, 0, 2, 2], "rows came before the last round"
    state = RunDirectory(tmp_path, plan).load_state()
    assert state is not None
    assert state.rowless == []


def test_fewer_updates_than_the_minimum_are_not_used_where_the_others_have_no_rows(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    actors = dict.fromkeys(("client-0", "client-1"), lacking([3]))
    federation = Federation(tmp_path, plan_of(rounds=7, cohort={"size": 3, "minimum": 2}, continual={"stream": TASKS}), actors)
    assert [told.participants for told in federation.run().rounds] == [3, 3, 0, 3, 3, 3, 3]


def test_who_has_no_rows_is_known_after_a_crash(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    def killed(*_: Any) -> Message:
        raise KeyboardInterrupt

    federation = Federation(tmp_path, stream_of(plan_of), dict.fromkeys(("client-0", "client-1"), lacking(range(3, 7))))
    federation.actors["client-2"] = lambda plan, asked, *rest: (killed if asked.round == 4 else honest)(plan, asked, *rest)
    with pytest.raises(KeyboardInterrupt):
        federation.run()
    again = Federation(tmp_path, federation.plan, federation.actors | {"client-2": honest})
    again.run()
    assert trained(again)[:3] == [["client-2"]] * 3


def test_who_starts_a_stream_is_told_of_small_cohorts(plan_of: Callable[..., Plan]) -> None:
    plan = stream_of(plan_of)
    assert "cohort.size is 2, of 3 clients" in str(note_on_draws(plan, 3))
    assert note_on_draws(plan, 2) is None
    assert note_on_draws(plan_of(cohort={"size": 2, "minimum": 1}), 3) is None


@pytest.mark.parametrize(
    ("second", "changes"),
    [
        (lacking(range(1, 8), Code.WORKER_FAILED), {}),
        (lacking(range(1, 8)), {"continual": {"stream": [{**task, "rounds": 2} for task in TASKS], "method": "adapters"}, "rounds": 6}),
        (lacking(range(1, 8)), {"continual": {}}),
    ],
    ids=["another-error", "a-round-of-sums", "no-stream"],
)
def test_other_rounds_without_an_update_fail(tmp_path: Path, plan_of: Callable[..., Plan], second: Answer, changes: dict[str, Any]) -> None:
    actors = dict.fromkeys(SIZES, lacking(range(1, 8))) | {"client-1": second, "client-2": second}
    plan = plan_of(**{"rounds": 7, "cohort": {"size": 3, "minimum": 1}, "continual": {"stream": TASKS}} | changes)
    Federation(tmp_path, plan, actors).fails(Code.COHORT_TOO_SMALL)
