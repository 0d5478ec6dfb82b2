"""`replay`: with a task's rows a client trains on some of those that it had in earlier tasks (Chaudhry et al. 2019).

Nothing is stored: which rows of its own data these are, a client finds again by a hash of what they say. Under differential privacy each
row is in by its own coin alone, since a choice of so many would depend on what other rows there are; a row that is replayed is read in more
rounds, and the ledger charges it for them, apart from the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lichen.common.continual.method import Method, Refuse, check_stream
from lichen.common.continual.stream import Stage, rows_of, stages

if TYPE_CHECKING:
    from lichen.common.plan import Plan

_WHOLE = 1 << 64


class Replay(Method):
    """Adds rows of earlier tasks."""

    def check(self, refuse: Refuse) -> None:
        """It needs tasks, and under privacy a coin for each row."""
        check_stream(self.plan, refuse)
        if self.plan.private and not self.plan.central and self.plan.continual.replay.rows is not None:
            refuse(
                "continual.replay.rows under differential privacy: one row more would put another out, so which are kept tells of others",
                "Leave it out, and set continual.replay.share.",
            )

        if self.plan.private and not self.plan.central and self.plan.privacy.sample_rate is None:
            refuse(
                "continual.method: replay under differential privacy needs privacy.sample_rate: by the batch, each task would have another",
                "Set privacy.sample_rate.",
            )

    def rows(self, stage: Stage, columns: Mapping[str, Sequence[object]]) -> list[int]:
        """The task's, and of each earlier one those that are kept."""
        found = set(super().rows(stage, columns))
        for before in stages(self.plan)[: stage.number]:
            if before.task is not None:
                found |= self._kept(rows_of(self.plan, before.task, columns), columns)
        return sorted(found)

    def added_share(self, stage: Stage) -> float:
        """Of each earlier task's rows those that are kept; where so many of each label are, nobody asks."""
        tasks = self.plan.continual.stream
        return self.plan.continual.replay.share * sum(task.share or 1 / len(tasks) for task in tasks[: stage.number])

    def _kept(self, rows: list[int], columns: Mapping[str, Sequence[object]]) -> set[int]:
        settings = self.plan.continual.replay
        says = [values for field, values in columns.items() if field != self.plan.task.label_field]
        drawn = {row: _number(self.plan, [str(values[row]) for values in says]) for row in rows}
        if settings.rows is None:
            return {row for row, number in drawn.items() if number < settings.share * _WHOLE}
        label, by_label = columns[self.plan.task.label_field], dict[str, list[int]]()
        for row in sorted(rows, key=drawn.__getitem__):
            by_label.setdefault(str(label[row]), []).append(row)
        return {row for own in by_label.values() for row in own[: settings.rows]}


def _number(plan: Plan, says: Sequence[str]) -> int:
    """What a row draws, below 2⁶⁴: the same in every run of the plan, whatever the other rows are."""
    digest = hashlib.sha256(str(plan.seed).encode())
    for value in says:
        digest.update(hashlib.sha256(value.encode()).digest())
    return int.from_bytes(digest.digest()[:8], "big")
