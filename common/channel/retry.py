"""How long to wait before trying again: a fleet that lost its coordinator at one moment must not come back at one moment."""

from __future__ import annotations

import random

FIRST = 0.5
LONGEST = 30.0


def jittered(limit: float) -> float:
    """Seconds to wait: anything up to ``limit``, which is kept between `FIRST` and `LONGEST` («full jitter», Brooker 2015)."""
    return random.uniform(0.0, min(LONGEST, max(FIRST, limit)))  # noqa: S311


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, 1 and more: full jitter under a limit that doubles."""
    return jittered(FIRST * 2.0 ** min(failures - 1, 16))
