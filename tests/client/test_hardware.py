"""What a node keeps and tells of its machine: rounded, of the last plan, and nothing where the owner keeps it in."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lichen.client import hardware
from lichen.client.cli import _mebibytes
from lichen.client.hardware import FILE, Hardware, is_kept_in, told_profile
from lichen.client.policy import Policy
from lichen.client.probe import tokens_per_s
from lichen.client.trainer import Trainer
from lichen.client.worker import Limits
from lichen.common.hardware import rounded
from lichen.common.plan import parse_plan

WORK, OTHER = "0" * 16, "f" * 16


def test_the_profile_is_what_is_free_or_what_the_owner_gives(tmp_path: Path) -> None:
    free = Hardware(tmp_path, Limits()).profile()
    assert free.device == "cpu"
    assert free.memory_mb == rounded(free.memory_mb) < hardware.free_mb() * 1.2
    assert free.threads == hardware.usable_threads()
    given = Hardware(tmp_path, Limits(threads=1, memory_mb=555)).profile()
    assert (given.memory_mb, given.threads, given.tokens_per_s) == (550, 1, None)


def test_the_tighter_of_policy_and_command_line_holds() -> None:
    policy = Policy(threads=2, memory_mb=1000)
    assert Limits(threads=4, memory_mb=500).tightened(policy) == Limits(threads=2, memory_mb=500)
    assert Limits(rows=8).tightened(policy) == Limits(threads=2, memory_mb=1000, rows=8)
    assert Limits().tightened(Policy()) == Limits()


def test_a_speed_is_measured_once_and_kept_by_training_and_threads(tmp_path: Path) -> None:
    first = Hardware(tmp_path, Limits(threads=1))
    assert not first.knows_speed(WORK)
    first.keep_speed(WORK, 1200)
    again = Hardware(tmp_path, Limits(threads=1))
    assert again.knows_speed(WORK)
    assert not again.knows_speed(OTHER)
    assert again.profile(WORK, 16).tokens_per_s == 1200
    again.limits = Limits(threads=2)
    assert not again.knows_speed(WORK)


def test_another_machine_or_device_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hardware(tmp_path, Limits()).keep_speed(WORK, 1200)
    monkeypatch.setattr(hardware.platform, "node", lambda: "moved")
    assert not Hardware(tmp_path, Limits()).knows_speed(WORK)


def test_only_so_many_speeds_are_kept(tmp_path: Path) -> None:
    kept = Hardware(tmp_path, Limits())
    for number in range(hardware.MOST_KEPT + 3):
        kept.keep_speed(f"{number:016x}", 10)
    assert not kept.knows_speed(f"{2:016x}")
    assert kept.knows_speed(f"{3:016x}")


def test_what_was_told_last_is_told_again_after_a_restart(tmp_path: Path) -> None:
    first = Hardware(tmp_path, Limits())
    first.keep_speed(WORK, 1200)
    profile = first.profile(WORK, 16, (1500.0, 300.0))
    assert (profile.download_kbit_s, profile.upload_kbit_s) == (1024, 256), "powers of two"
    assert told_profile(tmp_path) is None
    first.told(profile)
    assert told_profile(tmp_path) == profile.model_dump(mode="json")
    again = Hardware(tmp_path, Limits()).profile()
    assert again.model_copy(update={"memory_mb": profile.memory_mb}) == profile
    first.told(None)
    assert told_profile(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "ram": 5}', "{"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    Hardware(tmp_path, Limits()).keep_speed(WORK, 10)
    assert json.loads((tmp_path / FILE).read_text())["tokens_per_s"] == {f"{WORK} None": 10}
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("text", "kept_in"),
    [
        (None, False),
        ("threads: 2\n", False),
        ("profile: true\n", False),
        ("profile: false\n", True),
        ("profile: false\nprofile: true\n", True),
        ("profile: no!\n", True),
        ("{", True),
    ],
)
def test_the_policy_keeps_it_in_and_so_does_one_that_cannot_be_understood(tmp_path: Path, text: str | None, kept_in: bool) -> None:
    if text is not None:
        (tmp_path / "policy.yaml").write_text(text)
    assert is_kept_in(tmp_path) is kept_in


def test_a_device_that_cannot_be_looked_at_is_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert hardware._look("nonsense") == ("cpu", None)
    assert "nonsense" in caplog.text


@pytest.mark.parametrize(("size", "mebibytes"), [("2G", 2048), ("800M", 800), ("1.5 GiB", 1536), ("2147483648", 2048), ("900000k", 878)])
def test_sizes_as_people_write_them(size: str, mebibytes: int) -> None:
    assert _mebibytes(size) == mebibytes


@pytest.mark.parametrize("size", ["", "two", "-1G", "100M", "G"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(Exception, match="is no size"):
        _mebibytes(size)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"unit": "example", "sample_rate": 0.1}])
def test_the_probe_trains_on_made_up_rows_of_the_plans_length(
    tiny_plan: dict[str, Any], privacy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(parse_plan({**tiny_plan, "privacy": privacy}))
    jobs = []
    run = trainer.run
    monkeypatch.setattr(trainer, "run", lambda job: (jobs.append(job), run(job))[1])
    assert tokens_per_s(trainer, steps=3) > 0
    assert len(jobs) == 4, "one more than is counted"
    for job in jobs:
        assert job.data.lengths.tolist() == [32] * 8
        assert (job.private is not None) == (privacy["unit"] == "example")
    jobs.clear()
    assert tokens_per_s(trainer, seconds=0.0) > 0
    assert len(jobs) == 2, "on a slow machine it takes one"
