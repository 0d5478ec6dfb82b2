"""`lichen bench privacy` runs its ways on one configuration, and says what it was asked."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lichen.simulations.benchmarks import privacy
from lichen.simulations.benchmarks.cli import app


def test_it_prints_ratios_beside_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "ROWS", {64: 2})
    monkeypatch.setattr(privacy, "VOCABULARY", 100)
    monkeypatch.setattr(privacy, "_peak_memory", lambda config, way: {"plain": 100, "ahead": 105}[way])
    told = CliRunner().invoke(app, ["privacy", "--repeats", "1", "--lengths", "64", "--adapter", "lora", "--json"])
    assert told.exit_code == 0, told.output
    bert, llama = json.loads(told.stdout)
    assert (bert["family"], llama["family"]) == ("bert", "llama")
    for row in (bert, llama):
        assert row["targets"] == {"cpu": 1.05, "wall": 1.05, "memory": 1.08}
        assert row["memory"] == 1.05
        # far from a measurement, but a step that does nothing, or everything twice, is out
        assert 0.2 < row["cpu"] < 5
        assert row["wall"] > 0
        assert row["hooks_cpu"] > 0.2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("privacy", "--lengths", "abc"), "'abc' is no list of numbers"),
        (("privacy", "--lengths", "128"), "128 is none of 64, 256"),
        (("privacy", "--adapter", "head"), "'head' is none of lora, full"),
        (("r8", "--seeds", "0,,1"), "is no list of numbers"),
    ],
)
def test_a_bad_option_is_told_as_such(arguments: tuple[str, ...], told: str) -> None:
    found = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, arguments)
    assert found.exit_code == 2
    assert told in found.output


@pytest.mark.long
def test_the_peak_of_a_step_is_its_own() -> None:
    peak = privacy._peak_memory(privacy.Config("bert", "lora", 64), "plain")
    assert 60e6 < peak < 500e6
