"""When a client that runs out of time stops: by its clock, never after the deadline's margin, and never with nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.client.pace import MARGIN, Stop, Until, at_speed
from lichen.common.errors import Code, LichenError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def steps_of(stop: Stop, clock: Clock, lengths: list[float]) -> int:
    for done, length in enumerate(lengths):
        if stop(done):
            return done
        clock.now += length
    return len(lengths)


def test_it_stops_where_another_step_would_be_late() -> None:
    clock = Clock()
    assert steps_of(Until(10.0, clock), clock, [2.0] * 9) == 4  # 8 s; a fifth would end at 10, after the margin of 1 s


def test_whoever_is_in_time_does_all_steps() -> None:
    clock = Clock()
    assert steps_of(Until(10.0, clock), clock, [1.0] * 8) == 8


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=30), st.floats(0.1, 60.0))
def test_steps_that_grow_no_longer_end_before_the_margin(lengths: list[float], seconds: float) -> None:
    clock = Clock()
    lengths.sort(reverse=True)
    done = steps_of(Until(seconds, clock), clock, lengths)
    assert done >= 1
    assert done == 1 or clock.now - 100.0 <= (1 - MARGIN) * seconds + 1e-9


def test_without_time_for_a_step_there_is_no_update() -> None:
    clock = Clock()
    stop = Until(1.0, clock)
    clock.now += 2.0
    for late in (lambda: stop(0), lambda: at_speed(1.0, 0.5)):
        with pytest.raises(LichenError) as caught:
            late()
        assert caught.value.code is Code.WORKER_DEADLINE


def test_a_simulated_client_takes_the_steps_that_its_speed_allows() -> None:
    stop = at_speed(10.0, 0.5)
    assert [stop(done) for done in range(6)] == [False, False, False, False, True, True]
