"""Cohort batching: several clients' steps in passes of all their rows, each client with trained weights of its own.

A small model's step is mostly the calling of its layers; so it is called once for many clients. Sums, noise and steps are those of one
client after another, but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lichen.common.batching import passes
from lichen.common.device import sent
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.randomness import Noise as SumNoise
from lichen.common.privacy.randomness import RandomSource, add_noises
from lichen.common.tasks.task import CHECKED_ROWS

if TYPE_CHECKING:
    from lichen.client.gate import Gate
    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.single_backward.grouped import GroupWeights
    from lichen.common.tasks.task import Batch, Encoded, Task


@dataclass(frozen=True)
class Noise:
    """What makes a client's steps private: see `Trainer.train_private`."""

    segment: Segment
    declared_size: int
    gate: Gate
    source: RandomSource


@dataclass
class Member:
    """One client, and where its training is."""

    data: Encoded
    steps: int
    draws: Iterator[list[int]]
    """The rows of each step."""
    noise: Noise | None = None
    seen: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of each pass, summed; read at the end, since a GPU's numbers must be waited for."""

    @property
    def loss_sum(self) -> float:
        """Summed over the rows seen."""
        return sum(map(float, self.losses), 0.0)


class Together:
    """Trains copies of a model's trained weights.

    Args:
        groups: of the model.
        model: whose frozen weights serve all.
        task: collates, and gives the losses.
        most: rows of a pass.
        pass_cost: see `common/batching.py`.
        clip: of a row's gradient; None without privacy.
    """

    def __init__(self, groups: GroupWeights, model: TunedModel, task: Task[Any], most: int, pass_cost: float, clip: float | None) -> None:
        self._groups, self._model, self._task, self._most, self._pass_cost, self._clip = groups, model, task, most, pass_cost, clip
        self._device = model.device

    def train(
        self, start: State, members: Sequence[Member], optimizer_of: Callable[[Mapping[str, torch.Tensor]], torch.optim.Optimizer]
    ) -> list[State]:
        """Train each member from the same start.

        Args:
            start: the tensors that the model has now.
            members: each with rows.
            optimizer_of: makes the optimizer of the given tensors, by name; its step is one for each number alone.

        Returns:
            Each member's trained tensors.

        Raises:
            LichenError: PRIVACY_BUDGET, from a gate.
        """
        order = sorted(range(len(members)), key=lambda number: -members[number].steps)
        active = [members[number] for number in order]
        data, first = self._joined(active)
        # in the model's order, which the noise is drawn in: that of tensors that came from a file is any
        shapes = {name: (len(active), *start[name].shape) for name in self._model.active}
        stack = {name: sent(start[name], self._device).expand(shape).clone().requires_grad_() for name, shape in shapes.items()}
        optimizer = optimizer_of(stack)
        found: list[State] = [{} for _ in members]
        for step in range(active[0].steps if active else 0):
            self._step(stack, optimizer, active, data, first)
            left = sum(member.steps > step + 1 for member in active)
            if left < len(active):
                done = {name: tensor.detach()[left:].to("cpu", copy=True) for name, tensor in stack.items()}
                for place in range(left, len(active)):
                    found[order[place]] = {name: tensor[place - left].clone() for name, tensor in done.items()}
                del active[left:]
                _keep(optimizer, left)
        return found

    def _joined(self, members: Sequence[Member]) -> tuple[Encoded, list[int]]:
        """All members' rows as one data set, and where each member's begin."""
        first = [0]
        for member in members:
            first.append(first[-1] + len(member.data))
        return functools.reduce(self._task.join, (member.data for member in members)), first[:-1]

    def _step(
        self, stack: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, active: Sequence[Member], data: Encoded, first: list[int]
    ) -> None:
        for member in active:
            if member.noise:
                member.noise.gate.step(member.noise.segment._replace(steps=1))
        drawn = [[start + row for row in next(member.draws)] for member, start in zip(active, first, strict=False)]
        optimizer.zero_grad(set_to_none=True)
        if self._clip is not None:
            sums = self._clipped_sums(stack, data, drawn, self._clip)
            _add_noise(sums, self._clip, active, optimizer, stack)
        else:
            for batch, numbers, real in self._passes(data, drawn):
                among = self._among(numbers, drawn)
                with self._groups.use({name: _of(tensor, among) for name, tensor in stack.items()}, real.numel()):
                    losses = self._task.losses(self._model.network, batch).view_as(real) * real
                counts = sent(torch.tensor([len(drawn[number]) for number in numbers]), self._device)
                torch.autograd.backward((losses / counts.unsqueeze(1)).sum())
                for number, loss in zip(numbers, losses.detach().sum(1), strict=True):
                    active[number].losses.append(loss)
            for member, own in zip(active, drawn, strict=True):
                member.seen += len(own)
        optimizer.step()

    def _passes(self, data: Encoded, drawn: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, list[int], torch.Tensor]]:
        """Every row in one of the passes: of each client that has rows left equally many, made up by its first one where they end.

        Yields:
            The batch, client by client; which clients are in it, (G,); and which of their rows count, (G, W) of 1 and 0.
        """
        drawn = [sorted(rows, key=lambda row: -int(data.lengths[row])) for rows in drawn]
        columns = [[rows[place] for rows in drawn if len(rows) > place] for place in range(max(map(len, drawn)))]
        longest = [max(int(data.lengths[row]) for row in column) for column in columns]
        for part in passes([len(column) for column in columns], longest, self._most, self._pass_cost):
            among = [number for number, rows in enumerate(drawn) if len(rows) > part[0]]
            rows = [drawn[number][place] if place < len(drawn[number]) else drawn[number][0] for number in among for place in part]
            real = torch.tensor([[float(place < len(drawn[number])) for place in part] for number in among])
            yield self._task.collate(data, rows), among, sent(real, self._device)

    def _among(self, numbers: Sequence[int], drawn: Sequence[object]) -> torch.Tensor | None:
        """Which clients are in a pass, as an index; None: all."""
        return None if len(numbers) == len(drawn) else sent(torch.tensor(numbers), self._device)

    def _clipped_sums(
        self, stack: Mapping[str, torch.Tensor], data: Encoded, drawn: Sequence[Sequence[int]], clip: float
    ) -> dict[str, torch.Tensor]:
        """Of each client the sum of its rows' gradients, each clipped: every row is a group, so that autograd gives each row's own."""
        sums = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in stack.items()}
        for batch, numbers, real in self._passes(data, drawn):
            width, among = real.shape[1], self._among(numbers, drawn)
            weights = {name: _of(tensor.detach(), among).repeat_interleave(width, 0).requires_grad_() for name, tensor in stack.items()}
            with self._groups.use(weights, real.numel()):
                loss = (self._task.losses(self._model.network, batch).view_as(real) * real).sum()
            gradients = [gradient.reshape(*real.shape, -1) for gradient in torch.autograd.grad(loss, list(weights.values()))]
            squares = torch.stack([gradient.square().sum(2) for gradient in gradients]).sum(0)
            bad = ~torch.isfinite(squares)
            factors = (clip / squares.sqrt()).clamp(max=1.0)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                found = torch.einsum("gw,gwn->gn", factors.masked_fill(bad, 0), gradient.masked_fill(bad.unsqueeze(2), 0))
                found = found.view(len(numbers), *total.shape[1:])
                total.add_(found) if among is None else total.index_add_(0, among, found)
        return sums

    def check(self, expected: Callable[[Sequence[int], Encoded, float], Mapping[str, torch.Tensor]]) -> None:
        """Compare with the clipped sums of one client after another, on made-up rows and weights off their start.

        Args:
            expected: the clipped sum of some rows of a data set, for the model's weights as they are.

        Raises:
            LichenError: PRIVACY_SELF_CHECK.
        """
        from lichen.common.privacy.self_check import TOLERANCE

        data, drawn, clip = self._task.made_up(CHECKED_ROWS), [[0], list(range(1, CHECKED_ROWS))], 1e-2
        start = self._model.state()
        generator = torch.Generator().manual_seed(0)
        try:
            self._model.load({name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()})
            stack = {name: tensor.detach().expand(len(drawn), *tensor.shape) for name, tensor in self._model.active.items()}
            found = self._clipped_sums(stack, data, drawn, clip)
            for place, rows in enumerate(drawn):
                for name, tensor in expected(rows, data, clip).items():
                    if not torch.allclose(found[name][place], tensor, rtol=TOLERANCE, atol=TOLERANCE * clip):
                        raise LichenError(
                            Code.PRIVACY_SELF_CHECK, f"clients trained together get another clipped sum of {name}", where="model.base"
                        )
        finally:
            self._model.load(start)


def _of(tensor: torch.Tensor, among: torch.Tensor | None) -> torch.Tensor:
    return tensor if among is None else tensor.index_select(0, among)


def _add_noise(
    sums: Mapping[str, torch.Tensor],
    clip: float,
    active: Sequence[Member],
    optimizer: torch.optim.Optimizer,
    stack: Mapping[str, torch.Tensor],
) -> None:
    """Each member's noise from its own source, tensor by tensor in the optimizer's order, as in its steps alone."""
    name_of = {id(tensor): name for name, tensor in stack.items()}
    ordered = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    noises = [
        SumNoise(noise.segment.noise_multiplier * clip, noise.source, noise.segment.sample_rate * noise.declared_size)
        for noise in (member.noise for member in active)
        if noise is not None
    ]
    add_noises([sums[name_of[id(tensor)]] for tensor in ordered], noises)
    for tensor in ordered:
        tensor.grad = sums[name_of[id(tensor)]]


def _keep(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Go on with the first ``count`` members' tensors, and what the optimizer keeps of them."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = None
            tensor.data = tensor.data[:count]
            kept = optimizer.state[tensor]
            for key, value in kept.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    kept[key] = value[:count]
