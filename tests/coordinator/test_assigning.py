"""What a node is asked otherwise than the plan says, and what the operator's log tells of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lichen.common.codec.registry import uplink_codec
from lichen.common.errors import Code, LichenError
from lichen.common.fitting import fit
from lichen.common.hardware import Profile, work_of
from lichen.common.model.memory import Shape
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import make_task
from lichen.coordinator import assigning
from lichen.coordinator.assigning import Assigner

PAYLOAD = 3_000_000


@pytest.fixture(params=["eden", "none"])
def plan(tiny_plan: dict[str, Any], request: pytest.FixtureRequest) -> Plan:
    cohort = {"size": 1, "deadline_s": 100, "assign": ["steps"]}
    local = {"steps": 1000, "batch_size": 8}
    return parse_plan(tiny_plan | {"cohort": cohort, "local": local, "transfer": {"uplink": {"codec": request.param}}})


@pytest.fixture
def profiles(plan: Plan) -> dict[int, Profile | None]:
    """Of three nodes: one that tells nothing, a slow one on a slow link, one that has no room for the model."""
    slow = {"tokens_per_s": 2000, "upload_kbit_s": 8, "download_kbit_s": 4000}
    return {1: None, 2: Profile(memory_mb=8000, work=work_of(plan), **slow), 3: Profile(memory_mb=1, work=work_of(plan))}


def test_each_node_is_asked_what_fits_its_profile_and_both_ways(plan: Plan, profiles: dict[int, Profile | None]) -> None:
    model = make_task(plan).build()
    assigner = Assigner(plan, model, profiles.get, str)
    assert assigner.of(1, PAYLOAD) == {}
    codec, count = uplink_codec(plan.transfer.uplink), sum(tensor.numel() for tensor in model.trainable.values())
    slow = profiles[2]
    assert slow is not None
    expected = fit(plan, Shape.of(model), slow, (PAYLOAD, codec.length(count) if codec else 4 * count)).changes
    assert assigner.of(2, PAYLOAD) == expected
    assert 0 < expected["steps"] < 1000
    assert assigner.of(2, 0)["steps"] > expected["steps"], "what is fetched takes time, too"


def test_the_log_tells_what_is_new_once(plan: Plan, profiles: dict[int, Profile | None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, assigning.__name__)
    assigner = Assigner(plan, make_task(plan).build(), profiles.get, lambda node: f"node-{node}")
    for _ in range(2):
        for node in (1, 2, 3):
            assigner.of(node, PAYLOAD)
    told = [(record.levelno, record.getMessage().split()[0]) for record in caplog.records]
    assert told == [(logging.INFO, "node-2"), (logging.WARNING, "node-3")]
    profiles[3] = profiles[2]
    assigner.of(3, PAYLOAD)
    assert [record.levelno for record in caplog.records[2:]] == [logging.INFO]


def test_of_a_model_that_nothing_is_known_of_all_are_asked_the_plan(
    plan: Plan, profiles: dict[int, Profile | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(model: object) -> Shape:
        raise LichenError(Code.MODEL_UNSUPPORTED, "its layers can't be told")

    monkeypatch.setattr(Shape, "of", unknown)
    assigner = Assigner(plan, make_task(plan).build(), profiles.get, str)
    assert all(assigner.of(node, PAYLOAD) == {} for node in profiles)
    assert "its layers can't be told" in caplog.text
