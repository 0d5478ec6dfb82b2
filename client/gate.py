"""The gate before each noised step: what the ledger has reserved is all that is taken, and with no less noise."""

from __future__ import annotations

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment


class Gate:
    """Counts the steps of one reservation, in memory: to ask it costs microseconds.

    Args:
        granted: what the ledger has charged, on disk already.
    """

    def __init__(self, granted: Segment) -> None:
        self._granted = granted
        self._taken = 0

    def step(self, asked: Segment) -> None:
        """Let steps pass before they are taken, or none of them.

        Args:
            asked: their number, and the noise and sample rate with which they will be taken.

        Raises:
            LichenError: PRIVACY_BUDGET, if that is more than was reserved.
        """
        granted = self._granted
        within = asked.noise_multiplier >= granted.noise_multiplier and asked.sample_rate <= granted.sample_rate
        if not within or asked.steps < 1 or self._taken + asked.steps > granted.steps:
            raise LichenError(Code.PRIVACY_BUDGET, f"step {self._taken + asked.steps}, {asked}, is beyond what was reserved: {granted}")
        self._taken += asked.steps
