"""`lichen bench online` and the files that it lets come: nothing is lost on the way, and nothing comes before the last batch was told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lichen.client.data import load, read_manifest
from lichen.common.plan import Plan, parse_plan
from lichen.coordinator.run_directory import COHORT
from lichen.simulations import deliveries
from lichen.simulations.benchmarks.online import bench_online, told
from lichen.simulations.deliveries import Deliveries
from lichen.simulations.simulate import deal

ONLINE = {"mode": "online", "online": {"clients": 2, "rows": 1, "rounds": 2}}


@pytest.fixture
def plan(csv_plan: dict[str, Any]) -> Plan:
    return parse_plan(csv_plan | {"rounds": 4, "cohort": {"size": 3, "minimum": 2}, "continual": ONLINE})


def test_files_come_to_two_of_three_as_the_run_goes_on(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "SETTLES_S", 0.0)
    homes, run = deal(plan, tmp_path / "nodes")[0].write_all(), tmp_path / "run"
    before = [len(load(home, "train", ["text"])) for home in homes]
    found = Deliveries(plan, homes)
    (run / "checkpoints").mkdir(parents=True)

    def there() -> list[list[str]]:
        return [sorted(file.name for file in (home / "inbox").iterdir()) for home in homes]

    def drawn(round: int, rows: int) -> None:
        (run / COHORT).write_text(json.dumps({"round": round, "nodes": []}))
        (run / "metrics.jsonl").write_text("")

    found.go_on(run)
    assert there() == [[], [], []], "no agent has looked"
    for home in homes:
        (home / "status.json").write_text(json.dumps({"format": 1, "state": "idle", "since": 0, "new_rows": 0}))
    found.go_on(run)
    assert there() == [["0000.parquet"], ["0000.parquet"], []]
    found.go_on(run)
    drawn(1, 0)
    os.utime(run / COHORT, (found._at + 1.5, found._at + 1.5))
    found.go_on(run)
    assert [begin.batch for begin in found.begun] == [1]
    assert found.begun[0].seconds == pytest.approx(1.5, abs=0.01)
    assert there() == [["0000.parquet"], ["0000.parquet"], []], "its rounds are not over"
    monkeypatch.setattr(deliveries, "read_rounds", lambda run: [None, None])
    found.go_on(run)
    assert there() == [["again-0000.parquet"], ["0001.parquet", "again-0000.parquet"], ["0000.parquet", "0001.parquet"]]
    assert found.early == 0
    found.go_on(run)
    drawn(3, 0)
    found.go_on(run)
    assert [begin.batch for begin in found.begun] == [1, 2]
    after = [len(load(home, "train", ["text"])) for home in homes]
    assert after[1:] == before[1:], "all that has come is there"
    assert [read_manifest(home).sources[0].watch for home in homes] == [True] * 3


def test_a_batch_that_begins_by_a_renamed_file_is_counted(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "SETTLES_S", 0.0)
    monkeypatch.setattr(deliveries.Deliveries, "_all_look", lambda self: True)
    homes, run = deal(plan, tmp_path / "nodes")[0].write_all(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    found = Deliveries(plan, homes)
    (run / COHORT).write_text(json.dumps({"round": 1, "nodes": []}))
    found.go_on(run)
    assert found.early == 1


@pytest.mark.long
def test_the_bench_on_the_tiny_model(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    private = {"unit": "example", "epsilon": 8, "delta": 1e-5, "sample_rate": 0.2}
    document = csv_plan | {"rounds": 4, "cohort": {"size": 3, "minimum": 2}, "continual": ONLINE, "privacy": private}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(document))
    figures = bench_online(2, str(file))
    assert len(figures["seconds"]) == 2
    assert (figures["by_renamed"], figures["in_two"]) == (0, 0)
    assert figures["segments"] == 4
    assert "in two batches: 0" in told(figures)
