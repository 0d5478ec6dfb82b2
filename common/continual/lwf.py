"""`lwf`, learning without forgetting: on a new task's rows the model keeps to what the one before said of them (Li and Hoiem 2016).

The model before is kept in the state, and goes to all clients. It is public to them, and what it says of a row depends on that row
alone, so the loss of a row does too: under differential privacy it is clipped and noised like any other.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lichen.common.aggregation import KEPT
from lichen.common.continual.method import Learned, Method, Refuse, check_one_model, check_stream
from lichen.common.continual.stream import Stage, labels_until

if TYPE_CHECKING:
    import torch

    from lichen.common.batches import Collate
    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Encoded, Task

_BEFORE = f"{KEPT}.before."
_AT_ONCE = 64
_KNOWN = 64
"""Sets of rows whose answers are kept: a simulated client's are wanted again in the next round."""


class LwF(Method):
    """Keeps the last task's model, as all clients' teacher."""

    alone = True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        # of what rows, as long as these are kept themselves, and those with the answers
        self._taught: OrderedDict[str, tuple[weakref.ref[Encoded], Encoded]] = OrderedDict()

    def check(self, refuse: Refuse) -> None:
        """It needs tasks, and one model."""
        check_stream(self.plan, refuse)
        check_one_model(self.plan, refuse)

    def moved_labels(self, number: int) -> tuple[str, ...]:
        """The teacher's too."""
        return labels_until(self.plan, number)

    def kept_like(self, trained: Mapping[str, torch.Tensor]) -> State:
        """Room for the model before."""
        import torch

        return {_BEFORE + name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in trained.items()}

    def examples(
        self, task: Task[Any], model: TunedModel, data: Encoded, stage: Stage, collates: Callable[[], AbstractContextManager[Collate]]
    ) -> Encoded:
        """With what the model before says of them; until a task has taught anything there is none."""
        before = {name.removeprefix(_BEFORE): tensor for name, tensor in model.kept.items()}
        if not stage.number or not len(data) or not any(tensor.any() for tensor in before.values()):
            return data
        digest = hashlib.sha256(f"{stage.number} {data.digest}".encode())
        for tensor in before.values():
            digest.update(tensor.numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._taught or self._taught[key][0]() is not data:  # the same texts may have other labels
            state = model.state()
            model.load(state | before)
            task.choose_among(labels_until(self.plan, stage.number - 1))
            with collates() as collate:
                taught = task.taught(model.network, data, _AT_ONCE, collate)
            model.load(state)
            self._taught = OrderedDict((old, own) for old, own in self._taught.items() if own[0]() is not None)
            self._taught[key] = weakref.ref(data), taught
        self._taught.move_to_end(key)
        if len(self._taught) > _KNOWN:
            self._taught.popitem(last=False)
        return self._taught[key][1]

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """The model as it is becomes the one before."""
        kept = {name: tensor for name, tensor in model.items() if name.startswith(_BEFORE)}
        return Learned({name: model[name.removeprefix(_BEFORE)] - tensor for name, tensor in kept.items()}, memory)
