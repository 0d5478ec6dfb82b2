"""The gate before each step: no step more than was reserved, none with less noise or more of the rows; and it costs nothing."""

from __future__ import annotations

import time

import pytest

from lichen.client.gate import Gate
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment

GRANTED = Segment(1.5, 0.1, 3)
STEP = GRANTED._replace(steps=1)


def stopped(gate: Gate, asked: Segment) -> None:
    with pytest.raises(LichenError) as caught:
        gate.step(asked)
    assert caught.value.code is Code.PRIVACY_BUDGET


def test_so_many_steps_as_were_reserved_and_no_more() -> None:
    gate = Gate(GRANTED)
    for _ in range(3):
        gate.step(STEP)
    for _ in range(2):
        stopped(gate, STEP)


@pytest.mark.parametrize(
    "asked",
    [
        STEP._replace(noise_multiplier=1.49),
        STEP._replace(noise_multiplier=float("nan")),
        STEP._replace(sample_rate=0.11),
        STEP._replace(steps=4),
        STEP._replace(steps=0),
        STEP._replace(steps=-1),
    ],
)
def test_another_step_than_was_reserved_is_not_taken_and_not_counted(asked: Segment) -> None:
    gate = Gate(GRANTED)
    stopped(gate, asked)
    gate.step(STEP._replace(noise_multiplier=9.0, sample_rate=0.05))
    gate.step(STEP._replace(steps=2))
    stopped(gate, STEP)


def test_it_takes_less_than_a_millisecond() -> None:
    gate = Gate(Segment(1.5, 0.1, 2000))
    took = []
    for _ in range(2000):
        began = time.thread_time()
        gate.step(STEP)
        took.append(time.thread_time() - began)
    print(f"{1e6 * sorted(took)[1000]:.1f} µs")
    assert sorted(took)[1980] < 1e-3
