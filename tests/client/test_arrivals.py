"""Which rows are new to an online run: known by what they say, whatever file they lie in, and each in one batch."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.client import watching
from lichen.client.arrivals import Arrivals, Batches, New, begin, new_rows, until
from lichen.client.arrivals import take as found
from lichen.client.data import add_source, check, declared_size, fingerprints, load, pieces
from lichen.client.watching import Watcher
from lichen.common.channel.fleet_pb2 import News
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.schedule import too_large

RUN = "7"
FIELDS = {"text": "text", "label": "label"}


def plan_of(privacy: dict[str, Any] | None = None, **online: Any) -> Plan:
    document = {"task": {"labels": ["a", "b"]}, "model": {"base": "some/model"}, "local": {"steps": 5}, "rounds": 4}
    document |= {"privacy": privacy} if privacy else {}
    return parse_plan(document | {"continual": {"mode": "online", "online": online}})


def watched(home: Path, **more: Any) -> Path:
    folder = home / "inbox"
    folder.mkdir(parents=True)
    add_source(home, folder, fields=FIELDS, watch=True, **({"declared_size": 64, "holdout": 0.0} | more))
    return folder


def deliver(folder: Path, file: str, texts: list[str]) -> None:
    (folder / file).write_text("".join(json.dumps({"text": text, "label": "a"}) + "\n" for text in texts))


def count(home: Path, plan: Plan, run: str = RUN) -> int:
    with Arrivals(home) as arrivals:
        return new_rows(home, plan, run, arrivals).declared_size


def take(home: Path, plan: Plan, run: str, number: int) -> Batches:
    """As a training does: the batch begins when all that comes before the first step has gone well."""
    batches = found(home, plan, run, number)
    begin(home, run, number, batches)
    return batches


def test_a_batch_is_what_came_since_the_last_one(tmp_path: Path) -> None:
    plan, folder = plan_of(), watched(tmp_path)
    assert count(tmp_path, plan) == 0
    deliver(folder, "one.jsonl", ["a", "b"])
    deliver(folder, "two.jsonl", ["c"])
    assert count(tmp_path, plan) == 2 * 64
    found(tmp_path, plan, RUN, 0)
    assert count(tmp_path, plan) == 2 * 64, "nothing has begun"
    first = take(tmp_path, plan, RUN, 0)
    assert (len(first.rows), first.declared_size, count(tmp_path, plan)) == (3, 128, 0)
    deliver(folder, "three.jsonl", ["c", "d", " d "])
    assert take(tmp_path, plan, RUN, 0) == first, "as it has begun"
    assert count(tmp_path, plan) == 64
    second = take(tmp_path, plan, RUN, 1)
    assert (len(second.rows), second.declared_size) == (1, 64)
    with pytest.raises(LichenError) as caught:
        take(tmp_path, plan, RUN, 2)
    assert caught.value.code is Code.DATA_EMPTY
    assert not dict(first.rows).keys() & dict(second.rows).keys()


def test_a_file_that_is_renamed_or_exported_again_is_not_new(tmp_path: Path) -> None:
    plan, folder = plan_of(), watched(tmp_path)
    deliver(folder, "one.jsonl", ["one thing", "another"])
    take(tmp_path, plan, RUN, 0)
    (folder / "one.jsonl").rename(folder / "renamed.jsonl")
    assert count(tmp_path, plan) == 0
    (folder / "other.csv").write_text('text,label\n"another",b\n"one  thing",b\n')
    assert count(tmp_path, plan) == 0
    (folder / "renamed.jsonl").unlink()
    (folder / "other.csv").write_text('text,label\n"another",b\n"a third",b\n')
    assert count(tmp_path, plan) == 64


def test_what_another_run_has_read_is_new_only_where_the_plan_says_so(tmp_path: Path) -> None:
    folder = watched(tmp_path)
    deliver(folder, "one.jsonl", ["a", "b"])
    take(tmp_path, plan_of(), "1", 0)
    assert count(tmp_path, plan_of()) == 0
    again = plan_of(read_again=True)
    assert count(tmp_path, again) == 64
    take(tmp_path, again, RUN, 0)
    assert count(tmp_path, again) == 0, "in one run no row is in two batches"


def test_what_was_read_is_told_by_run_and_batch(tmp_path: Path) -> None:
    plan, folder = plan_of(), watched(tmp_path)
    deliver(folder, "one.jsonl", ["a", "b"])
    take(tmp_path, plan, RUN, 0)
    deliver(folder, "two.jsonl", ["c"])
    take(tmp_path, plan, RUN, 1)
    with Arrivals(tmp_path) as arrivals:
        arrivals.note("not online", [1, 2, 3])
        told = arrivals.history()
    assert [(row["run"], row["batch"], row["rows"]) for row in told] == [("not online", None, 3), (RUN, 0, 2), (RUN, 1, 1)]
    assert told[0]["begun"] is None
    assert told[1]["begun"] <= told[2]["begun"]


def test_what_is_scored_before_a_batch_stays_new(tmp_path: Path) -> None:
    plan, folder = plan_of(), watched(tmp_path)
    deliver(folder, "one.jsonl", ["a", "b"])
    take(tmp_path, plan, RUN, 0)
    deliver(folder, "two.jsonl", ["c"])
    before = until(tmp_path, plan, RUN, 1, new=True)
    assert sorted(before.of(list(dict(before.rows)))) == [0, 0, 1]  # type: ignore[type-var]
    assert before.of([12345]) == [None]
    assert len(until(tmp_path, plan, RUN, 1, new=False).rows) == 2
    assert count(tmp_path, plan) == 64
    take(tmp_path, plan, RUN, 1)
    assert until(tmp_path, plan, RUN, 1, new=False).rows == before.rows


def test_held_out_rows_make_no_batch_and_come_with_one(tmp_path: Path) -> None:
    plan, folder = plan_of(), watched(tmp_path, holdout=0.5)
    deliver(folder, "one.jsonl", [f"row {number}" for number in range(40)])
    held = [row["text"] for piece in pieces(tmp_path) for side, row in piece.read(["text"], lenient=False)[0] if side == "holdout"]
    assert 5 < len(held) < 35
    (folder / "one.jsonl").unlink()
    deliver(folder, "held.jsonl", held)
    assert count(tmp_path, plan) == 0
    deliver(folder, "one.jsonl", [f"row {number}" for number in range(40)])
    assert count(tmp_path, plan) == 64
    assert len(take(tmp_path, plan, RUN, 0).rows) == 40


def test_rows_that_the_task_cannot_use_are_told_of_once_and_come_when_they_are_mended(tmp_path: Path) -> None:
    folder, private = watched(tmp_path), plan_of(privacy={"unit": "example", "sample_rate": 0.5})
    rows = [{"text": "a", "label": "a"}, {"text": "b", "label": "typo"}, {"text": 3, "label": "a"}, {"label": "a"}]
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert count(tmp_path, private) == 64
    first = take(tmp_path, private, RUN, 0)
    assert (len(first.rows), len(first.passed)) == (2, 1)
    begin(tmp_path, RUN, 0, first)
    assert count(tmp_path, private) == 0
    deliver(folder, "one.jsonl", ["a", "b"])
    assert count(tmp_path, private) == 0, "it was told of"
    (folder / "two.jsonl").write_text('{"text": "c", "label": "typo"}\n')
    assert count(tmp_path, private) == 64, "the coordinator names the labels, and is told nothing of these"
    second = take(tmp_path, private, RUN, 1)
    assert (len(second.rows), len(second.passed)) == (1, 1), "what was mended"
    begin(tmp_path, RUN, 1, second)
    with Arrivals(tmp_path) as arrivals:
        assert {number for _, number in arrivals.until(RUN, 1)} == {0, 1}
    with pytest.raises(LichenError) as caught:
        count(tmp_path, plan_of())
    assert caught.value.code is Code.DATA_LABEL
    (folder / "two.jsonl").write_text('{"text": "c", "label": "a"}\n{"text": "d"}\n')
    with pytest.raises(LichenError) as caught:
        count(tmp_path, plan_of())
    assert caught.value.code is Code.DATA_ROW


def test_what_is_still_on_its_way_is_passed_over(tmp_path: Path) -> None:
    folder = watched(tmp_path)
    deliver(folder, "one.jsonl.part", ["a"])
    assert count(tmp_path, plan_of()) == 0
    deliver(folder, "two.jsonl", ["b"])
    assert count(tmp_path, plan_of()) == 64
    assert len(load(tmp_path, "train", ["text"])) == 1


def test_pieces_are_read_again_when_they_are_read_otherwise(tmp_path: Path) -> None:
    folder, settled = watched(tmp_path), dict[str, Any]()
    deliver(folder, "one.jsonl", ["x"])
    take(tmp_path, plan_of(), RUN, 0)
    with Arrivals(tmp_path) as arrivals:
        assert new_rows(tmp_path, plan_of(), RUN, arrivals, settled).declared_size == 0
        assert new_rows(tmp_path, plan_of(), RUN, arrivals, settled).declared_size == 0
        add_source(tmp_path, folder, fields={"text": "label", "label": "label"}, watch=True, declared_size=64, holdout=0.0)
        assert new_rows(tmp_path, plan_of(), RUN, arrivals, settled).declared_size == 64


def test_a_size_is_declared_or_nothing_is_told(tmp_path: Path) -> None:
    folder = watched(tmp_path, declared_size=None)
    assert count(tmp_path, plan_of()) == 0
    deliver(folder, "one.jsonl", ["a"])
    with pytest.raises(LichenError) as caught:
        count(tmp_path, plan_of())
    assert caught.value.code is Code.DATA_DECLARED_SIZE
    add_source(tmp_path, folder, fields={"label": "label"}, watch=True, declared_size=1)
    with pytest.raises(LichenError, match="no column is mapped to 'text'"):
        count(tmp_path, plan_of())


def test_what_a_training_could_not_read_is_not_told(tmp_path: Path) -> None:
    entity = plan_of(privacy={"unit": "entity", "unit_field": "patient", "sample_rate": 0.5})
    folder = watched(tmp_path)
    deliver(folder, "one.jsonl", ["a"])
    with pytest.raises(LichenError, match="no column is mapped to 'patient'"):
        count(tmp_path, entity)
    (folder / "one.jsonl").unlink()
    (tmp_path / "more.csv").write_text("text,label,patient\nb,a,x\nc,a,y\n")
    fields = FIELDS | {"patient": "patient"}
    add_source(tmp_path, folder, fields=fields, watch=True, declared_size=64, holdout=0.0)
    add_source(tmp_path, tmp_path / "more.csv", fields=fields, declared_size=8, holdout=1)
    with pytest.raises(LichenError, match="a number of held-out rows"):
        count(tmp_path, entity)


@pytest.mark.parametrize("field", ["label", "site"])
def test_pieces_whose_types_differ_are_not_told_where_a_training_could_not_read_them(tmp_path: Path, field: str) -> None:
    folder, settled = tmp_path / "inbox", dict[str, Any]()
    folder.mkdir()
    plan = parse_plan(json.loads(plan_of().canonical_json()) | {"task": {"labels": ["0", "1"]}})
    add_source(tmp_path, folder, fields=FIELDS | {"site": "site"}, watch=True, declared_size=64, holdout=0.0)

    def told() -> int:
        with Arrivals(tmp_path) as arrivals:
            return new_rows(tmp_path, plan, RUN, arrivals, settled).declared_size

    row = {"text": "a", "label": 0, "site": 1}
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    assert told() == 64
    take(tmp_path, plan, RUN, 0)
    assert told() == 0
    assert len(load(tmp_path, "train", ["text", "label"])) == 1
    (folder / "two.jsonl").write_text(json.dumps(row | {"text": "b", field: str(row[field])}) + "\n")
    for refused in (told, lambda: load(tmp_path, "train", ["text", "label"])):
        with pytest.raises(LichenError, match=r"two\.jsonl.*holds string"):
            refused()
    (folder / "two.jsonl").write_text(json.dumps(row | {"text": "b"}) + "\n")
    assert told() == 64


def test_a_private_batch_is_no_larger_than_delta_permits_and_the_rest_comes_with_the_next(tmp_path: Path) -> None:
    plan, folder = plan_of(privacy={"unit": "example", "sample_rate": 0.5, "delta": 1 / 200}), watched(tmp_path)
    for number in range(5):
        deliver(folder, f"{9 - number}.jsonl", [f"row {number}"])
        os.utime(folder / f"{9 - number}.jsonl", (number, number))
    assert count(tmp_path, plan) == 5 * 64, "all of it is there"
    scored = until(tmp_path, plan, RUN, 0, new=True)
    batches = [take(tmp_path, plan, RUN, number) for number in range(2)]
    assert [batch.declared_size for batch in batches] == [3 * 64, 2 * 64]
    assert scored.rows == batches[0].rows
    assert not any(too_large(plan, batch.declared_size or 0) for batch in batches)
    oldest = fingerprints(batches[0].key, "row", [[f"row {number}" for number in range(3)]])
    assert set(dict(batches[0].rows)) == set(oldest)
    assert count(tmp_path, plan) == 0
    watched(tmp_path / "large", declared_size=201)
    deliver(tmp_path / "large" / "inbox", "one.jsonl", ["a"])
    assert count(tmp_path / "large", plan_of()) == 201
    for ask in (count, lambda home, plan: take(home, plan, RUN, 0)):
        with pytest.raises(LichenError, match=r"one.jsonl: .*above one in the declared size, 201") as caught:
            ask(tmp_path / "large", plan)
        assert caught.value.code is Code.PLAN_UNSOUND


def test_a_watched_folder_may_be_empty_and_its_size_is_each_files(tmp_path: Path) -> None:
    folder = watched(tmp_path)
    assert declared_size(tmp_path) == 64
    assert not check(tmp_path).usable
    with pytest.raises(LichenError) as caught:
        load(tmp_path, "train", ["text"])
    assert caught.value.code is Code.DATA_EMPTY
    assert len(load(tmp_path, "train", ["text"], lenient=True)) == 0
    deliver(folder, ".hidden.jsonl", ["a"])
    deliver(folder, "one.jsonl", ["a"])
    deliver(folder, "two.jsonl", ["b"])
    assert declared_size(tmp_path) == 128
    assert len(load(tmp_path, "train", ["text"])) == 2
    with pytest.raises(LichenError, match="must be a share below 1"):
        add_source(tmp_path, folder, fields=FIELDS, watch=True, holdout=2)
    with pytest.raises(LichenError, match="not a folder"):
        add_source(tmp_path, folder / "one.jsonl", fields=FIELDS, watch=True)


def test_what_a_newer_lichen_wrote_is_refused_and_others_may_not_read_it(tmp_path: Path) -> None:
    with Arrivals(tmp_path) as arrivals:
        assert (tmp_path / "arrivals.sqlite").stat().st_mode & 0o777 == 0o600
        arrivals._db.execute("PRAGMA user_version = 99")
    with pytest.raises(LichenError) as caught:
        Arrivals(tmp_path)
    assert caught.value.code is Code.STORE_VERSION
    (tmp_path / "arrivals.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(LichenError) as caught:
        Arrivals(tmp_path)
    assert caught.value.code is Code.OUTPUT_UNUSABLE


@given(st.lists(st.sets(st.integers(0, 30), max_size=12), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_is_in_two_batches_of_a_run_and_none_is_lost(tmp_path_factory: pytest.TempPathFactory, sent: list[set[int]]) -> None:
    with Arrivals(tmp_path_factory.mktemp("home")) as arrivals:
        batches: list[set[int]] = []
        for number, rows in enumerate(sent):
            arrivals.begin(RUN, number, New(1, arrivals.unread(RUN, sorted(rows), again=False), []))
            arrivals.begin(RUN, number, New(1, list(range(100, 110)), []))  # which has begun
            batch = arrivals.batch(RUN, number)
            assert batch is not None
            batches.append(set(dict(batch.rows)))
        assert sum(map(len, batches)) == len(set().union(*batches))
        assert set().union(*batches) == set().union(*sent)


# --- the agent's side ---


def test_a_change_is_told_once_it_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVERY", 0.02)
    (tmp_path / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n")
    folder, told, faults = watched(tmp_path), list[News](), list[str | None]()

    async def wait_for(rows: int) -> None:
        async with asyncio.timeout(10):
            while not told or told[-1].rows != rows:
                await asyncio.sleep(0.01)

    async def go(act: Callable[[Watcher], Any]) -> None:
        watcher = Watcher(tmp_path, told.append, faults.append)
        task = asyncio.create_task(watcher.run())
        try:
            await act(watcher)
        finally:
            task.cancel()

    async def first(watcher: Watcher) -> None:
        await asyncio.sleep(0.1)
        assert not told, "nobody has asked"
        watcher.begin(7, plan_of(), plan_of().canonical_json())
        await wait_for(0)
        deliver(folder, "one.jsonl", ["a"])
        await wait_for(64)
        assert told[-1].run_id == 7
        async with watcher.reading():
            assert told[-1].rows == 0
            take(tmp_path, plan_of(), "7", 0)
        assert told[-1].rows == 0
        deliver(folder, "two.jsonl", ["b"])
        await wait_for(64)
        (tmp_path / "paused").touch()
        await wait_for(0)
        (tmp_path / "paused").unlink()
        await wait_for(64)
        folder.rename(away := folder.with_name("away"))  # what can't be looked at
        await wait_for(0)
        assert "no such file or folder" in str(faults[-1])
        away.rename(folder)
        await wait_for(64)
        await asyncio.sleep(0)
        assert faults[-1] is None

    asyncio.run(go(first))

    async def failing(watcher: Watcher) -> None:
        await wait_for(64)
        with monkeypatch.context() as patch:
            patch.setattr(watcher, "_count", lambda *_: 1 / 0)
            async with watcher.reading():
                pass
        assert told[-1].rows == 0
        await wait_for(64)  # no file has changed

    told.clear()
    asyncio.run(go(failing))
    told.clear()

    async def after_a_restart(watcher: Watcher) -> None:
        await wait_for(64)
        (tmp_path / "policy.yaml").write_text("format: 1\n")  # which permits no such plan
        await wait_for(0)
        (tmp_path / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n")
        await wait_for(64)  # no file has changed
        watcher.begin(8, other := parse_plan(json.loads(plan_of().canonical_json()) | {"continual": {}}), other.canonical_json())
        await wait_for(0)
        assert told[-1].run_id == 0

    asyncio.run(go(after_a_restart))
    told.clear()
    (tmp_path / "watched.json").write_text("{}")

    async def damaged(watcher: Watcher) -> None:
        await asyncio.sleep(0.1)
        assert not told

    asyncio.run(go(damaged))


@pytest.mark.parametrize("file", [".upload.jsonl", "app.log", "upload.jsonl.part", "live.jsonl"])
def test_a_file_that_is_always_changing_holds_up_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setattr(watching, "EVERY", 0.1)
    (tmp_path / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n")
    folder, told = watched(tmp_path), list[int]()
    deliver(folder, "whole.jsonl", ["a", "b"])

    async def go() -> None:
        watcher = Watcher(tmp_path, lambda news: told.append(news.rows))
        watcher.begin(7, plan_of(), plan_of().canonical_json())
        looking = asyncio.create_task(watcher.run())
        growing = asyncio.create_task(grow())
        try:
            async with asyncio.timeout(10):
                await watcher.look_twice()
                assert told[-1] == 64
                while 64 not in told[2:]:
                    await asyncio.sleep(0.01)
            async with watcher.reading():
                take(tmp_path, plan_of(), "7", 0)
            await asyncio.sleep(0.5)
            assert told[-1] == 0
            assert max(told) == 64, "nothing that was in the writing was counted"
            growing.cancel()
            if file == "live.jsonl":
                async with asyncio.timeout(10):
                    while told[-1] != 64:
                        await asyncio.sleep(0.01)
        finally:
            looking.cancel(), growing.cancel()

    async def grow() -> None:
        for number in range(10_000):
            with (folder / file).open("a") as stream:
                stream.write(json.dumps({"text": f"row {number}", "label": "a"}) + "\n")
            await asyncio.sleep(0.02)

    asyncio.run(go())
