"""Work beside a thread: one piece at a time, in order, and what it raises is raised to who asked for it."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from lichen.coordinator.scoring import Beside

WAIT_S = 20


def fail() -> None:
    raise ValueError("no score")


def test_the_work_is_done_while_the_caller_goes_on() -> None:
    beside, go, done = Beside(), threading.Event(), threading.Event()

    def work() -> None:
        assert go.wait(WAIT_S)
        done.set()

    beside.start(work)
    assert not done.is_set()
    go.set()
    beside.settle()
    assert done.is_set()
    beside.settle()  # nothing is left to wait for


def test_the_next_begins_when_the_one_before_is_done() -> None:
    beside, order = Beside(), list[int]()
    for number in range(20):
        beside.start(lambda number=number: order.append(number))  # type: ignore[misc]
    beside.settle()
    assert order == list(range(20))


def test_here_it_is_done_at_once_in_the_callers_thread() -> None:
    threads: list[int] = []
    Beside(here=True).start(lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]
    with pytest.raises(ValueError, match="no score"):
        Beside(here=True).start(fail)


def test_what_it_raises_is_raised_once_and_nothing_is_begun_over_it() -> None:
    beside, done = Beside(), list[int]()
    beside.start(fail)
    with pytest.raises(ValueError, match="no score"):
        beside.settle()
    beside.settle()
    beside.start(fail)
    with pytest.raises(ValueError, match="no score"):
        beside.start(lambda: done.append(1))
    assert done == []
    beside.start(lambda: done.append(2))
    beside.settle()
    assert done == [2]


def test_what_it_raises_after_its_caller_failed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    beside = Beside()
    beside.start(fail)
    with caplog.at_level(logging.WARNING):
        beside.settle_after(RuntimeError("boom"))
    assert "no score" in caplog.text
    assert "boom" in caplog.text


def test_torch_has_as_many_threads_as_its_caller() -> None:
    before, found = torch.get_num_threads(), list[int]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            beside = Beside()
            beside.start(lambda: found.append(torch.get_num_threads()))
            beside.settle()
    finally:
        torch.set_num_threads(before)
    assert found == [1, 2]
