"""`lichen bench aggregate` checks its result, says what it measured, and holds no more memory for more updates."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.simulations.benchmarks.aggregate import TARGET, bench_aggregate
from lichen.simulations.benchmarks.cli import app


def test_it_prints_speeds_and_ratios() -> None:
    told = CliRunner().invoke(app, ["aggregate", "--updates", "9", "--megabytes", "4", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["updates"], found["distinct"], found["megabytes"], found["target"]) == (9, 8, 4, TARGET)
    assert found["ratio"] == pytest.approx(found["gb_s"] / found["copy_gb_s"])
    assert found["naive_ratio"] == pytest.approx(found["naive_gb_s"] / found["copy_gb_s"])
    lines = CliRunner().invoke(app, ["aggregate", "--updates", "2", "--megabytes", "1"]).stdout
    assert "2 updates of 1 MB from a spool (2 distinct files" in lines
    assert "at least 0.5" in lines


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    few, many = (bench_aggregate(updates, 20)["peak_mb"] for updates in (16, 64))
    assert many < few + 20 * 4, "48 more updates of 20 MB"


def test_a_wrong_mean_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FedAvg.mean
    monkeypatch.setattr(FedAvg, "mean", lambda self: original(self) * 1.001)
    with pytest.raises(LichenError) as caught:
        bench_aggregate(2, 1)
    assert caught.value.code is Code.CHECK_FAILED
