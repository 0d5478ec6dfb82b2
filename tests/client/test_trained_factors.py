"""What a client trains under each aggregation rule: the phase's factors at its rank, privately as well, and FedProx' pull."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.trainer import Trainer
from lichen.common import tasks
from lichen.common.aggregation import A, B, cut, part_of, phase_of, properties
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.hooks import expected_hooks
from lichen.common.privacy.randomness import SeededSource
from lichen.common.tasks import workbench

Make = Callable[..., Trainer]
Rows = Callable[..., list[dict[str, Any]]]
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.05}
SIZE = 24


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Make]:
    def trainer(rule: str, **changes: Any) -> Trainer:
        document = tiny_plan | {"aggregation": {"rule": rule}}
        document["model"] = document["model"] | {"adapter": {"kind": "lora", "rank": 4}}
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value}
        tasks.workbench.cache_clear()  # a trainer puts hooks on its model
        return Trainer(parse_plan(document))

    yield trainer
    tasks.workbench.cache_clear()


def off_start(trainer: Trainer, rank: int = 4) -> dict[str, torch.Tensor]:
    """A state in which no factor is zero."""
    generator = torch.Generator().manual_seed(3)
    start = workbench(trainer.plan).start
    whole = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    return cut(whole, rank, hold=properties(trainer.plan).holds_rest)


def encoded(trainer: Trainer, rows: list[dict[str, Any]]) -> Any:
    return trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})


def loop(trainer: Trainer, rows: Any, clip: float) -> dict[str, torch.Tensor]:
    """The clipped sum by one backward pass a row."""
    total = {name: torch.zeros_like(parameter) for name, parameter in trainer.model.active.items()}
    for row in range(len(rows)):
        loss = trainer.task.losses(trainer.model.network, trainer.task.collate(rows, [row])).sum()
        with expected_hooks():
            gradients = torch.autograd.grad(loss, list(trainer.model.active.values()))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))  # type: ignore[arg-type]
        for tensor, gradient in zip(total.values(), gradients, strict=True):
            tensor.add_(gradient * (clip / norm).clamp(max=1.0))
    return total


def private_job(trainer: Trainer, rows: Any, round: int, start: Any, *, rate: float = 0.5, key: object = 0) -> Job:
    segment = Segment(1.5, rate, 3)
    units = [[row] for row in range(len(rows))]
    return Job(start, rows, round, SeededSource("noise", key), None, Private(units, segment, SIZE, Gate(segment)))


@pytest.mark.parametrize("engine", ["single-backward", "hooks"])
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "nested", "flora", "fedex"])
def test_the_private_sum_of_each_phase_is_that_of_a_loop_over_rows(make: Make, tiny_rows: Rows, rule: str, engine: str) -> None:
    trainer = make(rule, privacy=PRIVATE | {"gradients": engine})
    rows = encoded(trainer, tiny_rows(7))
    rank = 2 if properties(trainer.plan).mixed_ranks else 4
    for round in (1, 2, 3):  # back to the first phase, too
        trainer._begin(off_start(trainer, rank), round)
        assert trainer._private
        clip = 0.5
        found = trainer._private.clipped_sum(range(len(rows)), rows, clip)
        expected = loop(trainer, rows, clip)
        assert {part_of(name) for name in found} - {None} == phase_of(trainer.plan, round)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.any()
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["single-backward", "hooks"])
def test_noise_goes_on_what_is_trained_and_nothing_else_moves(make: Make, tiny_rows: Rows, engine: str) -> None:
    trainer = make("rolora", privacy=PRIVATE | {"gradients": engine})
    rows, start = encoded(trainer, tiny_rows(SIZE)), off_start(trainer)
    for round, active in ((1, B), (2, A)):
        found = trainer.run(private_job(trainer, rows, round, start, rate=1e-9))  # nobody is drawn: noise alone
        assert {part_of(name) for name in found.delta} == {active, None}
        assert all((tensor != 0).float().mean() > 0.99 for tensor in found.delta.values())
        for name, parameter in trainer.model.trainable.items():
            assert torch.equal(parameter, start[name]) == (name not in found.delta)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE])
@pytest.mark.parametrize("compute", ["lean", "plain"])
def test_one_factor_moves_with_the_head_at_the_clients_rank(make: Make, tiny_rows: Rows, privacy: dict[str, Any], compute: str) -> None:
    trainer = make("nested", privacy=privacy, local={"steps": 4, "compute": compute})
    rows = encoded(trainer, tiny_rows(SIZE))
    for round, rank in ((1, 1), (2, 3), (3, 4)):
        start = off_start(trainer, rank)
        job = private_job(trainer, rows, round, start) if trainer.plan.private else Job(start, rows, round, SeededSource("order"))
        delta = trainer.run(job).delta
        for name, tensor in delta.items():
            assert tensor.shape == start[name].shape
            assert tensor.any()
        assert {part_of(name) for name in delta} - {None} == phase_of(trainer.plan, round)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE])
@pytest.mark.parametrize("rule", ["ffa", "nested", "flora"])
def test_clients_that_are_trained_together_get_what_they_get_alone(make: Make, tiny_rows: Rows, privacy: dict[str, Any], rule: str) -> None:
    trainer = make(rule, privacy=privacy, local={"steps": None, "epochs": 1, "optimizer": "sgd", "learning_rate": 0.3, "proximal_mu": 0.2})
    assert trainer.at_once > 1
    ranks = [2, 4, 2, 4] if properties(trainer.plan).mixed_ranks else [4] * 4
    data = [encoded(trainer, tiny_rows(8 + 3 * number, number)) for number in range(4)]
    for round in (1, 2):

        def job(number: int, round: int = round) -> Job:
            start = off_start(trainer, ranks[number])
            if trainer.plan.private:
                return private_job(trainer, data[number], round, start, key=number)
            return Job(start, data[number], round, SeededSource("order", number))

        together = trainer.run_together([job(number) for number in range(4)])
        for number, found in enumerate(together):
            alone = trainer.run(job(number))
            assert not isinstance(found, Exception), found
            assert found.delta.keys() == alone.delta.keys()
            for name, tensor in alone.delta.items():
                torch.testing.assert_close(found.delta[name], tensor, rtol=1e-3, atol=2e-5)


def test_fedprox_pulls_towards_where_the_round_began(make: Make, tiny_rows: Rows) -> None:
    """Two steps of plain SGD: the first has nothing to pull, the second has μ times the first."""
    local = {"steps": 2, "optimizer": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.2, "betas": [0.0, 0.9], "batch_size": 48}
    found = []
    for steps, mu in ((1, 0.5), (2, 0.0), (2, 0.5)):
        trainer = make("fedavg", local=local | {"steps": steps, "proximal_mu": mu})
        rows = encoded(trainer, tiny_rows(48))
        found.append(trainer.run(Job(off_start(trainer), rows, 1, SeededSource("order"))).delta)
    one, plain, pulled = found
    for name, first in one.items():
        rate = 0.2 if name in trainer.model.head else 0.1
        torch.testing.assert_close(pulled[name], plain[name] - rate * 0.5 * first, rtol=1e-4, atol=1e-7)
        assert not torch.equal(pulled[name], plain[name])


def test_fedprox_is_neither_clipped_nor_noised(make: Make, tiny_rows: Rows) -> None:
    """Nobody is drawn, so each step is noise alone, the same with and without: the difference is the pull."""
    rate, mu, found = 0.1, 3.0, []
    for pull in (0.0, mu):
        trainer = make(
            "fedavg",
            privacy=PRIVATE,
            local={"optimizer": "sgd", "learning_rate": rate, "betas": [0.0, 0.9], "proximal_mu": pull},
        )
        rows, steps = encoded(trainer, tiny_rows(SIZE)), []
        for count in (1, 2):
            segment = Segment(1.5, 1e-9, count)
            private = Private([[row] for row in range(SIZE)], segment, SIZE, Gate(segment))
            steps.append(trainer.run(Job(off_start(trainer), rows, 1, SeededSource("noise"), None, private)).delta)
        found.append(steps)
    (one, two), (same, pulled) = found
    for name in one:
        assert torch.equal(one[name], same[name])
        torch.testing.assert_close(pulled[name], two[name] - rate * mu * one[name], rtol=1e-4, atol=1e-4 * float(one[name].abs().max()))
