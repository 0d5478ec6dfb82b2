"""`lichen bench base`: memory in fresh processes, steps, and R8 by precision with its own check."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks import base
from lichen.simulations.benchmarks.cli import app

pytestmark = pytest.mark.long
SHORT = ["rounds=1", "task.max_length=12", "aggregation.average_last=1", "local.steps=2", "simulation.clients=4"]


@pytest.mark.timeout(600)
def test_what_it_measures_is_within_its_targets() -> None:
    told = CliRunner().invoke(app, ["base", "--rows", "48", "--repeats", "1", "--json"])
    assert told.exit_code == 0, told.output
    whole, half, int8, again = json.loads(told.stdout)
    assert [row["base"] for row in (whole, half, int8, again)] == ["float32", "bfloat16", "int8", "float32"]
    assert whole["mapped_mb"] > 80
    assert 0.45 < half["memory"] < 0.55
    assert int8["targets"] == {"memory": 0.3, "cpu": 1.3}
    assert int8["memory"] <= 0.3
    assert int8["used"] <= 0.33
    assert int8["mapped_mb"] < 1, "the file is let go of"
    assert int8["peak_mb"] < 2 * whole["memory_mb"]
    assert 0 < half["apart"] < int8["apart"] < 0.02 * int8["scores"]
    assert int8["cpu"] < 1.6  # wide: the machine is shared
    assert again["training_mb"] < 0.95 * whole["training_mb"]  # the allocator keeps as much again
    assert again["apart"] == 0


@pytest.mark.timeout(900)
def test_r8_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(base.bench_base_r8([0], ["int8"], float("inf"), SHORT))
    assert [(row["base"], row["seed"]) for row in rows[:2]] == [("float32", 0), ("int8", 0)]
    assert rows[0]["accuracy"] == rows[0]["over_its_base"]
    assert [row["scored_over"] for row in rows[2:]] == ["float32", "int8"]
    for row, accuracy in zip(rows[2:], (rows[1]["accuracy"], rows[1]["over_its_base"]), strict=True):
        assert row["lost"] == pytest.approx(rows[0]["accuracy"] - accuracy)
        assert row["lost"] <= row["at_most"]
    original: Any = base.right_answers
    monkeypatch.setattr(base, "right_answers", lambda plan, out: ~original(plan, out))
    with pytest.raises(LichenError) as caught:
        list(base.bench_base_r8([0], [], float("inf"), SHORT))
    assert caught.value.code is Code.CHECK_FAILED
