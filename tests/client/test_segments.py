"""Data segments: a record is charged where it was first read, whatever file, home, format or split it comes in; old ledgers; the chain."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.client.data import fingerprints
from lichen.client.ledger import FILE, Ledger, open_ledger
from lichen.client.ledger_book import Limit, Limits
from lichen.client.witness import Witness, write_off
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, epsilon, filter_epsilon, filter_order, noise_multiplier

DELTA = 1e-5
STEP = Segment(2.0, 0.1, 20)
LIFE = Limit(8.0, DELTA)


def limits(run: float = 100.0, life: float | None = 100.0, unit: str = "example") -> Limits:
    return Limits(unit, Limit(run, DELTA), None if life is None else Limit(life, DELTA))


def refused(code: Code, call: Callable[[], object]) -> LichenError:
    with pytest.raises(LichenError) as caught:
        call()
    assert caught.value.code is code
    return caught.value


def test_what_two_processes_took_for_their_own_leaves_once(tmp_path: Path) -> None:
    """Two homes with copies of the same rows, asked with one message id at one time."""
    with Ledger(tmp_path) as one, Ledger(tmp_path) as other:
        reads = set(one.assign("train", [1, 2]))
        for ledger in (one, other):
            ledger.reserve("train", "r", "m", 1, STEP, limits(), reads, as_of=ledger.split_at)
        one.released("train", "r", "m")
        refused(Code.PRIVACY_BUDGET, lambda: other.released("train", "r", "m"))
        other.released("train", "r", "m", again=True)  # a simulation's, bit for bit the same
        assert len(one.entries()) == 1


def test_records_that_have_moved_since_they_were_looked_up_are_not_read(tmp_path: Path) -> None:
    with Ledger(tmp_path) as one, Ledger(tmp_path) as other:
        reads, as_of = set(one.assign("train", [1, 2, 3])), one.split_at
        other.assign("train", [3], apart=True)
        refused(Code.LEDGER_MOVED, lambda: one.reserve("train", "r", "m", 1, STEP, limits(), reads, as_of=as_of))
        refused(Code.LEDGER_MOVED, lambda: one.paid("r", "train", "m", as_of))
        assert one.entries() == []
        reads = set(one.assign("train", [1, 2, 3]))
        assert one.reserve("train", "r", "m", 1, STEP, limits(), reads, as_of=one.split_at).readable == {1, 2}


def test_no_steps_and_fewer_than_none_ahead_are_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        reads = set(ledger.assign("train", [1]))
        for planned, ahead in ((STEP, -1), (STEP, -20), (STEP._replace(steps=0), 0), (STEP._replace(steps=-1), 0)):
            with pytest.raises(LichenError, match="steps to reserve"):
                ledger.reserve("train", "r", "m", 1, planned, limits(), reads, ahead=ahead, as_of=ledger.split_at)
        assert ledger.entries() == []
    refused(Code.INTERNAL, lambda: epsilon([STEP, STEP._replace(steps=-1)], DELTA))


def test_a_segment_is_held_against_the_noise_that_it_is_charged_with(tmp_path: Path) -> None:
    """What another segment needs makes its history one of two kinds, which the filter bounds: by that it may have nothing left."""
    q, rounds, steps = 0.1, 20, 20
    bounds = limits(8.0, 8.0)
    planned = Segment(noise_multiplier(8.0, DELTA, q, rounds * steps), q, steps)
    with Ledger(tmp_path) as ledger:
        old = set(ledger.assign("train", [1]))
        ledger.reserve("train", "old", "m", 1, Segment(noise_multiplier(7.06, DELTA, q, 400), q, 400), bounds, old, as_of=ledger.split_at)
        new = set(ledger.assign("train", [2]))
        for round in range(1, rounds):
            ledger.reserve("train", "r", str(round), round, planned, bounds, new, ahead=steps * (rounds - round), as_of=ledger.split_at)
        grant = ledger.reserve("train", "r", str(rounds), rounds, planned, bounds, old | new, as_of=ledger.split_at)
        assert grant.readable
        for number in (1, 2):
            assert ledger.spent(number, LIFE).epsilon <= 8.0


# --- records ------------------------------------------------------------------------------------------------------------------------


def test_what_was_new_makes_a_segment_and_stays_in_it(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        assert ledger.assign("train", [5, 6, 5]) == [1, 1, 1]  # equal content is one record
        assert ledger.assign("holdout", [7]) == [2]
        assert ledger.assign("train", [6, 7, 8, -9]) == [1, 2, 3, 3]  # moved from the hold-out, and new ones
    with Ledger(tmp_path) as ledger:
        before = ledger.verify()
        assert ledger.assign("holdout", [8, 5]) == [3, 1]
        assert ledger.assign("train", []) == []
        assert ledger.verify() == before
        assert [(one.number, one.split, one.records) for one in ledger.segments()] == [(1, "train", 2), (2, "holdout", 1), (3, "train", 2)]


def test_a_fingerprint_follows_what_a_row_says_and_the_key() -> None:
    texts = ["gold  is up\n", "caf\u00e9", "x", "a"]
    again = [" gold is up", "cafe\u0301", "x", "a"]
    key = bytes(range(32))
    found = fingerprints(key, "row", [texts, [1, 2, 3, 4]])
    assert found == fingerprints(key, "row", [again, [1, 2, 3, 4]])
    assert len(set(found)) == 4
    for other in (
        fingerprints(bytes(32), "row", [texts, [1, 2, 3, 4]]),
        fingerprints(key, "entity:row", [texts, [1, 2, 3, 4]]),
        fingerprints(key, "row", [texts]),
        fingerprints(key, "row", [["gold", "is", "up", "b"], [1, 2, 3, 4]]),
    ):
        assert not set(found) & set(other)
    assert fingerprints(key, "row", [["a", "ab"], ["bc", "c"]])[0] != fingerprints(key, "row", [["a", "ab"], ["bc", "c"]])[1]
    assert all(-(2**63) <= one < 2**63 for one in found)


def test_a_reservation_charges_all_that_it_reads_and_the_spent_are_left_out(tmp_path: Path) -> None:
    planned = Segment(noise_multiplier(2.0, DELTA, 0.1, 20), 0.1, 20)
    with Ledger(tmp_path) as ledger:
        old = set(ledger.assign("train", [1]))
        ledger.reserve("train", "a", "m", 1, planned, limits(2.0, 2.05), old, as_of=ledger.split_at)
        both = old | set(ledger.assign("train", [2]))
        grant = ledger.reserve("train", "b", "m", 1, planned, limits(2.0, 2.05), both, as_of=ledger.split_at)
        assert grant.readable == {2}  # the first has so little left that it would need more than four times the noise
        assert grant.segment == planned
        assert [entry.charged for entry in ledger.entries()] == [{1}, {2}]
        # a wider bound: the first pays by more noise, and so does, in the same step, the second
        grant = ledger.reserve("train", "c", "m", 1, planned, limits(2.0, 3.0), both, as_of=ledger.split_at)
        assert grant.readable == both
        assert grant.segment.noise_multiplier > planned.noise_multiplier
        assert ledger.spent(1, Limit(3.0, DELTA)).epsilon <= 3.0


def test_a_message_that_comes_again_reads_what_it_was_charged_for(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        first = set(ledger.assign("train", [1]))
        ledger.reserve("train", "a", "m", 1, STEP, limits(), first, as_of=ledger.split_at)
        both = first | set(ledger.assign("train", [2]))
        assert ledger.reserve("train", "a", "m", 1, STEP, limits(), both, as_of=ledger.split_at).readable == first
        assert len(ledger.entries()) == 1
        ledger.released("train", "a", "m")
        assert ledger.reserve("train", "a", "m", 1, STEP, limits(), both, as_of=ledger.split_at).readable == both


def test_noise_that_a_run_was_given_lasts_it_to_its_end(tmp_path: Path) -> None:
    """Six rounds after another run: σ is found once, for all of them, by the accountant that gates."""
    planned = Segment(noise_multiplier(4.0, DELTA, 0.1, 60), 0.1, 10)
    with Ledger(tmp_path) as ledger:
        reads = set(ledger.assign("train", [1]))
        ledger.reserve("train", "a", "m", 1, planned._replace(steps=60), limits(4.0, 5.0), reads, as_of=ledger.split_at)
        grants = [
            ledger.reserve(
                "train", "b", str(number), number, planned, limits(4.0, 5.0), reads, ahead=60 - 10 * number, as_of=ledger.split_at
            ).segment
            for number in range(1, 7)
        ]
        assert len(set(grants)) == 1
        assert grants[0].steps == 10
        assert 4.99 < ledger.spent(1, Limit(5.0, DELTA)).epsilon <= 5.0


def test_which_bound_a_number_is(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        reads = set(ledger.assign("train", [1]))
        for number in (1, 2):
            ledger.reserve("train", "a", str(number), number, STEP, limits(), reads, as_of=ledger.split_at)
        assert ledger.spent(1, LIFE) == (epsilon([STEP, STEP], DELTA), "pld")
        ledger.reserve("train", "b", "1", 1, STEP, limits(), reads, as_of=ledger.split_at)
        order = filter_order(*STEP[:2], *vars(LIFE).values())
        assert ledger.spent(1, LIFE) == (filter_epsilon([STEP] * 3, DELTA, order), "rdp-filter")
        assert ledger.spent(1, LIFE).epsilon > epsilon([STEP] * 3, DELTA)


def test_units_are_not_added_up_in_any_split(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        reads = set(ledger.assign("holdout", [1]))
        ledger.reserve("holdout", "a", "m", 1, STEP, limits(), reads, as_of=ledger.split_at)
        moved = set(ledger.assign("train", [1, 2]))
        refused(
            Code.PRIVACY_BUDGET, lambda: ledger.reserve("train", "b", "m", 1, STEP, limits(unit="entity:who"), moved, as_of=ledger.split_at)
        )


# --- what is written off -------------------------------------------------------------------------------------------------------------


def test_what_is_written_off_is_never_read_again(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        old = set(ledger.assign("train", [1]))
        ledger.reserve("train", "a", "m", 1, STEP, limits(), old, as_of=ledger.split_at)
        assert ledger.write_off("home", after=40) == 1
        assert ledger.sign("home")[0] == 41
        both = old | set(ledger.assign("train", [1, 2]))
        assert ledger.reserve("train", "a", "m", 1, STEP, limits(), both, as_of=ledger.split_at).readable == both - old
        refused(Code.PRIVACY_BUDGET, lambda: ledger.reserve("train", "b", "m", 1, STEP, limits(life=None), old, as_of=ledger.split_at))
    with Ledger(tmp_path) as ledger:
        assert ledger.verify() == 7
        assert [one.written_off for one in ledger.segments()] == [True, False]


def test_a_ledger_of_format_1_is_refused_with_a_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_LEDGER", str(tmp_path / "shared"))
    home = tmp_path / "home"
    home.mkdir()
    with sqlite3.connect(home / FILE) as database:
        database.executescript("CREATE TABLE spent (id INTEGER PRIMARY KEY); PRAGMA user_version = 1")
    database.close()
    assert "write-off" in refused(Code.PRIVACY_HISTORY, lambda: open_ledger(home)).fix
    (home / FILE).rename(home / "old")
    open_ledger(home).close()


# --- where it lies ---------------------------------------------------------------------------------------------------------------


def test_two_homes_share_what_the_same_rows_have_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_LEDGER", str(tmp_path / "shared"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with open_ledger(tmp_path / "a") as ledger:
        ledger.reserve("train", "r", "m", 1, STEP, limits(), set(ledger.assign("train", [1, 2])), as_of=ledger.split_at)
    with open_ledger(tmp_path / "b") as ledger:
        (number,) = set(ledger.assign("train", [2, 1]))
        assert ledger.spent(number, LIFE).epsilon == epsilon([STEP], DELTA)
    (tmp_path / "c").mkdir()
    with open_ledger(tmp_path / "c", own=True) as ledger:  # a simulated node
        assert ledger.entries() == []
    with open_ledger(tmp_path / "c") as ledger:  # looked at by its owner: it is not taken for an old one
        assert ledger.path == tmp_path / "c" / FILE
    assert (tmp_path / "shared" / FILE).stat().st_mode & 0o777 == 0o600


# --- the chain -----------------------------------------------------------------------------------------------------------------------


def full(folder: Path) -> Path:
    with Ledger(folder) as ledger:
        reads = set(ledger.assign("train", [1, 2, 3]))
        for number in range(3):
            ledger.reserve("train", "r", str(number), number, STEP, limits(), reads, as_of=ledger.split_at)
            ledger.released("train", "r", str(number))
    return folder / FILE


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE log SET body = replace(body, '"steps":20', '"steps":10') WHERE sequence = 3""",
        "DELETE FROM log WHERE sequence = 4",
        "DELETE FROM log WHERE sequence = 1",
        "UPDATE log SET hash = zeroblob(32) WHERE sequence = 8",
        "UPDATE log SET sequence = sequence + 10 WHERE sequence = 8",
        "INSERT INTO log SELECT 9, body, hash FROM log WHERE sequence = 8",
        "UPDATE log SET body = 'x' WHERE sequence = 5",
    ],
)
def test_a_changed_entry_is_found_and_nothing_is_trained(tmp_path: Path, change: str) -> None:
    path = full(tmp_path)
    with Ledger(tmp_path) as running:
        database = sqlite3.connect(path)
        assert database.execute(change).rowcount == 1
        database.commit()
        database.close()
        refused(Code.LEDGER_BROKEN, running.verify)
    refused(Code.LEDGER_BROKEN, lambda: Ledger(tmp_path))


@pytest.mark.parametrize("change", ["DELETE FROM records WHERE fingerprint = 2", "INSERT INTO records VALUES (9, 1)"])
def test_a_lost_fingerprint_would_be_a_new_record_and_is_found(tmp_path: Path, change: str) -> None:
    path = full(tmp_path)
    database = sqlite3.connect(path)
    database.execute(change)
    database.commit()
    database.close()
    with Ledger(tmp_path) as ledger:
        refused(Code.LEDGER_BROKEN, lambda: ledger.assign("train", [2]))
        refused(Code.LEDGER_BROKEN, ledger.verify)


def test_another_fingerprint_in_place_of_one_is_found_when_it_is_verified(tmp_path: Path) -> None:
    database = sqlite3.connect(full(tmp_path))
    database.execute("UPDATE records SET fingerprint = 9 WHERE fingerprint = 2")
    database.commit()
    database.close()
    with Ledger(tmp_path) as ledger:
        refused(Code.LEDGER_BROKEN, ledger.verify)


def test_a_ledger_replaced_under_a_running_one_is_found(tmp_path: Path) -> None:
    path = full(tmp_path / "a") if not (tmp_path / "a").mkdir() else None
    with Ledger(tmp_path / "a") as ledger:
        (tmp_path / "b").mkdir()
        other = sqlite3.connect(full(tmp_path / "b"))
        with sqlite3.connect(str(path)) as mine:
            other.backup(mine)
        refused(Code.LEDGER_BROKEN, ledger.entries)


# --- no sequence of events lets a record pass its budget ------------------------------------------------------------------------------

_RECORDS = st.lists(st.integers(0, 5), min_size=1, max_size=6)
_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), _RECORDS, st.integers(0, 2), st.integers(0, 4), st.sampled_from([0.9, 1.3, 2.5])),
        st.tuples(st.just("holdout"), _RECORDS, st.integers(0, 2), st.integers(0, 4), st.sampled_from([6.0, 9.0])),
        st.tuples(st.sampled_from(["crash", "copy", "write-off"])),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=_EVENTS)
def test_no_sequence_of_runs_moves_exports_and_crashes_passes_a_records_budget(events: list[tuple], tmp_path_factory) -> None:
    """Each record's own history is kept here, apart from the ledger, and must stay within its life's bound."""
    folder, life = tmp_path_factory.mktemp("ledger"), 3.0
    ledger = Ledger(folder)
    left: dict[int, list[tuple[str, Segment]]] = {record: [] for record in range(6)}
    ended: set[int] = set()
    for event in events:
        if event[0] == "crash":  # the process dies, and another opens what is on the disk
            ledger.close()
            ledger = Ledger(folder)
        elif event[0] == "copy":  # the ledger is moved elsewhere
            ledger.close()
            folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "ledger"))
            ledger = Ledger(folder)
        elif event[0] == "write-off":
            ledger.write_off("home")
            ended |= {record for record in range(6) if any(entry for entry in left[record])}
        else:
            split, records, run, message, noise = event
            of = ledger.assign(split, records)
            planned = Segment(noise, 0.1 if split == "train" else 1.0, 10)
            try:
                grant = ledger.reserve(
                    split, str(run), str(message), 1, planned, limits(2.5, life), set(of), ahead=10, as_of=ledger.split_at
                )
            except LichenError as error:
                if error.code is not Code.PRIVACY_BUDGET:
                    raise
                continue
            assert grant.segment.noise_multiplier >= noise
            for record in {record for record, number in zip(records, of, strict=True) if number in grant.readable}:
                assert record not in ended
                left[record].append((str(run), grant.segment))
            ledger.released(split, str(run), str(message))
    ledger.verify()
    for history in left.values():
        steps = [segment for _, segment in history]
        assert epsilon(steps, DELTA) <= life
        if steps:  # and by the filter, for what a record itself has seen
            for run in {run for run, _ in history}:
                assert epsilon([segment for own, segment in history if own == run], DELTA) <= 2.5
    ledger.close()


def test_canonical_bodies_are_what_is_hashed(tmp_path: Path) -> None:
    path = full(tmp_path)
    for _, text in sqlite3.connect(path).execute("SELECT sequence, body FROM log"):
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_an_error_that_says_nothing_against_the_file_does_not_ask_for_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger._db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("BEGIN IMMEDIATE")
    locked = refused(Code.PRIVACY_HISTORY, lambda: ledger.assign("train", [1]))
    assert locked.what == "the ledger can't be used: database is locked"
    assert "may be sound" in locked.fix
    other.rollback()
    other.close()
    ledger.close()
    (tmp_path / FILE).write_bytes(b"no database" * 100)
    assert "older copy of it is refused" in refused(Code.PRIVACY_HISTORY, lambda: Ledger(tmp_path)).fix


@pytest.mark.parametrize("damage", ["DROP TABLE log", "UPDATE log SET body = CAST(x'ff' AS TEXT)", "UPDATE log SET body = '{}'", "garbage"])
def test_damage_is_told_with_a_way_on_that_works(tmp_path: Path, damage: str) -> None:
    (tmp_path / "home").mkdir()
    path = full(tmp_path / "home")
    if damage == "garbage":
        path.write_bytes(b"no database" * 100)
    else:
        database = sqlite3.connect(path)
        database.execute(damage)
        database.commit()
        database.close()
    with pytest.raises(LichenError) as caught:
        open_ledger(tmp_path / "home")
    assert caught.value.code in {Code.PRIVACY_HISTORY, Code.LEDGER_BROKEN}
    assert caught.value.what.count("can't be used") <= 1
    assert "as it was last" in caught.value.fix
    assert "--write-off" in caught.value.fix
    assert ("move what is there away" in caught.value.fix) or ("delete it" in caught.value.fix)
    path.rename(tmp_path / "away")
    assert write_off(tmp_path / "home") == 0


def test_a_folder_that_can_not_be_made_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LICHEN_LEDGER", str(tmp_path / "file" / "under"))
    assert "LICHEN_LEDGER" in refused(Code.OUTPUT_UNUSABLE, lambda: open_ledger(home)).fix
    monkeypatch.setenv("LICHEN_LEDGER", "below/home")
    open_ledger(home).close()
    assert (home / "below" / "home" / FILE).exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # another user's; root may write everywhere
    assert "Permission denied" in refused(Code.OUTPUT_UNUSABLE, lambda: open_ledger(home)).what


def test_a_user_without_a_home_directory_is_told_to_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("LICHEN_LEDGER")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert "LICHEN_LEDGER" in refused(Code.OUTPUT_UNUSABLE, lambda: open_ledger(tmp_path)).fix
    assert Witness(tmp_path).sign() is None  # the agent lives on, and its reply is sent


def test_what_is_signed_tells_nothing_of_which_records_a_plan_found(tmp_path: Path) -> None:
    """A task's rows part a segment, or are a new one, and whose they are is a coordinator's to say."""
    told = []
    for task in ([], [1], [999]):
        (tmp_path / str(task)).mkdir()
        with Ledger(tmp_path / str(task)) as ledger:
            ledger.assign("train", range(100))
            first = ledger.sign("home")
            ledger.assign("train", task, apart=True)
            second = ledger.sign("home")
        assert first[1] != second[1]
        told.append((first[0], second[0]))
    assert told == [(1, 2)] * 3
