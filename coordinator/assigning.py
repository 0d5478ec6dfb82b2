"""What each node is asked of a plan, by what it tells of its machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lichen.common.codec.registry import uplink_codec
from lichen.common.errors import LichenError
from lichen.common.fitting import fit
from lichen.common.model.memory import Shape

if TYPE_CHECKING:
    from lichen.common.hardware import Profile
    from lichen.common.model.adapter import TunedModel
    from lichen.common.plan import Plan

log = logging.getLogger(__name__)


class Assigner:
    """One run's.

    Args:
        plan: of the run.
        model: built from it.
        profile_of: what a node tells; None where it tells nothing, and is asked the plan as it is.
        name_of: a node's name, for the log.
    """

    def __init__(self, plan: Plan, model: TunedModel, profile_of: Callable[[int], Profile | None], name_of: Callable[[int], str]) -> None:
        self._plan, self._profile_of, self._name_of = plan, profile_of, name_of
        self._told: dict[int, tuple[str, ...]] = {}
        try:
            self._shape: Shape | None = Shape.of(model)
        except LichenError as error:
            log.warning("nodes are asked the plan as it is: %s", error)
            self._shape = None

    def of(self, node: int, payload_bytes: int) -> dict[str, Any]:
        """The fields of a node's `Assignment` that differ from the plan.

        Args:
            node: whose.
            payload_bytes: of what it fetches of the model.
        """
        profile = self._profile_of(node)
        if profile is None or self._shape is None:
            return {}
        codec, count = uplink_codec(self._plan.transfer.uplink), self._shape.trainable
        update_bytes = codec.length(count) if codec else 4 * count
        found = fit(self._plan, self._shape, profile, (payload_bytes, update_bytes))
        if found.reasons != self._told.get(node, ()):
            self._told[node] = found.reasons
            level = logging.INFO if found.possible else logging.WARNING
            log.log(level, "%s is asked %s; %s", self._name_of(node), found.changes or "the plan as it is", "; ".join(found.reasons))
        return found.changes
