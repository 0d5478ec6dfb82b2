"""What the app asks a trainer to do; light, so that an idle agent does not load torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lichen.client.gate import Gate
    from lichen.client.pace import Stop
    from lichen.common.model.adapter import State
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.per_unit import Unit
    from lichen.common.privacy.randomness import RandomSource
    from lichen.common.tasks.task import Encoded


@dataclass(frozen=True)
class Private:
    """What makes a training private."""

    units: Sequence[Unit]
    """The rows of each unit."""
    segment: Segment
    """Noise, sample rate and steps, reserved already."""
    declared_size: int
    """The denominator is the sample rate times this."""
    gate: Gate
    """Asked before each step."""


@dataclass(frozen=True)
class Job:
    """One client's training in a round."""

    start: State
    data: Encoded
    round: int
    source: RandomSource
    cache: Path | None = None
    private: Private | None = None
    most_steps: int | None = None
    """Without privacy: fewer steps than the plan's, where the assignment asks for them. With it they are in the segment."""
    stop: Stop | None = None
    """Without privacy: ends the training before its last step."""
