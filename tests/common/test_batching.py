"""Rows dealt to passes: nothing lost, bounds kept, and no dealing of neighbours pads less."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from lichen.common.batching import passes

ITEMS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), max_size=7)


def cost_of(found: list[list[int]], items: list[tuple[int, int]], cost: float) -> float:
    return sum(cost + sum(items[i][0] for i in part) * max(items[i][1] for i in part) for part in found)


@given(ITEMS, st.integers(1, 8), st.floats(0, 100))
def test_every_item_is_in_one_pass_within_the_bound_and_the_cost_is_least(items: list[tuple[int, int]], most: int, cost: float) -> None:
    found = passes([rows for rows, _ in items], [length for _, length in items], most, cost)
    assert sorted(index for part in found for index in part) == list(range(len(items)))
    assert all(len(part) == 1 or sum(items[i][0] for i in part) <= most for part in found)
    order = sorted(range(len(items)), key=lambda item: (-items[item][1], item))
    cheapest = cost_of(found, items, cost)
    for count in range(len(items)):
        for cuts in combinations(range(1, len(items)), count):
            other = [order[a:b] for a, b in zip((0, *cuts), (*cuts, len(items)), strict=True)]
            if all(len(part) == 1 or sum(items[i][0] for i in part) <= most for part in other):
                assert cheapest <= cost_of(other, items, cost) + 1e-6


def test_a_dear_pass_is_not_divided_and_a_free_one_is_by_length() -> None:
    assert passes([1] * 4, [9, 3, 9, 3], 8, 1e9) == [[0, 2, 1, 3]]
    assert passes([1] * 4, [9, 3, 9, 3], 8, 1.0) == [[0, 2], [1, 3]]
    assert passes([], [], 8, 1.0) == []
