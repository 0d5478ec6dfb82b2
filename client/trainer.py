"""Local fine-tuning of one plan's model, with and without differential privacy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lichen.client.jobs import Job, Private
from lichen.client.together import Member, Noise, Together
from lichen.common.aggregation import phase_of, properties
from lichen.common.batches import ready
from lichen.common.batching import clients_at_once, most_at_once, pass_cost
from lichen.common.continual import make_method
from lichen.common.continual.adapters import without_adapter
from lichen.common.continual.method import Pull, Squares
from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import RandomSource, add_noise, poisson_sample
from lichen.common.privacy.single_backward.fused import fuse_lora
from lichen.common.privacy.single_backward.grouped import group_weights
from lichen.common.tasks import workbench

if TYPE_CHECKING:
    from pathlib import Path

    from lichen.client.gate import Gate
    from lichen.client.pace import Stop
    from lichen.client.private_step import PrivateStep
    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Local, Plan
    from lichen.common.privacy.per_unit import Unit
    from lichen.common.tasks.task import Encoded


FUSED_ON = ("cpu",)
"""Devices where LoRA is fused without privacy: on a GPU its nodes, which are Python's, take longer than what they spare."""


@dataclass(frozen=True)
class Trained:
    """The result of a round's local training."""

    delta: State
    """Trained minus received tensors."""
    steps: int
    loss: float | None
    """Mean loss of the examples seen; None under differential privacy, where it may not be known."""


class Trainer:
    """Holds a plan's model ready; each call loads a round's tensors into it.

    Raises:
        LichenError: MODEL_…, or PRIVACY_SELF_CHECK where the private step is not what it should be.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.task, self.model, _ = workbench(plan)
        self._method = make_method(plan)
        self.model.train_only()
        self._private: PrivateStep | None = None
        self._fused: Callable[[], AbstractContextManager[None]] = nullcontext
        self._lean = plan.local.compute == "lean"
        packing, self._batches = ready(plan, self.task, self.model)
        # what full tuning books of a pass is padded, packed or not
        self._by_length = self._lean and (not packing.on or plan.model.adapter.kind == "full")
        if not plan.private or plan.central:
            if self._lean and plan.model.adapter.kind == "lora" and self.model.device.type in FUSED_ON:
                self._fused = _fused(self.model)
        else:
            from lichen.client.private_step import PrivateStep

            self._private = PrivateStep(plan, self.task, self.model, packing)
        self._packing = packing

    @property
    def at_once(self) -> int:
        """How many clients `run_together` should get. Raises PRIVACY_SELF_CHECK, if together they would get other clipped sums."""
        return self._together[1] if self._together else 1

    @functools.cached_property
    def _together(self) -> tuple[Together, int] | None:
        """What trains several clients at once, and how many, where that is worth it; a node, which is one, never asks."""
        local, cost, length = self.plan.local, pass_cost(self.model), self.plan.task.max_length
        rows = min(local.batch_size, local.max_physical_batch_size)
        most = most_at_once(self.model, rows, length, private=self._private is not None)
        count = clients_at_once(cost, local.batch_size * length, most)
        # on a GPU it saves more than what is known of the frozen layers
        known = self._batches.prefix is not None and self.model.device.type == "cpu"
        alone = local.checkpointing or local.precision == "bfloat16" or known or count == 1
        if not self._lean or alone or (groups := group_weights(self.model, self._packing)) is None:
            return None
        clip = self.plan.privacy.clip if self._private else None
        together = Together(groups, self.model, self.task, local.max_physical_batch_size * count, cost, clip)
        if self._private:
            for phase in properties(self.plan).phases:
                self.model.train_only(phase)
                together.check(self._private.clipped_sum)
        return together, count

    def run(self, job: Job) -> Trained:
        """Train one client, or gather its sums. Raises as `train`, `train_private` and `gather`."""
        if what := self._method.gathers(job.round):
            return self.gather(job) if what == "features" else self.measure(job)
        if (private := job.private) is None:
            return self.train(job.start, job.data, job.round, job.source, job.cache, job.most_steps, job.stop)
        return self.train_private(
            job.start, job.data, private.units, private.segment, private.declared_size, job.round, job.source, private.gate, job.cache
        )

    def run_together(self, jobs: Sequence[Job]) -> list[Trained | Exception]:
        """Train several clients of one round, each from its part of one model; where they can't pass together, one after another.

        Each fails alone, but for what goes wrong in a pass of several.
        """
        able = [number for number, job in enumerate(jobs) if self._passes_by_row(job)] if len(jobs) > 1 and self.at_once > 1 else []
        by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
        for number in able:  # those of one rank
            by_shape.setdefault(tuple(tensor.shape for tensor in jobs[number].start.values()), []).append(number)
        found: dict[int, Trained | Exception] = {}
        for alike in by_shape.values():
            if self._together and len(alike) > 1:
                try:
                    found |= zip(alike, self._train_together([jobs[number] for number in alike], self._together[0]), strict=True)
                except Exception as error:  # nothing of any of them has left
                    found |= dict.fromkeys(alike, error)
        for number, job in enumerate(jobs):
            if number not in found:
                try:
                    found[number] = self.run(job)
                except Exception as error:  # its own client tells of it
                    found[number] = error
        return [found[number] for number in range(len(jobs))]

    def _passes_by_row(self, job: Job) -> bool:
        """Whether it trains to its end, on rows each of which is a unit of its own."""
        return (
            not self._method.gathers(job.round)
            and job.stop is None
            and len(job.data) > 0
            and (job.private is None or (len(job.private.units) > 0 and all(len(unit) == 1 for unit in job.private.units)))
        )

    def _train_together(self, jobs: Sequence[Job], together: Together) -> Iterator[Trained | Exception]:
        start, round = jobs[0].start, jobs[0].round
        rows = self._begin(start, round, *((job.data, job.cache) for job in jobs))
        members = [self._member(replace(job, data=own)) for job, own in zip(jobs, rows, strict=True)]
        for member, state in zip(members, together.train(start, members, functools.partial(self._optimizer, round)), strict=True):
            try:
                loss = None if member.noise else member.loss_sum / max(member.seen, 1)
                yield Trained(self._delta(start, state, member.steps), member.steps, loss)
            except LichenError as error:
                yield error

    def _member(self, job: Job) -> Member:
        if (private := job.private) is None:
            drawn = list(batches(self.plan.local, len(job.data), job.source, job.most_steps))
            return Member(job.data, len(drawn), iter(drawn))
        rows, segment = [row for (row,) in private.units], private.segment
        draws = ([rows[index] for index in poisson_sample(len(rows), segment.sample_rate, job.source)] for _ in range(segment.steps))
        return Member(job.data, segment.steps, draws, Noise(segment, private.declared_size, private.gate, job.source))

    def train(
        self,
        start: State,
        data: Encoded,
        round: int,
        source: RandomSource,
        cache: Path | None = None,
        most_steps: int | None = None,
        stop: Stop | None = None,
    ) -> Trained:
        """Train without differential privacy.

        Args:
            start: the tensors to start from.
            data: the local examples.
            round: from 1; the learning rate's decay follows it.
            source: of the examples' order.
            cache: a folder of the node, where what frozen layers give may be kept; None: nothing is kept.
            most_steps: fewer than the plan's; None: the plan's.
            stop: asked before each step whether it is the last that there was time for.

        Raises:
            LichenError: STATE_MISMATCH, MODEL_NOT_TRAINED; WORKER_DEADLINE from ``stop``.
        """
        (data,) = self._begin(start, round, (data, cache))
        steps, loss = self._steps(self._optimizer(round, self.model.active), data, source, cache, most_steps, stop)
        return Trained(self._delta(start, self.model.active, steps), steps, loss)

    def _steps(
        self,
        optimizer: torch.optim.Optimizer,
        data: Encoded,
        source: RandomSource,
        cache: Path | None,
        most_steps: int | None,
        stop: Stop | None,
        told: Callable[[int], None] = lambda rows: None,
    ) -> tuple[int, float]:
        """Steps without privacy, as in `train`: how many, and the mean loss of examples seen. A batch's rows are told before its step."""
        self._seed_dropout(source)
        losses_of: list[torch.Tensor] = []
        seen, steps = 0, 0
        with self._batches.of(data, cache) as collate:
            for batch in batches(self.plan.local, len(data), source, most_steps):
                if stop is not None and stop(steps):
                    break
                collate.prepare(batch)
                optimizer.zero_grad(set_to_none=True)
                for part in self._batches.parts(batch, data):
                    with self._fused():
                        losses = self.task.losses(self.model.network, collate(part))
                        torch.autograd.backward(losses.sum() / len(batch))
                    losses_of.append(losses.detach().sum())  # read at the end: a GPU's numbers must be waited for
                told(len(batch))
                optimizer.step()
                seen += len(batch)
                steps += 1
        return steps, sum(map(float, losses_of)) / max(seen, 1)

    def train_private(
        self,
        start: State,
        data: Encoded,
        units: Sequence[Unit],
        segment: Segment,
        declared_size: int,
        round: int,
        source: RandomSource,
        gate: Gate,
        cache: Path | None = None,
    ) -> Trained:
        """Train with differential privacy: Poisson draws of units, clipped gradients, noise in each step.

        Args:
            start: the tensors to start from.
            data: the local examples.
            units: the rows of each unit.
            segment: noise, sample rate and steps, reserved already.
            declared_size: the denominator is ``sample_rate`` times this.
            round: from 1.
            source: of draws and noise.
            gate: asked before each step.
            cache: as in `train`.

        Raises:
            LichenError: STATE_MISMATCH, MODEL_NOT_TRAINED; PRIVACY_BUDGET from the gate.
        """
        (data,) = self._begin(start, round, (data, cache))
        private = Private(units, segment, declared_size, gate)
        self._private_steps(self._optimizer(round, self.model.active), data, private, source, cache)
        return Trained(self._delta(start, self.model.active, segment.steps), segment.steps, None)

    def _private_steps(
        self, plain: torch.optim.Optimizer, data: Encoded, private: Private, source: RandomSource, cache: Path | None
    ) -> None:
        """Steps with privacy, as in `train_private`."""
        if self._private is None:
            raise LichenError(Code.INTERNAL, "the trainer was made for a plan without differential privacy")
        self._seed_dropout(source)
        units, segment, gate = private.units, private.segment, private.gate
        optimizer = self._private.noisy(plain, segment, private.declared_size, source)
        with self._batches.of(data, cache) as collate:
            for _ in range(segment.steps):
                gate.step(Segment(optimizer.noise_multiplier, segment.sample_rate, 1))
                drawn = [units[index] for index in poisson_sample(len(units), segment.sample_rate, source)]
                collate.prepare([row for unit in drawn for row in unit])
                self._private.take(optimizer, drawn, collate, data.lengths if self._by_length else None)

    def gather(self, job: Job) -> Trained:
        """The sums over rows that the plan's continual method asks for in such a round, in place of an update.

        Under privacy a unit moves them by at most 1, in ℓ2 norm over all of them, and they are released as so many noised sums over
        Poisson draws as a round has steps; these are added and divided by the draws that a unit is expected to be in.

        Raises:
            LichenError: STATE_MISMATCH; PRIVACY_BUDGET from the gate; MODEL_UNSUPPORTED.
        """
        self.model.load(without_adapter(job.start))
        with self._batches.of(job.data, job.cache) as collate:
            features = self.task.features(self.model.network, job.data, self.plan.local.max_physical_batch_size, collate)
        features.nan_to_num_(0.0)  # of a row that the model can't take: one may not spoil the sum, nor tell by it
        weights, stage = torch.ones(len(job.data), dtype=torch.float64), stage_of(self.plan, job.round)
        if (private := job.private) is None:
            return Trained(_as_sent(self._method.gather(features, job.data, weights, stage)), 1, None)
        total: State = {}
        segment = private.segment
        for unit in private.units:
            weights[list(unit)] = 1 / len(unit)  # by the triangle inequality a unit's rows together move no more than one does
        for _ in range(segment.steps):
            private.gate.step(segment._replace(steps=1))
            drawn = [row for index in poisson_sample(len(private.units), segment.sample_rate, job.source) for row in private.units[index]]
            sums = self._method.gather(features[drawn], job.data.select(drawn), weights[drawn], stage)
            for name, tensor in sums.items():
                noised = add_noise(tensor.contiguous(), segment.noise_multiplier, job.source, over=segment.sample_rate * segment.steps)
                total[name] = total[name] + noised if name in total else noised
        return Trained(_as_sent(total), segment.steps, None)

    def measure(self, job: Job) -> Trained:
        """What a round's steps tell of gradients at the weights that it starts from, which stay as they are, in place of an update.

        Raises:
            LichenError: as `train` and `train_private`, but for MODEL_NOT_TRAINED.
        """
        (data,) = self._begin(job.start, job.round, (job.data, job.cache))
        active, private = self.model.active, job.private
        total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in active.items()}
        noise, size = 0.0, 0.0

        def add(*_: object) -> None:
            for name, tensor in active.items():
                if tensor.grad is not None:
                    total[name] += size * tensor.grad.detach().cpu().double().square()

        def of(rows: int) -> None:
            nonlocal size
            size = rows

        still = torch.optim.SGD(list(active.values()), lr=0.0)
        still.register_step_pre_hook(add)
        if private is None:
            rows = float(len(data))
            steps, loss = self._steps(still, data, job.source, job.cache, job.most_steps, job.stop, of)
        else:
            segment, rows = private.segment, float(private.declared_size)
            size = segment.sample_rate * rows
            noise = (segment.noise_multiplier * self.plan.privacy.clip) ** 2 / size
            self._private_steps(still, data, private, job.source, job.cache)
            steps, loss = segment.steps, None
        squares = Squares({name: tensor / max(steps, 1) for name, tensor in total.items()}, rows, noise)
        return Trained(_as_sent(self._method.fisher(squares)), steps, loss)

    def _begin(self, start: State, round: int, *data: tuple[Encoded, Path | None]) -> list[Encoded]:
        """Load what a round starts from, let the parameters be trained that it trains, and return data as the continual method has it."""
        stage = stage_of(self.plan, round)
        self.model.load(start)
        found = [
            self._method.examples(self.task, self.model, own, stage, functools.partial(self._batches.of, own, cache)) for own, cache in data
        ]
        self.model.train_only(phase_of(self.plan, round))
        self.task.choose_among(self._method.choices(stage.number))
        return found

    def _seed_dropout(self, source: RandomSource) -> None:
        """The adapter's dropout draws from torch's own generator: let it follow ``source``, so that what repeats does so whole."""
        if self.plan.model.adapter.dropout:
            torch.manual_seed(int(source.uniform(1)[0] * 2**53))

    def _optimizer(self, round: int, trained: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        """Of the given tensors, by name, as they are when a round begins."""
        local = self.plan.local
        stage = stage_of(self.plan, round)
        progress = (round - stage.first) / stage.rounds
        factor = {"none": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[local.learning_rate_decay]
        body = [tensor for name, tensor in trained.items() if name not in self.model.head]
        head = [tensor for name, tensor in trained.items() if name in self.model.head]
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate * factor}
            for parameters, rate in ((body, local.learning_rate), (head, local.head_learning_rate or local.learning_rate))
            if parameters
        ]
        optimizer: torch.optim.Optimizer
        if local.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=local.betas[0], weight_decay=local.weight_decay, fused=True)
        else:
            optimizer = torch.optim.AdamW(groups, betas=local.betas, weight_decay=local.weight_decay, fused=True)
        pulls = self._method.pulls(self.model.kept, trained)
        if local.proximal_mu:
            pulls += [Pull(name, _proximal(local.proximal_mu, tensor)) for name, tensor in trained.items()]
        if pulls:
            _add_pulls(optimizer, trained, pulls)
        return optimizer

    def _delta(self, start: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], steps: int) -> State:
        delta = {name: tensor.detach().cpu() - start[name] for name, tensor in trained.items()}
        moved = {name for name, tensor in delta.items() if bool(tensor.any())}
        body = delta.keys() - self.model.head
        wrong = ""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in delta.values()):
            wrong = "training gave values that are not finite"
        elif not moved:
            wrong = "training moved no weight"
        elif body and not moved & body and steps > 1:  # a head that starts at zero passes no gradient on in the first step
            wrong = "training moved the head alone"
        if wrong:
            raise LichenError(Code.MODEL_NOT_TRAINED, wrong, fix="Lower local.learning_rate, and check model.adapter.targets.")
        return delta


def _as_sent(sums: State) -> State:
    return {name: tensor.float() for name, tensor in sums.items()}


def batches(local: Local, count: int, source: RandomSource, most_steps: int | None = None) -> Iterator[list[int]]:
    """Batches of shuffled passes over ``count`` rows, without privacy."""
    steps = local.steps or max(1, math.ceil((local.epochs or 1) * count / local.batch_size))
    steps = steps if most_steps is None else min(steps, most_steps)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.argsort(source.uniform(count)).tolist()
        batch, order = order[: local.batch_size], order[local.batch_size :]
        yield batch


def _proximal(mu: float, tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """FedProx' μ (w − w_round)."""
    anchor = tensor.detach().clone()
    # of clients that are trained together the last may have ended
    return lambda now: mu * (now - anchor[: len(now)])


def _add_pulls(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor], pulls: Sequence[Pull]) -> None:
    """Add each pull's gradient just before a step: after clipping and noise, since it depends on no example."""

    @torch.no_grad()
    def add(*_: object) -> None:
        for name, gradient in pulls:
            if (tensor := trained[name]).grad is not None:
                tensor.grad.add_(gradient(tensor.detach()))

    optimizer.register_step_pre_hook(add)


def _fused(model: TunedModel) -> Callable[[], AbstractContextManager[None]]:
    """What runs LoRA's layers fused; nothing, where one of them has no such rule."""
    try:
        return fuse_lora(model.network).use
    except LichenError as error:
        if error.code is not Code.MODEL_DP_UNSUPPORTED:
            raise
        return nullcontext
