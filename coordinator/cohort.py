"""Who is asked: which of the connected nodes a round takes, and which have no privacy budget left."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lichen.common import records
from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from lichen.common.plan import Plan
    from lichen.coordinator.aggregation.central_dp import CentralDP
    from lichen.coordinator.run_directory import ServerState

log = logging.getLogger(__name__)
POLL_S = 0.05


class Cohorts:
    """Those of one run.

    Args:
        plan: the run's.
        name: of a node, by its id.
        central: draws cohorts in secret under `unit: client`; else None.
    """

    def __init__(self, plan: Plan, name: Callable[[int], str], central: CentralDP | None) -> None:
        self._plan, self._name, self._central = plan, name, central

    def choose(self, round: int, grid: Grid, state: ServerState) -> list[int]:
        """A seeded draw of `cohort.asked` of the connected nodes, waiting for `cohort.size`; a secret one by `CentralDP`.

        Drawn from them in the order of their names, where the grid knows them: ids are random, and other in a simulation. Nodes that
        have said that their privacy budget is spent are not drawn.

        Raises:
            LichenError: COHORT_TOO_SMALL, if fewer than `cohort.minimum` may be drawn; never under `unit: client`.
        """
        nodes = self.wait_for_nodes(round, grid)
        if self._central:
            return sorted(self._central.draw(nodes, round))
        here = len(nodes)
        nodes = self.with_budget(records.TRAIN, nodes, state)
        if len(nodes) < self._plan.cohort.minimum:
            without = f", {here - len(nodes)} more without privacy budget" if here > len(nodes) else ""
            raise LichenError(
                Code.COHORT_TOO_SMALL,
                f"{len(nodes)} nodes are connected{without}, cohort.minimum is {self._plan.cohort.minimum}",
                where=f"round {round}",
                fix="Connect more nodes, or submit a plan with a smaller minimum.",
            )
        return draw_cohort(self._plan, nodes, round)

    def wait_for_nodes(self, round: int, grid: Grid) -> list[int]:
        """The connected nodes, by name, once they are `cohort.size`, or those that are there when the deadline has passed."""
        size = self._plan.cohort.size
        until = time.monotonic() + self._plan.cohort.deadline_s
        if (here := len(list(grid.get_node_ids()))) < size:
            log.info("round %d waits: %d nodes are connected, cohort.size is %d", round, here, size)
        while len(nodes := sorted(grid.get_node_ids(), key=self._name)) < size and time.monotonic() < until:
            time.sleep(POLL_S)
        return nodes

    def with_budget(self, kind: str, nodes: list[int], state: ServerState) -> list[int]:
        """The nodes that have not answered, in this run, that they have nothing left for such a message."""
        spent = set(state.exhausted.get(kind, ()))
        return [node for node in nodes if self._name(node) not in spent]

    def drop_out(self, kind: str, client: str, state: ServerState) -> None:
        """Ask a client for such a message no more: it has answered that it has nothing left."""
        spent = state.exhausted.setdefault(kind, [])
        if client not in spent:
            log.warning("%s has no privacy budget left, and is not asked again in this run", client)
            spent.append(client)


def draw_cohort(plan: Plan, nodes: Sequence[int], round: int) -> list[int]:
    """A round's cohort: `cohort.asked` of the nodes, or all if they are fewer; ascending. It follows from the plan's seed."""
    generator = random.Random(f"{plan.seed}|cohort|{round}")  # noqa: S311 - who is asked is no secret here
    return sorted(generator.sample(nodes, min(plan.cohort.asked, len(nodes))))
