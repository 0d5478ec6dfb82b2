"""The steps that a node lowers by itself, where the coordinator did not know its speed yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import RecordDict

from lichen.client.agent import Agent
from lichen.client.enrolment import FORMAT, NODE_FILE
from lichen.common.fitting import SHARE
from lichen.common.hardware import Profile, work_of
from lichen.common.plan import Plan, parse_plan
from lichen.common.records import TRAIN, Assignment, build_message, from_config, to_config

DEADLINE, LEFT, STEP_S = 100, 50, 0.5
PRIVATE = {"unit": "example", "epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.1}


@pytest.fixture
def plan(tiny_plan: dict[str, Any], request: pytest.FixtureRequest) -> Plan:
    local = {**tiny_plan["local"], "steps": 10**6}
    return parse_plan(
        {**tiny_plan, "cohort": {"size": 1, "deadline_s": DEADLINE, "assign": ["steps"]}, "local": local, "privacy": request.param}
    )


def lowered(home: Path, plan: Plan) -> int | None:
    """The steps of a message that has waited until only `LEFT` of the deadline is left, at `STEP_S` a step."""
    (home / NODE_FILE).write_text(
        yaml.safe_dump({"format": FORMAT, "name": "node", "coordinator": "127.0.0.1:1", "enrolment": "127.0.0.1:2"})
    )
    assignment = Assignment(plan=plan.model_dump_json(), plan_sha256=plan.sha256(), round=1)
    rows = 8
    speed = round(rows * plan.task.max_length / STEP_S)
    about = {"run_id": 1, "message_id": "a", "src_node_id": 1, "dst_node_id": 2, "message_type": TRAIN, "group_id": "1"}
    message = build_message(RecordDict({"assignment": to_config(assignment)}), **about)

    async def asked() -> None:
        agent = Agent(home)
        agent._profile = Profile(memory_mb=1000, work=work_of(plan), rows_per_step=rows, tokens_per_s=speed)
        agent._keep_to_time(message, plan, assignment, asyncio.get_running_loop().time() + LEFT)
        agent._mailbox.close()
        agent._locks.close()

    asyncio.run(asked())
    return from_config(Assignment, message.content.config_records["assignment"]).steps


@pytest.mark.parametrize("plan", [PRIVATE], indirect=True)
def test_under_privacy_steps_follow_from_the_plan_alone_not_from_what_is_left(tmp_path: Path, plan: Plan) -> None:
    """What is left may follow from how long training on other rows took, and the steps are told."""
    assert lowered(tmp_path, plan) == int(SHARE * DEADLINE / STEP_S)


@pytest.mark.parametrize("plan", [{"unit": "none"}], indirect=True)
def test_without_it_they_follow_from_what_is_left(tmp_path: Path, plan: Plan) -> None:
    steps = lowered(tmp_path, plan)
    assert steps is not None
    assert 1 <= steps <= int(SHARE * LEFT / STEP_S)
