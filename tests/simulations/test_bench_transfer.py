"""`lichen bench transfer` says of each codec what it measured, and checks that what is added is what is decoded."""

from __future__ import annotations

import itertools
import json

import pytest
from typer.testing import CliRunner

from lichen.common.codec.plain import HalfPayload
from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks.cli import app
from lichen.simulations.benchmarks.transfer import CASES, TARGETS, bench_transfer


def test_it_prints_bits_errors_and_speeds() -> None:
    told = CliRunner().invoke(app, ["transfer", "--parameters", "300000", "--repeats", "1", "--json"])
    assert told.exit_code == 0, told.output
    found = {row["codec"]: row for row in json.loads(told.stdout)}
    assert len(found) == len(CASES)
    eden = found["eden-4"]
    assert eden["targets"] == TARGETS
    assert eden["bits"] <= TARGETS["bits"]
    assert eden["nmse"] <= TARGETS["nmse"]
    assert eden["heavy_nmse"] <= TARGETS["nmse"]
    assert found["fp16"]["nmse"] < 1e-6
    assert all(row["encode"] > 0 and row["add"] > 0 for row in found.values())
    table = CliRunner().invoke(app, ["transfer", "--parameters", "1000", "--repeats", "1"], env={"COLUMNS": "200"}).stdout
    assert "blockwise-8" in table
    assert "(0.0105)" in table


def test_neither_end_makes_a_second_copy_of_the_model() -> None:
    count = 20_000_000  # 80 MB in 32-bit floats
    for row in bench_transfer(count, 1):
        encoded = count * (row["bits"] + 0.2) / 8 / 1e6  # the file's pages
        spare = 80 * 0.1 * 3 if row["codec"].startswith("topk") else 0  # places and values of a tenth
        assert row["peak_mb"] < encoded + spare + 20, row["codec"]


def test_a_wrong_sum_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HalfPayload.values
    calls = itertools.count()
    monkeypatch.setattr(HalfPayload, "values", lambda self, part: original(self, part) * (1 + next(calls) / 1000))
    with pytest.raises(LichenError) as caught:
        list(bench_transfer(1000, 1))
    assert caught.value.code is Code.CHECK_FAILED
