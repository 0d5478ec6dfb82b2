"""The time that a message is given, and the steps that a node lowers by itself, where the coordinator did not know its speed yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Message, RecordDict

from lichen.client.agent import Agent
from lichen.client.enrolment import FORMAT, NODE_FILE
from lichen.client.worker import Limits
from lichen.common.fitting import SHARE
from lichen.common.hardware import Profile, work_of
from lichen.common.plan import Plan, parse_plan
from lichen.common.records import (
    EVALUATE,
    PREPARE,
    TRAIN,
    Assignment,
    build_message,
    from_config,
    message_from_bytes,
    message_to_bytes,
    reply,
    to_config,
)

DEADLINE, LEFT, STEP_S = 100, 50, 0.5
PRIVATE = {"unit": "example", "epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.1}


@pytest.fixture
def plan(tiny_plan: dict[str, Any], request: pytest.FixtureRequest) -> Plan:
    local = {**tiny_plan["local"], "steps": 10**6}
    return parse_plan(
        {**tiny_plan, "cohort": {"size": 1, "deadline_s": DEADLINE, "assign": ["steps"]}, "local": local, "privacy": request.param}
    )


def agent_of(home: Path) -> Agent:
    """One that is enrolled, and not connected; in a running loop."""
    (home / NODE_FILE).write_text(
        yaml.safe_dump({"format": FORMAT, "name": "node", "coordinator": "127.0.0.1:1", "enrolment": "127.0.0.1:2"})
    )
    return Agent(home)


def message_of(plan: Plan, kind: str = TRAIN) -> Message:
    assignment = Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=1)
    about = {"run_id": 1, "message_id": "a", "src_node_id": 1, "dst_node_id": 2, "message_type": kind, "group_id": "1"}
    return build_message(RecordDict({"assignment": to_config(assignment)}), **about)


def close(agent: Agent) -> None:
    agent._mailbox.close()
    agent._locks.close()


def lowered(home: Path, plan: Plan) -> int | None:
    """The steps of a message that has waited until only `LEFT` of the deadline is left, at `STEP_S` a step."""
    message, rows = message_of(plan), 8
    speed = round(rows * plan.task.max_length / STEP_S)

    async def asked() -> None:
        agent = agent_of(home)
        agent._profile = Profile(memory_mb=1000, work=work_of(plan), rows_per_step=rows, tokens_per_s=speed)
        assignment = from_config(Assignment, message.content.config_records["assignment"])
        agent._keep_to_time(message, plan, assignment, asyncio.get_running_loop().time() + LEFT)
        close(agent)

    asyncio.run(asked())
    return from_config(Assignment, message.content.config_records["assignment"]).steps


@pytest.mark.parametrize("plan", [{"unit": "none"}], indirect=True)
@pytest.mark.parametrize(
    ("kind", "partial", "deadlines"), [(PREPARE, False, 4), (TRAIN, False, 1), (EVALUATE, False, 1), (TRAIN, True, 4), (EVALUATE, True, 1)]
)
def test_who_gets_ready_or_ends_in_time_by_itself_may_load_for_longer_than_a_deadline(
    tmp_path: Path, plan: Plan, kind: str, partial: bool, deadlines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan.model_copy(update={"local": plan.local.model_copy(update={"partial": partial})})
    (tmp_path / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\nprofile: false\n")
    given: list[float] = []

    async def asked() -> None:
        agent = agent_of(tmp_path)

        async def answer(message: bytes, limits: Limits, seconds: float) -> bytes:
            given.append(seconds)
            return message_to_bytes(reply(message_from_bytes(message), RecordDict()))

        monkeypatch.setattr(agent._worker, "ask", answer)
        assert not (await agent.handle(message_of(plan, kind))).has_error()
        close(agent)

    asyncio.run(asked())
    assert given == [pytest.approx(deadlines * DEADLINE, abs=5)]


@pytest.mark.parametrize("plan", [PRIVATE], indirect=True)
def test_under_privacy_steps_follow_from_the_plan_alone_not_from_what_is_left(tmp_path: Path, plan: Plan) -> None:
    """What is left may follow from how long training on other rows took, and the steps are told."""
    assert lowered(tmp_path, plan) == int(SHARE * DEADLINE / STEP_S)


@pytest.mark.parametrize("plan", [{"unit": "none"}], indirect=True)
def test_without_it_they_follow_from_what_is_left(tmp_path: Path, plan: Plan) -> None:
    steps = lowered(tmp_path, plan)
    assert steps is not None
    assert 1 <= steps <= int(SHARE * LEFT / STEP_S)
