"""Who is asked: which of the connected nodes a round takes, and which have no privacy budget left."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lichen.common import records
from lichen.common.errors import Code, LichenError, name_of

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

    from lichen.common.plan import Plan
    from lichen.coordinator.aggregation.central_dp import CentralDP
    from lichen.coordinator.run_directory import ServerState

log = logging.getLogger(__name__)
POLL_S = 0.05
NEWS_S = 1.0
"""Seconds after which a coordinator that waits for new data looks at its nodes again, whatever wakes it before."""


@runtime_checkable
class TellsNews(Protocol):
    """A grid whose nodes tell how much new data they have."""

    def new_rows(self) -> dict[int, int]:
        """By the ids of the nodes that are there how many new rows they declare."""
        ...

    def wait_for_news(self, timeout: float) -> None:
        """Wait until that changes, at most so many seconds."""
        ...


class Cohorts:
    """Those of one run.

    Args:
        plan: the run's.
        name: of a node, by its id.
        central: draws cohorts in secret under `unit: client`; else None.
    """

    def __init__(self, plan: Plan, name: Callable[[int], str], central: CentralDP | None) -> None:
        self._plan, self._name, self._central = plan, name, central
        self._failed: dict[int, int | None] = {}
        """By node whose last training failed, or whose preparation has since, how many new rows it told then."""

    def choose(self, round: int, grid: Grid, state: ServerState, among: frozenset[str] | None = None) -> list[int]:
        """A seeded draw of `cohort.asked` of the connected nodes, waiting for `cohort.size`; a secret one by `CentralDP`.

        Drawn from them in the order of their names, where the grid knows them: ids are random, and other in a simulation. Nodes that
        have said that their privacy budget is spent are not drawn, nor those without rows of the task, as long as enough others are there.

        Raises:
            LichenError: COHORT_TOO_SMALL, if fewer than `cohort.minimum` may be drawn; never under `unit: client`.
        """
        nodes = self.wait_for_nodes(round, grid, among)
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
        # all again, where too few are left: rows may have come
        able = [node for node in nodes if self._name(node) not in state.rowless]
        return draw_cohort(self._plan, able if len(able) >= self._plan.cohort.minimum else nodes, round)

    def wait_for_data(
        self, round: int, grid: Grid, state: ServerState, meet: Callable[[list[int]], list[str]], least: int = 0
    ) -> tuple[list[int], int]:
        """The cohort of a batch's first round: a draw as `choose` makes it among those that have enough new data, once they are enough.

        Where the grid's nodes can't tell, in a simulation, all have. One that has failed is left out until it tells something else: what
        it did not train on is still new, and would begin one batch after another, at the cost of the other nodes' data.

        Args:
            round: that one.
            grid: the way to the nodes.
            state: before the round.
            meet: asks nodes to look, before they are first counted; returns the messages' ids.
            least: rows that they are to have together.

        Returns:
            The nodes, and how many new rows those have together that have enough; 0 where they can't tell.

        Raises:
            LichenError: as `choose`; what the grid's `interrupt` was given.
        """
        news = grid if isinstance(grid, TellsNews) else None
        if news is None:
            return self.choose(round, grid, state), 0
        online, met, asked, told = self._plan.continual.online, set[int](), set[str](), -1
        while True:
            here = list(grid.get_node_ids())
            if strangers := [node for node in here if node not in met]:
                asked.update(meet(strangers))
                met.update(strangers)
            for reply in grid.pull_messages(sorted(asked)):
                asked.discard(reply.metadata.reply_to_message_id)
                self.answered(reply, grid)
                if reply.has_error():
                    name, code = self._name(reply.metadata.src_node_id), reply.error.code
                    log.warning("%s can't look for new data: error %d (%s)", name, code, name_of(code))
            rows = news.new_rows()
            self._failed = {node: then for node, then in self._failed.items() if rows.get(node) == then}
            able = [node for node in here if rows.get(node, 0) >= online.rows and node not in self._failed]
            ready = self.with_budget(records.TRAIN, able, state)
            together = sum(rows[node] for node in ready)
            if len(ready) >= online.clients and together >= least:
                return draw_cohort(self._plan, sorted(ready, key=self._name), round), together
            if len(ready) != told:
                told = len(ready)
                left_out = f"; not asked since they failed: {', '.join(sorted(map(self._name, self._failed)))}" if self._failed else ""
                log.info("round %d waits: %d of %d clients have %d new rows%s", round, told, online.clients, online.rows, left_out)
            news.wait_for_news(NEWS_S)

    def answered(self, reply: Message, grid: Grid) -> None:
        """Note whether a node could train, or prepare for it; see `wait_for_data`."""
        node, kind = reply.metadata.src_node_id, reply.metadata.message_type
        if kind == records.EVALUATE or not isinstance(grid, TellsNews):
            return
        if reply.has_error():
            self._failed[node] = grid.new_rows().get(node)
        elif kind == records.TRAIN:
            self._failed.pop(node, None)

    def wait_for_nodes(self, round: int, grid: Grid, among: frozenset[str] | None = None) -> list[int]:
        """The connected nodes, by name, once they are `cohort.size`, or those that are there when the deadline has passed."""
        size = self._plan.cohort.size if among is None else min(self._plan.cohort.size, len(among))
        until = time.monotonic() + self._plan.cohort.deadline_s

        def here() -> list[int]:
            return sorted((node for node in grid.get_node_ids() if among is None or self._name(node) in among), key=self._name)

        if len(nodes := here()) < size:
            log.info("round %d waits: %d nodes are connected, %d are wanted", round, len(nodes), size)
        while len(nodes) < size and time.monotonic() < until:
            time.sleep(POLL_S)
            nodes = here()
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

    def has_no_rows(self, client: str, state: ServerState) -> None:
        """Rather ask others for the rest of a stream's task: a client has answered, without privacy, that it has no rows of it."""
        if self._plan.continual.stream and not self._plan.private and client not in state.rowless:
            state.rowless.append(client)


def draw_cohort(plan: Plan, nodes: Sequence[int], round: int) -> list[int]:
    """A round's cohort: `cohort.asked` of the nodes, or all if they are fewer; ascending. It follows from the plan's seed."""
    generator = random.Random(f"{plan.seed}|cohort|{round}")  # noqa: S311 - who is asked is no secret here
    return sorted(generator.sample(nodes, min(plan.cohort.asked, len(nodes))))


def note_on_draws(plan: Plan, clients: int) -> str | None:
    """What to tell whoever starts a stream of which a round may ask only clients without rows of its task; None for other plans."""
    if not plan.continual.stream or plan.private or plan.cohort.size >= clients:
        return None
    return (
        f"cohort.size is {plan.cohort.size}, of {clients} clients: a round passes without an update where none it asks has rows of its task"
    )
