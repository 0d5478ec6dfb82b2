"""Partitions: every row goes to one client, again the same for a seed; nonsense is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.errors import Code, LichenError
from lichen.simulations.datasets import load_named
from lichen.simulations.partition import partition
from lichen.simulations.rows import Groups

FIRST = {
    "iid": [[4, 12, 14], [0, 1, 2], [5, 15, 18], [3, 6, 8]],
    "dirichlet:0.5": [[5, 7, 12], [20, 111, 114], [0, 1, 13], [2, 3, 4]],
}
ROWS = [{"text": f"text {number}", "label": "abc"[number % 3], "carrier": "xy"[number % 2]} for number in range(300)]


def assert_partition(parts: Groups, count: int) -> None:
    assert sorted(np.concatenate(list(parts)).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert [len(part) for part in parts] == parts.sizes.tolist()
    assert all((parts.each()[part] == number).all() for number, part in enumerate(parts))


def same(left: Groups, right: Groups) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=120),
    clients=st.integers(1, 6),
    kind=st.one_of(st.just("iid"), st.floats(0.01, 1000).map("dirichlet:{}".format)),
    seed=st.integers(0, 2**64 - 1),
    minimum=st.integers(0, 3),
)
def test_every_row_goes_to_one_client_and_the_same_for_a_seed(labels: list[str], clients: int, kind: str, seed: int, minimum: int) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    try:
        parts = partition(rows, kind, clients, seed, minimum=minimum)
    except LichenError:
        # only a skewed draw, or too few rows, may be refused
        assert kind.startswith("dirichlet") or clients > len(rows)
        return
    assert len(parts) == clients
    assert_partition(parts, len(rows))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 if kind == "iid" else min(sizes) >= minimum
    assert same(parts, partition(rows, kind, clients, seed, minimum=minimum))


@given(st.lists(st.one_of(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=50))
def test_by_field_gives_a_client_a_value(values: list[Any]) -> None:
    rows = [{"text": "x", "carrier": value} for value in values]
    parts = partition(rows, "by:carrier", None, 0)
    assert_partition(parts, len(rows))
    assert all(len({values[index] for index in part}) == 1 for part in parts)
    assert len(parts) == len(set(values)) == len(partition(rows, "by:carrier", len(set(values)), 1))


def test_r8_by_dirichlet() -> None:
    rows = load_named("r8").train
    parts = partition(rows, "dirichlet:0.5", 4, 0)
    assert_partition(parts, 5485)
    assert min(map(len, parts)) >= 10
    assert not same(parts, partition(rows, "dirichlet:0.5", 4, 1))


def test_small_alpha_skews_and_large_alpha_does_not() -> None:
    def spread(kind: str) -> float:
        shares = [
            [Counter(ROWS[index]["label"] for index in part)[label] / len(part) for label in "abc"] for part in partition(ROWS, kind, 3, 5)
        ]
        return float(np.std(shares, axis=0).mean())

    assert spread("dirichlet:0.1") > 0.3 > 0.05 > spread("dirichlet:10000")


@pytest.mark.parametrize(
    ("kind", "clients", "words"),
    [
        ("", 2, "no partition is named ''"),
        ("random", 2, "no partition is named 'random'"),
        ("iid:3", 2, "no partition is named 'iid:3'"),
        ("by:", 2, "no partition is named 'by:'"),
        ("iid", 0, "cannot be dealt to 0 clients"),
        ("iid", -1, "cannot be dealt to -1 clients"),
        ("iid", 301, "300 rows cannot be dealt to 301 clients"),
        ("iid", None, "cannot be dealt to None clients"),
        ("dirichlet", 2, "'' is no positive number"),
        ("dirichlet:x", 2, "'x' is no positive number"),
        ("dirichlet:0", 2, "'0' is no positive number"),
        ("dirichlet:-1", 2, "'-1' is no positive number"),
        ("dirichlet:nan", 2, "'nan' is no positive number"),
        ("dirichlet:inf", 2, "'inf' is no positive number"),
        ("dirichlet:0.5", 31, "too few for 31 clients of at least 10"),
        ("dirichlet:0.0001", 20, "fewer than 10 rows"),
        ("by:carrier", 3, "'carrier' has 2 values, but 3 clients"),
        ("by:nothing", None, "row 0 has no 'nothing'"),
    ],
)
def test_nonsense_is_refused(kind: str, clients: int | None, words: str) -> None:
    with pytest.raises(LichenError) as caught:
        partition(ROWS, kind, clients, 0)
    assert caught.value.code is Code.PARTITION_INVALID
    assert words in caught.value.what
    with pytest.raises(LichenError):
        partition([], kind, clients, 0)


def test_labels_are_compared_by_their_text_and_values_by_themselves() -> None:
    rows = [{"label": label} for label in [1, "1", 2, "2"] * 10]
    same_labels = [{"label": str(row["label"])} for row in rows]
    assert same(partition(rows, "dirichlet:1.0", 2, 0, minimum=1), partition(same_labels, "dirichlet:1.0", 2, 0, minimum=1))
    assert len(partition(rows, "by:label", None, 0)) == 4


def test_a_partition_is_the_draw_that_it_always_was() -> None:
    rows = load_named("r8").train
    assert {kind: [part[:3].tolist() for part in partition(rows, kind, 4, 0)] for kind in FIRST} == FIRST
