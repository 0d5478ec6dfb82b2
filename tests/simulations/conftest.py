"""A plan whose federation is played on this machine: the tiny model, and rows in CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LEARNS = {"steps": 12, "batch_size": 8, "learning_rate": 0.02, "head_learning_rate": 0.1}


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as a CSV file with their keys as its header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def csv_files(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Callable[..., list[dict[str, str]]]) -> Path:
    """A folder with `train.csv` and `test.csv`; their columns have other names than the task's fields, and rows come from two sites."""
    folder = tmp_path_factory.mktemp("csv")
    for name, count, seed in (("train", 180, 0), ("test", 60, 1)):
        rows = tiny_rows(count, seed)
        write_csv(folder / f"{name}.csv", [{"BODY": r["text"], "TOPIC": r["label"], "SITE": "ab"[i % 2]} for i, r in enumerate(rows)])
    return folder


@pytest.fixture
def csv_plan(tiny_plan: dict[str, Any], csv_files: Path) -> dict[str, Any]:
    """A plan, as a dict to change, that learns its rows in two rounds of two of three clients."""
    data = {
        "path": str(csv_files / "train.csv"),
        "test": str(csv_files / "test.csv"),
        "fields": {"text": "BODY", "label": "TOPIC", "site": "SITE"},
    }
    return tiny_plan | {"local": LEARNS, "simulation": {"clients": 3, "partition": "iid", "data": data}}
