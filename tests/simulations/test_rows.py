"""Rows in an Arrow file: read in any part as they were written, for their owner's eyes, whole or not at all."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.common.errors import Code, LichenError
from lichen.simulations import rows
from lichen.simulations.rows import Groups, StoredRows, numbered, store, values_of

ROWS = [{"text": f"text {number}", "label": "abc"[number % 3], "n": number} for number in range(5000)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredRows:
    return store(tmp_path_factory.mktemp("rows") / "deep" / "train.arrow", pa.Table.from_pylist(ROWS).to_batches(max_chunksize=1500))


def test_rows_are_what_was_written(stored: StoredRows) -> None:
    assert (len(stored), stored.columns, stored[4321]) == (5000, ["text", "label", "n"], ROWS[4321])
    assert list(stored) == ROWS
    assert list(stored.column("label")) == [row["label"] for row in ROWS]
    assert list(stored.column("gone")) == [None] * 5000
    assert list(values_of(stored, "n")) == list(values_of(ROWS, "n"))
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chosen=st.sets(st.integers(0, 4999), max_size=40).map(sorted), data=st.data())
def test_any_of_them_and_any_of_those(stored: StoredRows, chosen: list[int], data: st.DataObject) -> None:
    some = stored.choose(np.array(chosen, np.int64))
    assert len(some) == len(chosen)
    assert list(some) == stored.take(np.array(chosen, np.int64)).to_pylist() == [ROWS[index] for index in chosen]
    assert list(some.column("n")) == chosen
    if chosen:
        places = sorted(data.draw(st.sets(st.integers(0, len(chosen) - 1))))
        again = some.choose(np.array(places, np.int64))
        assert list(again.column("n")) == [chosen[place] for place in places]


def test_a_source_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = store(tmp_path / "train.arrow", pa.Table.from_pylist(ROWS[:10]).to_batches())

    def breaks() -> Iterator[Any]:
        yield from pa.Table.from_pylist(ROWS[:10]).to_batches()
        raise LichenError(Code.DATA_ROW, "bad")

    with pytest.raises(LichenError, match="data-row"):
        store(tmp_path / "train.arrow", breaks())
    assert list(before) == ROWS[:10]
    assert [path.name for path in tmp_path.iterdir()] == ["train.arrow"]


def test_groups_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, values = numbered("banana")
    assert (numbers.tolist(), values) == ([0, 1, 2, 1, 2, 1], ["b", "a", "n"])
    groups = Groups(numbers, 4)
    assert [group.tolist() for group in groups] == [[0], [1, 3, 5], [2, 4], []]
    assert (groups.sizes.tolist(), groups.each().tolist()) == ([1, 3, 2, 0], numbers.tolist())
    assert rows.BATCH < 1500  # or these tests would read one batch
