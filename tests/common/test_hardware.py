"""Profiles: rounded, as they travel, as files, and of which training they tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.common.channel import framing
from lichen.common.channel.fleet_pb2 import AgentFrame
from lichen.common.channel.fleet_pb2 import Profile as Frame
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import TIERS, Profile, find_profile, from_frame, rounded, rows_per_step, to_frame, work_of
from lichen.common.plan import parse_plan

WORK = "0123456789abcdef"
FULL = Profile(
    device="cuda",
    memory_mb=4096,
    threads=8,
    work=WORK,
    tokens_per_s=1200,
    rows_per_step=16,
    download_kbit_s=1024,
    upload_kbit_s=256,
)


@given(st.floats(0, 2**31, exclude_max=True))
def test_a_number_keeps_two_digits_and_is_never_more(value: float) -> None:
    told = rounded(value)
    assert len(str(told).rstrip("0")) <= 2
    assert told <= max(value, 1) < told * 1.1 + 1


@pytest.mark.parametrize("profile", [FULL, Profile(memory_mb=1), *TIERS.values()])
def test_what_travels_comes_back(profile: Profile) -> None:
    frame = AgentFrame(profile=to_frame(profile))
    kind, read = framing.decode_agent_frame(frame.SerializeToString())
    assert kind == "profile"
    assert from_frame(read.profile) == profile


def test_every_field_travels_and_nothing_else() -> None:
    assert {field.name for field in Frame.DESCRIPTOR.fields} == set(Profile.model_fields) - {"format"}
    assert from_frame(to_frame(None)) is None


@pytest.mark.parametrize("frame", [Frame(device="cpu"), Frame(memory_mb=2**32 - 1), Frame(memory_mb=1, tokens_per_s=2**32 - 1)])
def test_what_is_no_profile_is_refused(frame: Frame) -> None:
    with pytest.raises(LichenError) as caught:
        from_frame(frame)
    assert caught.value.code is Code.FRAME_INVALID


def test_a_profile_is_a_file_or_a_tier(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    file.write_text(json.dumps(FULL.model_dump(mode="json")))
    assert find_profile(str(file)) == FULL
    assert find_profile("laptop-16gb") is TIERS["laptop-16gb"]
    file.write_text("device: cpu\nmemory_mb: 2000\n")
    assert find_profile(str(file)) == Profile(memory_mb=2000)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, Code.DATA_NOT_FOUND),
        ("memory_mb: 0", Code.PLAN_INVALID),
        ("ram: 5", Code.PLAN_INVALID),
        ("{", Code.PLAN_INVALID),
        ("{memory_mb: 1, memory_mb: 2}", Code.PLAN_INVALID),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, text: str | None, code: Code) -> None:
    file = tmp_path / "node.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LichenError) as caught:
        find_profile(str(file))
    assert caught.value.code is code


def test_a_speed_belongs_to_the_parts_of_a_plan_that_it_depends_on(tiny_plan: dict[str, Any]) -> None:
    def work(**changes: Any) -> str:
        return work_of(parse_plan({**tiny_plan, **changes}))

    assert work() == work(rounds=9, name="other", seed=7, local={**tiny_plan["local"], "steps": 900, "learning_rate": 0.5})
    others = [
        work(),
        work(task={**tiny_plan["task"], "max_length": 16}),
        work(model={**tiny_plan["model"], "adapter": {"kind": "head"}}),
        work(local={**tiny_plan["local"], "batch_size": 4}),
        work(privacy={"unit": "example"}),
    ]
    assert len(set(others)) == len(others)


def test_rows_of_a_step_are_the_expected_ones(tiny_plan: dict[str, Any]) -> None:
    plain = parse_plan(tiny_plan)
    drawn = parse_plan({**tiny_plan, "privacy": {"unit": "example", "sample_rate": 0.1}})
    assert rows_per_step(plain, None) == rows_per_step(plain, 10**6) == 8
    assert (rows_per_step(drawn, 500), rows_per_step(drawn, 3), rows_per_step(drawn, None)) == (50, 1, None)
