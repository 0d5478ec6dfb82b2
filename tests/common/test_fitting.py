"""What a node is asked: as much as fits its memory and the deadline, never more than the plan, and nothing that may not vary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.assignment import ASSIGNED, own_plan
from lichen.common.fitting import SHARE, fit
from lichen.common.hardware import Profile, work_of
from lichen.common.model.memory import Shape, peak_mb
from lichen.common.plan import Plan, parse_plan
from lichen.common.records import Assignment
from lichen.common.tasks import make_task

SHAPE = Shape(parameters=110_000_000, stored_bytes=4, trainable=600_000, trained_layers=12, features=6912, full=False)
"""Of BERT base, with LoRA."""
LEAST = {"task": {"labels": ["a", "b"], "max_length": 256}, "model": {"base": "x"}, "rounds": 5}


def plan_of(*assign: str, **local: Any) -> Plan:
    local = {"steps": 100, "batch_size": 32, **local}
    plan = parse_plan({**LEAST, "local": local, "cohort": {"size": 1, "deadline_s": 1000}})
    # without the checks: no one rule can take all that may vary
    return plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"assign": assign})})


def profile_of(plan: Plan, memory_mb: int, tokens_per_s: int | None = None, **more: Any) -> Profile:
    return Profile(memory_mb=memory_mb, work=work_of(plan), tokens_per_s=tokens_per_s, **more)


@settings(deadline=None)
@given(
    st.sets(st.sampled_from(ASSIGNED)),
    st.integers(100, 40_000),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_the_node_accepts_what_it_is_asked_and_it_is_no_more_than_the_plan(
    assign: set[str], memory_mb: int, speed: int | None, link: int | None
) -> None:
    plan = plan_of(*sorted(assign))
    found = fit(plan, SHAPE, profile_of(plan, memory_mb, speed, download_kbit_s=link, upload_kbit_s=link), (10**7, 10**7))
    assert found.changes.keys() <= assign
    own = own_plan(plan, Assignment(plan="", plan_sha256="", round=1, **found.changes))
    assert own.privacy == plan.privacy
    assert found.changes.get("steps", 1) <= 100
    assert found.memory_mb == peak_mb(own, SHAPE)
    assert found.possible <= (found.memory_mb <= memory_mb)
    assert found.possible or found.reasons


def test_a_large_machine_does_the_plan_as_it_is() -> None:
    plan = plan_of(*ASSIGNED)
    found = fit(plan, SHAPE, profile_of(plan, 64_000, 10**6))
    assert (found.changes, found.reasons, found.possible, found.steps) == ({}, (), True, 100)


@pytest.mark.parametrize("memory_mb", [1500, 2500, 4000])
def test_rows_at_once_are_halved_until_they_fit_and_no_more_often(memory_mb: int) -> None:
    plan = plan_of("max_physical_batch_size")
    found = fit(plan, SHAPE, profile_of(plan, memory_mb))
    rows = found.changes["max_physical_batch_size"]
    assert peak_mb(plan, SHAPE, rows=rows) <= memory_mb < peak_mb(plan, SHAPE, rows=2 * rows)


def test_what_no_setting_makes_fit_is_refused_with_the_reason() -> None:
    plan = plan_of("max_physical_batch_size")
    found = fit(plan, SHAPE, profile_of(plan, 800))
    assert not found.possible
    assert "800 are free" in found.reasons[-1]
    assert found.changes == {"max_physical_batch_size": 1}


def test_a_small_machine_gets_its_tiers_rank_and_length_where_they_may_vary() -> None:
    plan = plan_of("rank", "max_length", "max_physical_batch_size")
    found = fit(plan, SHAPE, profile_of(plan, 3000))
    assert (found.changes["rank"], found.changes["max_length"]) == (4, 128)
    assert fit(plan_of("steps"), SHAPE, profile_of(plan, 10_000)).changes == {}


def test_steps_are_what_fits_the_deadline_less_the_way_of_the_payloads() -> None:
    plan = plan_of("steps")
    step_s = 32 * 256 / 500
    free = fit(plan, SHAPE, profile_of(plan, 64_000, 500))
    assert free.step_s == step_s
    assert free.changes == {"steps": int(SHARE * 1000 / step_s)}
    linked = profile_of(plan, 64_000, 500, download_kbit_s=100, upload_kbit_s=50)
    slow = fit(plan, SHAPE, linked, (10**6, 10**6))
    assert slow.changes == {"steps": int(SHARE * (1000 - 80 - 160) / step_s)}


def test_a_node_that_will_be_late_is_told_of_where_steps_may_not_vary() -> None:
    plan = plan_of()
    found = fit(plan, SHAPE, profile_of(plan, 64_000, 500))
    assert (found.changes, found.possible) == ({}, True)
    assert "does not let steps vary" in found.reasons[0]
    assert not fit(plan, SHAPE, profile_of(plan, 64_000, 5)).possible, "not one step fits"


def test_the_speed_of_another_training_says_nothing() -> None:
    plan = plan_of("steps")
    other = profile_of(plan_of("steps", batch_size=8), 64_000, 1)
    assert fit(plan, SHAPE, other).step_s is None
    assert fit(plan, SHAPE, other).changes == {}


@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_an_outline_has_the_shape_of_the_model_and_no_values(tiny_plan: dict[str, Any], kind: str) -> None:
    task = make_task(parse_plan({**tiny_plan, "model": {**tiny_plan["model"], "adapter": {"kind": kind}}}))
    outline, model = task.outline(), task.build()
    assert Shape.of(outline) == Shape.of(model)
    assert {name: tensor.shape for name, tensor in outline.trainable.items()} == {name: t.shape for name, t in model.trainable.items()}
    assert all(tensor.is_meta for tensor in outline.network.parameters())
    shape = Shape.of(model)
    assert (shape.trained_layers, shape.full) == {"lora": (2, False), "head": (0, False), "full": (2, True)}[kind]
    assert shape.features == 4 * 32 + 64 + 32


def test_more_rows_longer_texts_and_more_weights_take_more_memory() -> None:
    plan = plan_of()
    assert peak_mb(plan, SHAPE, rows=4) < peak_mb(plan, SHAPE, rows=8) < peak_mb(plan, SHAPE)
    assert peak_mb(plan, SHAPE, length=64) < peak_mb(plan, SHAPE)
    full = Shape(parameters=110_000_000, stored_bytes=4, trainable=110_000_000, trained_layers=12, features=6912, full=True)
    assert peak_mb(plan, full) > peak_mb(plan, SHAPE) + 2000
