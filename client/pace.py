"""When a client under `local.partial` stops before its last step: by time alone, so that what it sends is there by the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

from lichen.common.errors import Code, LichenError

MARGIN = 0.1
"""Share of the time until the deadline that is kept for what follows the steps: the update is written and sent."""

Stop = Callable[[int], bool]
"""Asked before each step, with how many are done."""


class Until:
    """Stops where the next step, if it takes as long as the last one, would not be done in time.

    Args:
        seconds: from now until the deadline.
        clock: in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + (1 - MARGIN) * seconds
        self._began: float | None = None

    def __call__(self, done: int) -> bool:
        """Whether to stop.

        Raises:
            LichenError: WORKER_DEADLINE, if there was no time for one step.
        """
        now = self._clock()
        last = 0.0 if self._began is None else now - self._began
        self._began = now
        if now + last <= self._end:
            return False
        if not done:
            raise _no_time()
        return True


def at_speed(seconds: float, speed: float) -> Stop:
    """What a simulated client does.

    Args:
        seconds: virtual ones until the deadline.
        speed: its steps in one of them.

    Raises:
        LichenError: WORKER_DEADLINE, as above.
    """
    most = int((1 - MARGIN) * seconds * speed)
    if most == 0:
        raise _no_time()
    return lambda done: done >= most


def _no_time() -> LichenError:
    return LichenError(
        Code.WORKER_DEADLINE,
        "no step fits into the time that is left until the deadline",
        fix="Raise cohort.deadline_s, or lower the batch size.",
    )
