"""`lichen bench round` times real processes, and tells what of a round is neither training nor evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks.cli import app
from lichen.simulations.benchmarks.round import ROLES, TARGET, bench_round, common, length, told, union, without
from lichen.simulations.benchmarks.timed import Span, read, time_parts

PRIVACY = {"unit": "example", "epsilon": 8, "delta": 1e-5, "clip": 0.5, "sample_rate": 0.2}


def test_moments_are_united_shared_and_left() -> None:
    apart = union([(5, 6), (0, 2), (1, 3), (3, 4)])
    assert apart == [(0, 4), (5, 6)]
    assert common([(1, 5.5)], apart) == [(1, 4), (5, 5.5)]
    assert without((-1, 7), apart) == [(-1, 0), (4, 5), (6, 7)]
    assert without((1, 3), apart) == []
    assert length(without((-1, 7), apart)) == 3


@pytest.mark.long
def test_a_real_round_is_taken_apart(csv_plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = {"steps": 3, "optimizer": "sgd", "learning_rate": 0.01}
    simulation = csv_plan["simulation"] | {"clients": 2}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(csv_plan | {"local": local, "privacy": PRIVACY, "simulation": simulation}))
    ran = CliRunner().invoke(app, ["round", "--rounds", "4", "--plan", str(file), "--json"])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout)
    whole, *parts = rows
    assert (whole["what"], whole["rounds"], whole["target"]) == ("round", 2, TARGET)
    assert 0 < whole["not_training_or_evaluating"] <= whole["most"] < 1
    assert whole["not_training_or_evaluating"] <= whole["not_training"]
    assert 0 < whole["rest_s"] < whole["seconds"]
    found = {row["what"]: row for row in parts}
    left_out = {"round", "frozen layers", "read kept layers"}  # the tiny plan trains all layers
    assert found.keys() == {f"{role}: {part}" for role, own in ROLES.items() for part in ["all", *own] if part not in left_out}
    assert found["worker: train"]["of_the_rest"] == 0 == found["coordinator: evaluate"]["of_the_rest"]
    assert 0 < found["worker: forward"]["cpu_s"] < found["worker: train"]["cpu_s"] < found["worker: answer"]["cpu_s"]
    assert found["worker: tokenise"]["first_cpu_s"] > 0 == found["worker: tokenise"]["cpu_s"]
    assert found["coordinator: ask"]["seconds"] < whole["seconds"]
    monkeypatch.setenv("COLUMNS", "200")
    line, table = told(rows)
    assert "at most 0.03: " in line
    assert table.row_count == len(parts)


def test_too_few_rounds_are_told() -> None:
    with pytest.raises(LichenError, match="2 rounds") as caught:
        bench_round(2).__next__()
    assert caught.value.code is Code.CHECK_FAILED


def test_a_part_is_noted_also_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.coordinator import optimizers

    def fails() -> None:
        raise ValueError("as ever")

    monkeypatch.setattr(optimizers, "server_step", fails)
    time_parts(tmp_path, "coordinator", {"step": "coordinator.optimizers:server_step"})
    timed: Callable[[], None] = optimizers.server_step
    with pytest.raises(ValueError, match="as ever"):
        timed()
    (span,) = read(tmp_path)
    assert isinstance(span, Span)
    assert span.part == "step"
    assert span.began <= span.ended
    assert span.cpu is not None
