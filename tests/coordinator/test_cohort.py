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
from lichen.simulations.engine import InProcessGrid
from scripted_clients import (
    PRIVATE,
    SIZES,
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
