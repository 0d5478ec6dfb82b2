"""`lichen bench fleet`, and the throttle that makes an agent slow: real processes, in each mode, over a tiny model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lichen.common.plan import find_plan, load_plan
from lichen.common.result import Privacy, Result, Round, Transfer
from lichen.simulations.benchmarks import fleet
from lichen.simulations.benchmarks.throttle import throttled

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_throttled_worker_gets_its_share_of_a_core_and_then_all_of_it(share: float) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT])
    try:
        while not (children := psutil.Process(parent.pid).children()):
            time.sleep(0.01)
        (worker,) = children
        with throttled({parent.pid: share}):
            time.sleep(0.5)  # what it took before
            before, began = worker.cpu_times().user, time.monotonic()
            time.sleep(3.0)
            got = (worker.cpu_times().user - before) / (time.monotonic() - began)
        assert got <= 1.3 * share + 0.02  # less is what another load took
        assert worker.status() != psutil.STATUS_STOPPED
    finally:
        worker.kill()
        parent.wait()


def result_of(*rounds: tuple[float, float | None]) -> Result:
    told = [
        Round(round=n, participants=4, failed=0, uplink_bytes=1, downlink_bytes=1, seconds=s, validation=v and {"accuracy": v})
        for n, (s, v) in enumerate(rounds, 1)
    ]
    return Result(
        run_id="1",
        status="finished",
        plan_sha256="",
        engine="deployed",
        seed=0,
        versions={},
        seconds=None,
        rounds=told,
        privacy=Privacy(unit="none"),
        transfer=Transfer(uplink_bytes=1, downlink_bytes=1),
    )


def test_the_time_is_that_of_the_rounds_until_the_accuracy() -> None:
    run = result_of((10, None), (20, 0.95), (30, None), (40, 0.97), (50, 0.96))
    assert fleet._row("buffered", run, 0.96) | {"target": None} == {
        "mode": "buffered",
        "rounds": 5,
        "round_s": 30,
        "seconds": 100,
        "best": 0.97,
        "ratio": None,
        "target": None,
        "updates": 20,
        "failed": 0,
        "unneeded": 0,
    }
    assert fleet._row("buffered", run, 0.98)["seconds"] is None


def test_each_modes_plan_is_sound_and_does_as_much_work() -> None:
    plain = {"round_s": 20.0}
    plans = {mode: load_plan(find_plan("r8-no-privacy"), fleet._settings(mode, 12, plain)) for mode in fleet.MODES}
    assert plans["deadline"].cohort.deadline_s == 20 * fleet.DEADLINE
    assert plans["oversample"].cohort.asked == 4
    updates = plans["synchronous"].rounds * plans["synchronous"].cohort.size
    assert updates == plans["buffered"].rounds * plans["buffered"].cohort.step_updates
    assert updates == plans["oversample"].rounds * plans["oversample"].cohort.size
    assert plans["deadline"].rounds == 16


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_mode_runs_with_real_agents_and_tells_its_time(
    tmp_path: Path, csv_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "DEADLINE", 4.0)  # so small a model is loaded for longer than it is trained
    plan = csv_plan | {"cohort": {"size": 4, "minimum": 4, "deadline_s": 1000}, "evaluation": {"validation_fraction": 0.2}}
    plan["simulation"] = plan["simulation"] | {"clients": 4}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan), encoding="utf-8")
    rows = {row["mode"]: row for row in fleet.bench_fleet(2, 0.0, fleet.MODES, str(file))}
    assert list(rows) == list(fleet.MODES)
    assert {mode: row["rounds"] for mode, row in rows.items()} == {mode: 2 if mode == "synchronous" else 3 for mode in fleet.MODES}
    assert rows["synchronous"]["updates"] == 8
    assert (rows["oversample"]["updates"], rows["oversample"]["unneeded"]) == (9, 3)
    assert (rows["buffered"]["updates"], rows["buffered"]["failed"]) == (9, 0)
    assert rows["synchronous"]["ratio"] is None
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["target"] == 0.6 for mode, row in rows.items() if mode != "synchronous")
