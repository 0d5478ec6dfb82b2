"""`lichen bench rules`, on the tiny model: real runs, and equal bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.simulations.benchmarks.aggregation import DATA, OF_RANKS, Asked, bench_aggregation, plan_of
from lichen.simulations.benchmarks.cli import app

PLAIN = float("inf")


@pytest.fixture
def small(csv_plan: dict[str, Any]) -> list[str]:
    """The tiny model and its rows in place of MiniLM and R8."""
    data = json.dumps(csv_plan["simulation"]["data"])
    labels = json.dumps(csv_plan["task"]["labels"])
    task = ["task.label_descriptions={}", "task.max_length=32", "model.head.init=zeros", f"task.labels={labels}"]
    return [*task, f"model.base={csv_plan['model']['base']}", f"simulation.data={data}", "simulation.partition=iid", "local.steps=2"]


def test_rules_that_send_half_have_twice_the_rounds(small: list[str]) -> None:
    def rounds(kind: str, rule: str, **how: bool) -> int:
        return plan_of(Asked("r8", kind, rule, PLAIN, full=True, settings=tuple(small)), 40, **({"equal_bytes": True} | how)).rounds

    assert rounds("same", "fedavg") == rounds("same", "flora") == rounds("same", "fedex") == 40
    # of each factor 32 × 4 a layer, and a head of 99
    expected = 40 * (4 * 2 * 128 + 99) / (4 * 128 + 99)
    assert rounds("same", "rolora") == rounds("same", "ffa") == round(expected)
    assert rounds("same", "rolora", equal_bytes=False) == 40
    assert rounds("mixed", "zero-padding") == rounds("mixed", "flora") == 40
    assert rounds("mixed", "nested") > 70
    assert rounds("mixed", "fedavg-at-16") < 25


def test_it_runs_each_rule_and_sums_up(small: list[str]) -> None:
    found = list(bench_aggregation(["r8"], ["mixed"], ["zero-padding", "nested"], [0], [PLAIN], 2, settings=small))
    assert [row["rule"] for row in found] == ["nested", "zero-padding"]
    nested, padded = found
    assert (nested["rounds"], padded["rounds"]) == (4, 2)
    assert nested["uplink_bytes"] == pytest.approx(padded["uplink_bytes"], rel=0.15)
    assert all(0 <= row["accuracy"] <= 1 and row["downlink_bytes"] > 0 for row in found)


def test_the_command_tells_means_as_json(small: list[str], tmp_path: Path) -> None:
    options = [word for setting in small for word in ("--set", setting)]
    command = ["rules", "--ranks", "same", "--rule", "rolora", "--seeds", "0,1", "--epsilon", "inf", "--rounds", "1", "--equal-rounds"]
    done = CliRunner().invoke(app, [*command, *options, "--keep", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["runs"]) == 2
    (mean,) = told["means"]
    assert (mean["rule"], mean["seeds"], mean["rounds"]) == ("rolora", 2, 1)
    assert mean["least"] <= mean["accuracy"] <= mean["most"]
    assert (tmp_path / "r8-same-rolora-inf-1" / "result.json").exists()


@pytest.mark.parametrize("data", DATA)
def test_every_rule_that_it_runs_by_default_has_a_sound_plan(data: str) -> None:
    for kind, rules in OF_RANKS.items():
        for rule in rules:
            for epsilon in (PLAIN, 8.0):
                plan = plan_of(Asked(data, kind, rule, epsilon), None, equal_bytes=False)
                assert plan.simulation.ranks == ((2, 4, 8, 16) if kind == "mixed" and rule != "fedavg-at-16" else ())
                adapter = plan.model.adapter
                assert adapter.alpha / adapter.rank == (1.0 if plan.private else 2.0)
                assert adapter.last_layers == (None if plan.private else 2)
                assert plan.evaluation.test_fraction == (0.15 if data == "airlines" else 0)
