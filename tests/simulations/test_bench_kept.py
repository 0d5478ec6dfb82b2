"""A bench's runs in a directory: one that was cut goes on, one that is finished is read, and no other run is taken for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.simulations.benchmarks.kept import run_kept


def test_a_finished_run_is_read_and_a_cut_one_goes_on(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    plan, out = parse_plan(csv_plan | {"rounds": 2}), tmp_path / "runs" / "one"
    first = run_kept(plan, out, workers=1)
    written = (out / "result.json").stat()
    assert run_kept(plan, out) == first
    assert (out / "result.json").stat() == written
    document = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps(document | {"status": "running", "final": None}))
    (out / "checkpoints" / "round-00002.safetensors").unlink()
    again = run_kept(plan, out, workers=1)
    assert (again.status, again.final) == ("finished", first.final)


def test_another_plans_run_is_refused_and_left_alone(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    run_kept(parse_plan(csv_plan | {"rounds": 1}), tmp_path / "one", workers=1)
    written = (tmp_path / "one" / "result.json").stat()
    with pytest.raises(LichenError) as caught:
        run_kept(parse_plan(csv_plan | {"rounds": 1, "seed": 5}), tmp_path / "one")
    assert caught.value.code is Code.OUTPUT_UNUSABLE
    assert (tmp_path / "one" / "result.json").stat() == written


def test_a_run_that_spent_more_than_its_plan_allows_is_no_figure(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    private = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
    plan = parse_plan(csv_plan | {"rounds": 1, "privacy": private})
    assert run_kept(plan, tmp_path / "one", workers=1).privacy.max_epsilon is not None
    document = json.loads((tmp_path / "one" / "result.json").read_text())
    document["privacy"]["max_epsilon"] = 8.5
    (tmp_path / "one" / "result.json").write_text(json.dumps(document))
    with pytest.raises(LichenError) as caught:
        run_kept(plan, tmp_path / "one")
    assert caught.value.code is Code.CHECK_FAILED
