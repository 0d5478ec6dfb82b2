"""Cohort batching: clients trained together get what each would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.trainer import Trained, Trainer
from lichen.common import tasks
from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource
from lichen.common.privacy.single_backward.grouped import GroupWeights
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, str]]]
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}
COUNTS = (40, 9, 23, 1)
"""Rows of the clients: they end after different numbers of steps, and their last batches are of different sizes."""


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Callable[..., Trainer]]:
    def trainer(**changes: Any) -> Trainer:
        document = tiny_plan | {"local": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}}
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        tasks.workbench.cache_clear()
        return Trainer(parse_plan(document))

    yield trainer
    tasks.workbench.cache_clear()


def jobs(trainer: Trainer, tiny_rows: Rows) -> list[Job]:
    """The same ones each time, with sources and gates of their own."""
    start = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in reversed(workbench(trainer.plan).start.items())}
    found = []
    for number, count in enumerate(COUNTS):
        rows = tiny_rows(count, number)
        data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
        private = None
        if trainer.plan.private:
            segment = Segment(0.5 + number, 0.25, 3 + number)
            private = Private([[row] for row in range(count)], segment, 32, Gate(segment))
        found.append(Job(start, data, 1, SeededSource("client", number), private=private))
    return found


def both(trainer: Trainer, tiny_rows: Rows) -> list[tuple[Trained, Trained]]:
    torch.manual_seed(0)
    alone = [trainer.run(job) for job in jobs(trainer, tiny_rows)]
    torch.manual_seed(0)
    together = trainer.run_together(jobs(trainer, tiny_rows))
    for one in together:
        assert isinstance(one, Trained), one
    return list(zip(alone, together, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "model", [{"adapter": {"kind": "lora", "rank": 2}}, {"adapter": {"kind": "lora", "rank": 2}, "head": {"pooling": "pooler"}}]
)
def test_without_privacy(make: Callable[..., Trainer], tiny_rows: Rows, optimizer: str, model: dict[str, Any]) -> None:
    trainer = make(model=model, local={"optimizer": optimizer})
    assert trainer.at_once > 1
    for alone, together in both(trainer, tiny_rows):
        assert (together.steps, together.loss) == (alone.steps, pytest.approx(alone.loss, rel=1e-5))
        for name, delta in alone.delta.items():
            torch.testing.assert_close(together.delta[name], delta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [{"adapter": {"kind": "lora", "rank": 2}}, {"adapter": {"kind": "lora", "targets": ["all-linear"]}}])
def test_with_privacy_and_the_same_noise(make: Callable[..., Trainer], tiny_rows: Rows, model: dict[str, Any]) -> None:
    trainer = make(model=model, privacy=PRIVATE, local={"optimizer": "sgd", "learning_rate": 0.1})
    assert trainer.at_once > 1
    for alone, together in both(trainer, tiny_rows):
        assert (together.steps, together.loss) == (alone.steps, None)
        for name, delta in alone.delta.items():
            torch.testing.assert_close(together.delta[name], delta, rtol=1e-4, atol=1e-6)


def test_a_row_without_a_finite_gradient_counts_as_zero(
    make: Callable[..., Trainer], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(privacy=PRIVATE)
    assert trainer.at_once > 1  # checked while its losses are whole
    losses, found = trainer.task.losses, []
    for factor in (torch.nan, 0.0):

        def some_broken(network: torch.nn.Module, batch: dict[str, torch.Tensor], factor: float = factor) -> torch.Tensor:
            return losses(network, batch) * torch.where(batch["input_ids"].sum(1) % 5 == 0, factor, 1.0)

        monkeypatch.setattr(trainer.task, "losses", some_broken)
        found.append([together.delta for _, together in both(trainer, tiny_rows)])
    for broken, zero in zip(*found, strict=True):
        for name, delta in zero.items():
            assert torch.equal(broken[name], delta)


def test_the_rows_do_pass_together(make: Callable[..., Trainer], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    seen: list[int] = []
    use = GroupWeights.use
    monkeypatch.setattr(GroupWeights, "use", lambda self, weights, rows: seen.append(rows) or use(self, weights, rows))  # type: ignore[func-returns-value]
    trainer.run_together(jobs(trainer, tiny_rows))
    assert len(seen) == 5, "as many passes as the longest client has batches"
    assert sum(seen) < 1.3 * sum(COUNTS), "few rows are made up"


def test_one_that_fails_fails_alone(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(privacy=PRIVATE)
    asked = jobs(trainer, tiny_rows)
    # rows, of which none may be read any more, and more steps than were paid for
    private = Private([], Segment(1.0, 0.25, 2), 32, Gate(Segment(1.0, 0.25, 1)))
    asked[1] = Job(asked[1].start, asked[1].data, 1, SeededSource("none"), private=private)
    found = trainer.run_together(asked)
    assert isinstance(found[1], LichenError)
    assert found[1].code is Code.PRIVACY_BUDGET
    assert [isinstance(one, Trained) for one in found] == [True, False, True, True]


def test_a_step_that_was_not_paid_for_is_not_taken_for_anyone(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(privacy=PRIVATE)
    asked = jobs(trainer, tiny_rows)
    private = asked[2].private
    assert private is not None
    private.gate.step(private.segment)  # all that was granted
    found = trainer.run_together(asked)
    assert all(isinstance(one, LichenError) and one.code is Code.PRIVACY_BUDGET for one in found)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"adapter": {"kind": "full"}}}, "every weight is trained"),
        ({"model": {"adapter": {"kind": "lora", "dropout": 0.1}}}, "dropout draws for all at once"),
        ({"local": {"compute": "plain"}}, "the plan says so"),
        ({"local": {"batch_size": 10_000}}, "batches are large enough"),
    ],
)
def test_where_it_is_not_done(make: Callable[..., Trainer], changes: dict[str, Any], why: str) -> None:
    assert make(**changes).at_once == 1, why


def test_a_broken_sum_is_caught_before_anything_is_trained(make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    lora = GroupWeights.lora

    def half(self: GroupWeights, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return lora(self, x, *rest) * 0.5

    monkeypatch.setattr(GroupWeights, "lora", half)
    trainer = make(privacy=PRIVATE)
    with pytest.raises(LichenError) as caught:
        _ = trainer.at_once
    assert caught.value.code is Code.PRIVACY_SELF_CHECK
