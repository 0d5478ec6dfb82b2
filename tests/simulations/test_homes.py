"""Node homes: written when asked for, once, and then as if all had been written at the start."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.client.data import load, read_manifest
from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.simulations.homes import NodeHomes, nearest_power_of_two
from lichen.simulations.partition import partition
from lichen.simulations.rows import Groups, store
from lichen.simulations.simulate import deal

ROWS = [{"text": f"text {number}", "label": "abc"[number % 3], "carrier": "xy"[number % 2]} for number in range(3000)]

Make = Callable[..., NodeHomes]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def homes(parts: Groups | None = None, rows: list[dict[str, Any]] = ROWS, root: Path = tmp_path, **kept: Any) -> NodeHomes:
        stored = store(root / "train.arrow", pa.Table.from_pylist(rows).to_batches())
        return NodeHomes(root, stored, parts or partition(rows, "dirichlet:0.5", 4, 3), **kept)

    return homes


def groups(*sizes: int) -> Groups:
    return Groups(np.repeat(np.arange(len(sizes)), sizes), len(sizes))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("client-*/*"))}


@given(st.integers(1, 10**9))
def test_the_nearest_power_of_two_is_nearest(count: int) -> None:
    power = nearest_power_of_two(count)
    assert power.bit_count() == 1
    assert abs(power - count) <= min(abs(power // 2 - count) if power > 1 else count, abs(power * 2 - count))


def test_homes_hold_each_client_s_rows_and_write_again_the_same(make: Make, tmp_path: Path) -> None:
    parts = partition(ROWS, "dirichlet:0.5", 4, 3)
    dealt = make(parts, holdout=0.25, seed=3)
    assert [home.name for home in dealt] == ["client-0", "client-1", "client-2", "client-3"]
    homes = dealt.write_all()
    for home, part in zip(homes, parts, strict=True):
        train, held = load(home, "train", ("text", "label", "carrier")), load(home, "holdout", ("text",))
        assert sorted(train.column("text") + held.column("text")) == sorted(ROWS[index]["text"] for index in part)
        assert train.declared_size == nearest_power_of_two(len(train))
        assert read_manifest(home).sources[0].path == "data.parquet"
        pq.write_table(pa.Table.from_pylist([ROWS[index] for index in part]), tmp_path / "expected")
        assert (home / "data.parquet").read_bytes() == (tmp_path / "expected").read_bytes()
    assert not (tmp_path / "train.arrow").exists()
    before = files(tmp_path)
    history = homes[0] / "accountant" / "history"
    history.parent.mkdir()
    history.write_text("spent")
    again = make(parts, holdout=0.25, seed=3)
    again.write_again()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert history.read_text() == "spent"
    moved = homes[0].rename(tmp_path / "moved")
    assert len(load(moved, "train", ("text",))) > 0


def test_a_home_is_written_only_for_who_asks_once_and_as_if_all_were(make: Make, tmp_path: Path) -> None:
    one, all_at_once = make(), make(root=tmp_path / "all")
    assert list(tmp_path.glob("client-*")) == []
    home = one.open(2)
    written = files(tmp_path)
    assert written.keys() == {"client-2/data.parquet", "client-2/data.yaml"}
    times = {path: path.stat().st_mtime_ns for path in home.iterdir()}
    assert one.open(2) == home
    assert {path: path.stat().st_mtime_ns for path in home.iterdir()} == times
    all_at_once.write_all()
    assert written.items() <= files(tmp_path / "all").items()


def test_another_try_writes_those_that_are_there_and_finishes_what_was_cut_off(make: Make, tmp_path: Path) -> None:
    make().open(1)
    (tmp_path / "client-3").mkdir()
    (tmp_path / "client-3" / "data.parquet.new").write_bytes(b"half")
    turned = make(rows=[*reversed(ROWS)])
    turned.write_again()
    assert {path.parent.name for path in tmp_path.glob("client-*/data.yaml")} == {"client-1"}
    assert pq.read_table(tmp_path / "client-1" / "data.parquet").to_pylist()[0] in ROWS
    assert set(load(turned.open(3), "train", ("text",)).column("text")) <= {row["text"] for row in ROWS}
    assert not (tmp_path / "client-3" / "data.parquet.new").exists()


def test_homes_with_a_given_size_and_fields(make: Make, tmp_path: Path) -> None:
    home = make(groups(3), ROWS[:3], fields={"text": "text", "patient": "carrier"}, declared_size=500, holdout=0).open(0)
    data = load(home, "train", ("text", "patient"))
    assert (data.declared_size, data.column("patient")) == (500, ["x", "y", "x"])
    with pytest.raises(LichenError, match=r"client 1 has no rows"):
        make(groups(1, 0))
    singles = make(groups(*[1] * 40), ROWS[:40], tmp_path / "singles", holdout=0.5)
    for single in singles.write_all():
        assert len(load(single, "train", ("text",))) == 1  # a client is never left with nothing to train on
    broken = make(groups(2), [ROWS[0], {"text": None, "label": "a", "carrier": "x"}], tmp_path / "broken")
    with pytest.raises(LichenError, match=r"row 2: 'text' is null"):
        broken.open(0)
    (tmp_path / "in-the-way").mkdir()
    (tmp_path / "in-the-way" / "client-0").touch()
    with pytest.raises(LichenError) as caught:
        make(groups(1), ROWS[:1], tmp_path / "in-the-way").open(0)
    assert caught.value.code is Code.OUTPUT_UNUSABLE


def test_a_population_that_is_not_asked_costs_neither_files_nor_memory(tmp_path: Path, tiny_plan: dict[str, Any]) -> None:
    peaks = {}
    for clients in (200, 20_000):
        data = {"clients": clients, "data": f"made-up:{20 * clients}"}
        plan = parse_plan(tiny_plan | {"simulation": data, "evaluation": {"validation_fraction": 0.1}})
        root = tmp_path / str(clients) / "simulation"
        tracemalloc.start()
        homes, splits = deal(plan, root)
        peaks[clients] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sorted(path.name for path in root.iterdir()) == ["train.arrow", "validation.parquet"]
        sizes = json.loads((root.parent / "simulation.json").read_text())["examples"]
        assert (len(homes), len(sizes), splits.keys()) == (clients, clients, {"validation"})
        assert len(load(homes.open(clients - 1), "train", ("text",))) == sizes[f"client-{clients - 1}"]
    assert peaks[20_000] < 60 * 2**20  # 400,000 rows: as dicts they took 150 MB, and their homes 60,000 files
