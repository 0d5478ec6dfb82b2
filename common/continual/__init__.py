"""Continual learning: what both ends must agree on; methods are one file each, and one line in this registry."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lichen.common.continual.method import Method
    from lichen.common.continual.stream import Stage
    from lichen.common.plan import Plan


def training_rounds(plan: Plan, stage: Stage) -> list[int]:
    """The rounds of a stage in which a model is trained; all, where none is."""
    method, every = make_method(plan), list(range(stage.first, stage.last + 1))
    return [round for round in every if not method.gathers(round)] or every


@lru_cache(maxsize=64)
def make_method(plan: Plan) -> Method:
    """The plan's continual method; what it computes is imported when it is used, so that an idle agent does not load torch."""
    from lichen.common.continual.adapters import Adapters
    from lichen.common.continual.analytic import Analytic
    from lichen.common.continual.ewc import EWC
    from lichen.common.continual.lwf import LwF
    from lichen.common.continual.method import Method
    from lichen.common.continual.olora import OLoRA
    from lichen.common.continual.replay import Replay

    methods = {"sequential": Method, "analytic": Analytic, "lwf": LwF, "adapters": Adapters, "ewc": EWC}
    methods |= {"olora": OLoRA, "replay": Replay}
    return methods[plan.continual.method](plan)
