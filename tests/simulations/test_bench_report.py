"""`lichen bench report` runs every bench and writes what each found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks import report
from lichen.simulations.benchmarks.cli import app


def test_it_writes_a_table_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"step": [{"what": "a|b", "ratio": 1.23456}, {"what": "c", "targets": {"cpu": 1.05}}]}
    monkeypatch.setattr(report, "_run", lambda options: found.get(options[0], {"seconds": None}))
    told = CliRunner().invoke(app, ["report", "--out", str(tmp_path / "B.md")])
    assert told.exit_code == 0, told.output
    text = (tmp_path / "B.md").read_text(encoding="utf-8")
    assert [line.split()[3].strip("`") for line in text.splitlines() if line.startswith("## ")] == [options[0] for options in report.SHORT]
    assert "| what | ratio | targets |\n| --- | --- | --- |\n| a\\|b | 1.235 |  |\n| c |  | cpu 1.05 |\n" in text


def test_every_bench_is_there_with_options_that_it_has() -> None:
    for name, *options in report.SHORT:
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0
        assert "--json" in told.output
        assert all(option in told.output for option in options if option.startswith("--no-") is False and option.startswith("--"))


def test_one_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SHORT", (("privacy", "--lengths", "1"),))
    with pytest.raises(LichenError) as caught:
        report.bench_report(tmp_path / "B.md", lambda _: None)
    assert caught.value.code is Code.CHECK_FAILED
    assert not list(tmp_path.iterdir())
