"""What tests of streams of tasks share: a stream over the tiny rows, and what a run of it has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lichen.common.model.adapter import State
from lichen.common.plan import Plan
from lichen.common.result import Result
from lichen.coordinator.versions import Versions

STREAM = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]
EXACT = {"uplink": {"codec": "none"}, "downlink": {"codec": "none"}}
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}


def told(result: Result) -> Any:
    """Of the tasks; a run that tells nothing of them fails."""
    assert result.continual is not None
    return result.continual


def states(out: Path, plan: Plan) -> list[State]:
    """The tensors of each version, with all that is kept."""
    versions = Versions(out, plan)
    return [versions.state(version) for version in versions.all() if version.number]


def told_of(out: Path, plan: Plan) -> list[dict[str, Any]]:
    """What each version tells, but when it was made."""
    return [version.model_dump(exclude={"at"}) for version in Versions(out, plan).all()]


def same(left: State, right: State) -> bool:
    """To the bit."""
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())
