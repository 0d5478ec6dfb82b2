"""One piece of work at a time beside the thread that asks for it: how a model is scored while the next round runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


class Beside:
    """A thread for one piece of work at a time.

    Args:
        here: whether to work in the caller's own thread instead, at once.
    """

    def __init__(self, *, here: bool = False) -> None:
        self._here = here
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, after what was begun before.

        Raises:
            BaseException: what either raised; then nothing is begun.
        """
        self.settle()
        if self._here:
            work()
            return
        # a daemon, because scoring can't be interrupted: a process must be able to leave without it
        self._thread = threading.Thread(target=self._run, args=(work, torch.get_num_threads()), name="scoring", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the work is done.

        Raises:
            BaseException: what it raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle_after(self, cause: BaseException) -> None:
        """Wait until the work is done where ``cause`` ends all: what the work raised is logged, and ``cause`` is the caller's to raise."""
        try:
            self.settle()
        except Exception as error:
            log.warning("the score that was being made failed (%s), and so did its run: %s", error, cause)

    def _run(self, work: Callable[[], None], threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps it for each thread: with the caller's number the sums are the caller's too
        try:
            work()
        except BaseException as error:  # it is the caller's, at the next call
            self._error = error
