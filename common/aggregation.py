"""What each aggregation rule needs, and what follows from it at both ends: the tensors that a client trains in a round, and sends.

ΔW = s B A (Hu et al. 2021), with A (r, k) and B (d, r). A state holds both factors of each adapted layer, the head and, where a rule
changes the base, what was merged into it so far. A client of a smaller rank trains A's first rows and B's first columns, and either has no
others or holds them as they are; α / r is the plan's whatever the rank, so that s is one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lichen.common.continual import make_method
from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan

A, B, MERGED, HELD_A, HELD_B = "lora_A", "lora_B", "merged", "held_A", "held_B"
"""The parts of a tensor's name that tell which it is. What is held are the rows and columns of A and B that a client does not train."""
KEPT, MEMORY, SUMS = "kept", "memory", "sums"
"""Beginnings of names: what a continual method keeps and its clients need, which travels with the model; what it keeps at the coordinator
alone; and what a round gathers that trains nothing."""
_PARTS = {A, B, MERGED, HELD_A, HELD_B}
_BEGINNINGS = {KEPT, MEMORY, SUMS}


@dataclass(frozen=True)
class Properties:
    """What a rule asks of a plan."""

    phases: tuple[frozenset[str], ...] = (frozenset({A, B}),)
    """LoRA's factors that are trained in a round, and travel up; round after round the next, then from the start."""
    lora: bool = True
    """Whether it is for LoRA alone."""
    single_updates: bool = False
    """Whether the coordinator must see each update; else their sum by rank is enough, as secure aggregation gives it."""
    mixed_ranks: bool = False
    """Whether clients may have different ranks."""
    holds_rest: bool = False
    """Whether a client of a smaller rank computes with the columns that it does not train: else its model is another than the others'."""
    changes_base: bool = False
    """Whether it adds to the frozen weights: the state then holds what was added, and travels with it."""


_ONE_FACTOR = (frozenset({B}), frozenset({A}))  # B first: it starts at zero, where A has no gradient

RULES: Mapping[str, Properties] = {
    "fedavg": Properties(lora=False),
    "ffa": Properties(phases=(frozenset({B}),)),
    "rolora": Properties(phases=_ONE_FACTOR),
    "nested": Properties(phases=_ONE_FACTOR, mixed_ranks=True, holds_rest=True),
    "flora": Properties(single_updates=True, mixed_ranks=True, holds_rest=True, changes_base=True),
    "fedex": Properties(single_updates=True, changes_base=True),
    "zero-padding": Properties(mixed_ranks=True),
}
"""By the names that plans give them."""


def properties(plan: Plan) -> Properties:
    """Of the plan's rule."""
    return RULES[plan.aggregation.rule]


def is_trained(name: str, phase: frozenset[str]) -> bool:
    """Whether a tensor of the state is trained in such a phase: factors of the phase, and all that has no such part."""
    part = part_of(name)
    return part is None or part in phase


def part_of(name: str) -> str | None:
    """How a name begins, or the first such part of it; None for a tensor of the head, or of a model without LoRA."""
    words = name.split(".")
    return words[0] if words[0] in _BEGINNINGS else next((part for part in words if part in _PARTS), None)


def beside(name: str, part: str) -> str:
    """The name of another part of the same layer."""
    return ".".join(part if word in _PARTS else word for word in name.split("."))


def phase_of(plan: Plan, round: int) -> frozenset[str]:
    """LoRA's factors that are trained in a round (from 1). Each task of a stream begins anew, since its adapter may begin at zero."""
    phases = properties(plan).phases
    if len(phases) == 1:
        return phases[0]
    method = make_method(plan)
    before = sum(not method.gathers(earlier) for earlier in range(stage_of(plan, round).first, round))
    return phases[before % len(phases)]


def rank_of(plan: Plan, client: str, *, simulated: bool) -> int:
    """The rank that a client trains: the plan's, or in a simulation the one that `simulation.ranks` has for its number."""
    ranks = plan.simulation.ranks
    number = client.rpartition("-")[2]
    return ranks[int(number) % len(ranks)] if simulated and ranks and number.isdecimal() else plan.model.adapter.rank


def cut(state: Mapping[str, torch.Tensor], rank: int, *, hold: bool = False) -> State:
    """A state as a client of such a rank has it: the first rows of each A, the first columns of each B (views).

    Args:
        state: of a larger rank, or the same.
        rank: r.
        hold: keep the other rows and columns, if there are any, as what is held.

    Raises:
        LichenError: STATE_MISMATCH, if a factor has fewer.
    """
    found = dict(state)
    for name, tensor in state.items():
        if (part := part_of(name)) not in {A, B}:
            continue
        if tensor.dim() != 2 or tensor.shape[0 if part == A else 1] < rank:
            raise LichenError(Code.STATE_MISMATCH, f"{name!r} is {tuple(tensor.shape)}, too small for rank {rank}")
        found[name] = tensor[:rank] if part == A else tensor[:, :rank]
        if hold and tensor.shape[0 if part == A else 1] > rank:
            found[beside(name, HELD_A if part == A else HELD_B)] = tensor[rank:] if part == A else tensor[:, rank:]
    return found


def update_like(plan: Plan, round: int, rank: int, state: Mapping[str, torch.Tensor]) -> State:
    """Tensors of the names, shapes and types that a client's update has in a round (from 1), for a codec's layout and for checks."""
    if (method := make_method(plan)).gathers(round):
        return method.gathered_like(stage_of(plan, round), state)
    phase = phase_of(plan, round)
    trained = {name: tensor for name, tensor in state.items() if is_trained(name, phase)}
    return cut(trained, rank)  # without LoRA there is nothing to cut
