"""The privacy ledger: charged before training, once a message until something left, under every limit, across crashes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lichen.client.ledger import FILE, Ledger
from lichen.client.ledger_book import Limit, Limits, Split
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment, _epsilon, epsilon, noise_multiplier
from lichen.common.privacy.schedule import MOST_NOISE

DELTA = 1e-5
STEP = Segment(2.0, 0.1, 20)
FREE = Limits(unit="example", run=Limit(100.0, DELTA))


def limits(run: float, life: float | None = None, *, repeats: bool = False, unit: str = "example") -> Limits:
    return Limits(unit=unit, run=Limit(run, DELTA), life=None if life is None else Limit(life, DELTA), repeats=repeats)


def reserve(ledger: Ledger, split: Split, run: str, message: str, round: int, planned: Segment, limits: Limits, **more: Any) -> int:
    """Steps granted to one who reads the one record of a split."""
    reads = set(ledger.assign(split, [len(split)]))
    return ledger.reserve(
        split, run, message, round, planned, limits, more.pop("reads", reads), as_of=ledger.split_at, **more
    ).segment.steps


def history(ledger: Ledger, split: Split = "train", run: str | None = None) -> list[Segment]:
    return [entry.segment for entry in ledger.entries() if entry.split == split and run in {None, entry.run}]


def steps_of(ledger: Ledger) -> int:
    return sum(entry.segment.steps for entry in ledger.entries())


def test_a_message_pays_once_until_something_of_it_left(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        assert reserve(ledger, "train", "r", "m", 1, STEP, FREE) == 20
    for _ in range(3):  # it crashed before its reply, and starts again
        with Ledger(tmp_path) as ledger:
            assert reserve(ledger, "train", "r", "m", 1, STEP, FREE) == 20
            assert steps_of(ledger) == 20
    with Ledger(tmp_path) as ledger:
        ledger.released("train", "r", "m")
        assert reserve(ledger, "train", "r", "m", 1, STEP, FREE) == 20
        assert steps_of(ledger) == 40  # fresh noise on the same rows is another release
        assert reserve(ledger, "train", "r", "m", 1, STEP, FREE) == 20
        assert steps_of(ledger) == 40


def test_what_repeats_bit_for_bit_pays_once(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for _ in range(3):
            assert reserve(ledger, "train", "r", "m", 1, STEP, limits(100, repeats=True)) == 20
            ledger.released("train", "r", "m", again=True)
        assert steps_of(ledger) == 20


@pytest.mark.parametrize(
    "other", [STEP._replace(noise_multiplier=0.5), STEP._replace(sample_rate=1.0)], ids=["less noise", "more of the rows"]
)
def test_other_steps_under_the_same_id_pay_for_themselves(tmp_path: Path, other: Segment) -> None:
    """Else a coordinator would have strong noise charged, and weak noise added."""
    with Ledger(tmp_path) as ledger:
        reserve(ledger, "train", "r", "m", 1, STEP, FREE)
        assert reserve(ledger, "train", "r", "m", 1, other, FREE) == 20
        assert history(ledger, "train") == [STEP, other]
        with pytest.raises(LichenError) as caught:
            reserve(ledger, "train", "r", "m", 1, other._replace(sample_rate=0.9), limits(epsilon([STEP, other], DELTA)))
        assert caught.value.code is Code.PRIVACY_BUDGET


def test_a_reservation_grants_no_more_steps_than_are_asked(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        reserve(ledger, "train", "r", "m", 1, STEP, FREE)
        assert reserve(ledger, "train", "r", "m", 1, STEP._replace(steps=5), FREE) == 5
        assert reserve(ledger, "train", "r", "m", 1, STEP._replace(steps=50), FREE) == 20


@pytest.mark.parametrize("life", [None, 5.0])
def test_the_accountant_is_asked_in_a_runs_first_round_alone(tmp_path: Path, life: float | None) -> None:
    rounds, step = 6, Segment(noise_multiplier(5.0, DELTA, 0.1, 30), 0.1, 5)
    asked = []
    with Ledger(tmp_path) as ledger:
        for round in range(1, rounds + 1):
            before = _epsilon.cache_info().misses
            assert reserve(ledger, "train", "r", f"m{round}", round, step, limits(5.0, life), ahead=5 * (rounds - round)) == 5
            asked.append(_epsilon.cache_info().misses - before)
        with pytest.raises(LichenError, match="not one more step"):
            reserve(ledger, "train", "r", "m7", 7, step, limits(epsilon([step] * 6, DELTA), life))
    assert asked[1:] == [0] * (rounds - 1)


def test_a_run_that_cannot_pay_all_that_is_ahead_goes_on_as_far_as_it_can(tmp_path: Path) -> None:
    step = Segment(2.0, 0.1, 5)
    with Ledger(tmp_path) as ledger:
        granted = [reserve(ledger, "train", "r", f"m{n}", n, step, limits(epsilon([step] * 2, DELTA)), ahead=5 * (3 - n)) for n in (1, 2)]
        assert granted == [5, 5]
        with pytest.raises(LichenError, match="not one more step"):
            reserve(ledger, "train", "r", "m3", 3, step, limits(epsilon([step] * 2, DELTA)))


def test_runs_splits_and_messages_are_apart(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for split, run, message in (("train", "r", "a"), ("train", "r", "b"), ("train", "q", "a"), ("holdout", "r", "a")):
            reserve(ledger, split, run, message, 1, STEP, FREE)  # type: ignore[arg-type]
        assert len(history(ledger, "train")) == 3
        assert len(history(ledger, "train", "r")) == 2
        assert len(history(ledger, "holdout")) == 1
        assert ledger.run_epsilon("r", "train", DELTA) == epsilon([STEP] * 2, DELTA) > ledger.run_epsilon("q", "train", DELTA) > 0
        assert ledger.run_epsilon("r", "holdout", DELTA) == epsilon([STEP], DELTA)
        ledger.released("train", "r", "a")
        reserve(ledger, "train", "r", "b", 1, STEP, FREE)
        assert len(ledger.entries()) == 4


def test_the_runs_limit_cuts_the_last_round_and_ends_it(tmp_path: Path) -> None:
    noise = noise_multiplier(2.0, DELTA, 0.1, 50)
    planned = Segment(noise, 0.1, 20)
    with Ledger(tmp_path) as ledger:
        granted = [reserve(ledger, "train", "r", f"m{number}", number, planned, limits(2.0)) for number in (1, 2, 3)]
        assert granted[:2] == [20, 20]
        assert 10 <= granted[2] < 20
        spent = ledger.run_epsilon("r", "train", DELTA)
        assert spent <= 2.0 < epsilon([planned._replace(steps=sum(granted) + 1)], DELTA)
        with pytest.raises(LichenError) as caught:
            reserve(ledger, "train", "r", "m4", 4, planned, limits(2.0))
        assert caught.value.code is Code.PRIVACY_BUDGET
        assert ledger.run_epsilon("r", "train", DELTA) == spent


def test_the_life_limit_holds_over_runs(tmp_path: Path) -> None:
    planned = Segment(noise_multiplier(2.0, DELTA, 0.1, 20), 0.1, 20)
    with Ledger(tmp_path) as ledger:
        assert reserve(ledger, "train", "one", "m", 1, planned, limits(2.0, 2.5)) == 20
        assert reserve(ledger, "train", "two", "m", 1, planned, limits(2.0, 2.5)) == 20
        second = ledger.entries()[1]
        assert planned.noise_multiplier < second.segment.noise_multiplier <= MOST_NOISE * planned.noise_multiplier
        assert second.planned_noise == planned.noise_multiplier
        spent = ledger.spent(1, Limit(2.5, DELTA))
        assert spent.bound == "rdp-filter"
        assert 2.49 < spent.epsilon <= 2.5
        with pytest.raises(LichenError) as caught:
            reserve(ledger, "train", "three", "m", 1, planned, limits(2.0, 2.5))
        assert "all runs together 2.5" in caught.value.what
        assert reserve(ledger, "holdout", "three", "m", 1, planned, limits(2.0, 2.5)) == 20  # other rows


def test_units_are_not_added_up(tmp_path: Path) -> None:
    """ε for a row bounds nothing for the patient whose rows they are, nor the other way round: a life has one unit."""
    with Ledger(tmp_path) as ledger:
        reserve(ledger, "train", "one", "m", 1, STEP, limits(50, 50))
        with pytest.raises(LichenError) as caught:
            reserve(ledger, "train", "two", "m", 1, STEP, limits(50, 50, unit="entity:patient"))
        assert caught.value.code is Code.PRIVACY_BUDGET
        assert "entity:patient" in caught.value.what
        assert reserve(ledger, "train", "two", "m", 1, STEP, limits(50, 50)) == 20
        assert {entry.unit for entry in ledger.entries()} == {"example"}


def test_nothing_is_charged_when_nothing_fits(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        with pytest.raises(LichenError):
            reserve(ledger, "train", "r", "m", 1, Segment(0.0, 1.0, 5), limits(8.0))
        assert ledger.entries() == []


def test_entries_keep_every_bit(tmp_path: Path) -> None:
    odd = Segment(0.1 + 0.2, 1 / 3, 7)
    before = time.time()
    with Ledger(tmp_path) as ledger:
        reserve(ledger, "train", "r", "m", 4, odd, limits(1e6))
    with Ledger(tmp_path) as ledger:
        (entry,) = ledger.entries()
        assert entry.segment == odd
        assert (entry.split, entry.run, entry.message_id, entry.round, entry.unit) == ("train", "r", "m", 4, "example")
        assert before <= entry.reserved_at <= time.time()
        history(ledger, "train").clear()  # hole 6: what is handed out is a copy
        assert history(ledger, "train") == [odd]


def unusable(home: Path) -> LichenError:
    with pytest.raises(LichenError) as caught:
        with Ledger(home) as ledger:
            ledger.entries()
    assert caught.value.code is Code.PRIVACY_HISTORY
    assert str(home / "ledger.sqlite") in str(caught.value)
    return caught.value


def test_a_newer_or_foreign_file_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    for change, what in (("PRAGMA user_version=3", "its format is 3"), ("PRAGMA user_version=0", "already exists")):
        database = sqlite3.connect(tmp_path / "ledger.sqlite")
        database.execute(change)
        database.commit()
        database.close()
        assert what in str(unusable(tmp_path))


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for number in range(40):
            reserve(ledger, "train", f"r{number}", "m" * 400, 1, STEP, limits(1e6))
    path = tmp_path / "ledger.sqlite"
    whole = path.read_bytes()
    assert len(whole) > 3 * 4096
    for damaged in (b"not a database at all" * 100, whole[:5000], whole[:4096] + b"\xa5" * (len(whole) - 4096)):
        path.write_bytes(damaged)
        unusable(tmp_path)
        with pytest.raises(LichenError) as caught:
            reserve(Ledger(tmp_path), "train", "r", "new", 1, STEP, limits(1e6))
        assert caught.value.code is Code.PRIVACY_HISTORY
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    with Ledger(tmp_path) as ledger:
        assert len(ledger.entries()) == 40


def test_a_home_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LichenError) as caught:
        Ledger(tmp_path / "none")
    assert caught.value.code is Code.PRIVACY_HISTORY


# --- processes ----------------------------------------------------------------------------------------------------------------------

_RESERVE = """
import sys, time
from pathlib import Path
from lichen.client.ledger import Ledger
from lichen.client.ledger_book import Limit, Limits, Split
from lichen.common.privacy.accounting import Segment
from lichen.common.errors import LichenError
home, name, count, steps, limit, then = Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:6]), sys.argv[6]
with Ledger(home) as ledger:
    reads, limits = set(ledger.assign("train", [len("train")])), Limits("example", Limit(limit, 1e-5))
    for number in range(int(count)):
        try:
            ledger.reserve("train", "r", f"{name}-{number}", 1, Segment(1.0, 0.1, int(steps)), limits, reads, as_of=ledger.split_at)
        except LichenError as error:
            print(int(error.code))
print("done", flush=True)
if then == "wait":
    time.sleep(60)
"""


def reserving(home: Path, name: str, count: int, steps: int, limit: float, then: str = "") -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _RESERVE, str(home), name, str(count), str(steps), str(limit), then]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_processes_share_one_budget(tmp_path: Path) -> None:
    limit = epsilon([Segment(1.0, 0.1, 25)], DELTA)  # for 25 steps: 8 of 3 and one of 1, whoever is first
    processes = [reserving(tmp_path, str(number), 5, 3, limit) for number in range(3)]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert all(lines[-1] == "done" for lines in told)
    with Ledger(tmp_path) as ledger:
        assert sorted(entry.segment.steps for entry in ledger.entries()) == [1] + [3] * 8
        assert ledger.run_epsilon("r", "train", DELTA) <= limit
    assert sum(line == "50" for lines in told for line in lines) == 15 - 9


def test_a_new_ledger_is_opened_while_another_process_makes_it(tmp_path: Path) -> None:
    """The one statement for which SQLite does not wait for its turn by itself."""
    making = sqlite3.connect(tmp_path / FILE, isolation_level=None, check_same_thread=False)
    making.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, making.close)
    timer.start()
    with Ledger(tmp_path) as ledger:
        assert ledger.entries() == []
    timer.join()


def test_what_was_reserved_survives_a_kill(tmp_path: Path) -> None:
    process = reserving(tmp_path, "m", 1, 20, 100.0, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Ledger(tmp_path) as ledger:
        assert steps_of(ledger) == 20
        # the message comes again: nothing had left, and nothing more is paid
        planned = Segment(1.0, 0.1, 20)
        assert reserve(ledger, "train", "r", "m-0", 1, planned, FREE) == 20
        assert steps_of(ledger) == 20
        # another message does not get it for nothing
        assert reserve(ledger, "train", "r", "m-1", 1, planned, FREE) == 20
        assert steps_of(ledger) == 40
