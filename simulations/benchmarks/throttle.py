"""Agents of different speed on one machine: their workers get a share of a core's time, by stopping and continuing them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

TICK_S = 0.02
_SAVED_S = 0.2  # of the time that a worker did not use it may use so much later, times its share


@contextmanager
def throttled(shares: Mapping[int, float]) -> Iterator[None]:
    """Hold the workers of some agents to shares of a core's time, which is what makes them slow: agents themselves are not touched.

    Args:
        shares: by an agent's process id, of one core; of 1 and more, nothing is done. Together below the number of cores, or they
            hold each other up as well.
    """
    over = threading.Event()
    threads = [threading.Thread(target=_hold, args=(agent, share, over), daemon=True) for agent, share in shares.items() if share < 1]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _hold(agent: int, share: float, over: threading.Event) -> None:
    """A bucket of CPU time that fills at the share's rate; a worker runs while there is some in it."""
    used: dict[int, float] = {}
    left, at = 0.0, time.monotonic()
    while not over.wait(TICK_S):
        now = time.monotonic()
        left, at = min(left + share * (now - at), share * _SAVED_S), now
        workers = _workers(agent)
        for worker in workers:
            with suppress(psutil.Error):
                times = worker.cpu_times()
                left -= times.user + times.system - used.get(worker.pid, 0.0)
                used[worker.pid] = times.user + times.system
        _tell(workers, signal.SIGCONT if left > 0 else signal.SIGSTOP)
    _tell(_workers(agent), signal.SIGCONT)


def _workers(agent: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(agent).children())
    except psutil.Error:
        return []


def _tell(workers: list[psutil.Process], number: int) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, number)
