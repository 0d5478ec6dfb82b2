"""Local training: it learns, it repeats, batches do not depend on memory; with privacy, its steps are what was reserved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.client import private_step
from lichen.client.gate import Gate
from lichen.client.trainer import Trainer, batches
from lichen.common import batches as batches_module
from lichen.common import tasks
from lichen.common.errors import Code, LichenError
from lichen.common.model.lean import run_lean
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.per_unit import PerUnitGradients
from lichen.common.privacy.randomness import SecretSource, SeededSource
from lichen.common.privacy.schedule import planned_evaluation, planned_steps
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
State = dict[str, torch.Tensor]
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Callable[..., Trainer]]:
    def trainer(**changes: Any) -> Trainer:
        document = dict(tiny_plan)
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        tasks.workbench.cache_clear()  # a trainer puts hooks on its model
        return Trainer(parse_plan(document))

    yield trainer
    tasks.workbench.cache_clear()


def encoded(trainer: Trainer, rows: list[dict[str, Any]]) -> Any:
    return trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})


def trained(trainer: Trainer, rows: Any, round: int = 1, key: object = "order") -> Any:
    return trainer.train(workbench(trainer.plan).start, rows, round, SeededSource(key))


def private(trainer: Trainer, rows: Any, segment: Segment, *, source: Any = None, units: Any = None, size: int = 48, round: int = 1) -> Any:
    units = [[row] for row in range(len(rows))] if units is None else units
    start = workbench(trainer.plan).start
    return trainer.train_private(start, rows, units, segment, size, round, source or SeededSource("noise"), Gate(segment))


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refused(code: Code, call: Callable[[], object]) -> str:
    with pytest.raises(LichenError) as caught:
        call()
    assert caught.value.code is code
    return caught.value.what


# --- without privacy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "head"])
def test_it_learns_and_every_weight_moves(make: Callable[..., Trainer], tiny_rows: Rows, kind: str) -> None:
    trainer = make(model={"adapter": {"kind": kind, "rank": 2}}, local={"steps": 12, "learning_rate": 0.02})
    rows = encoded(trainer, tiny_rows(48))
    start = workbench(trainer.plan).start
    found = trained(trainer, rows)
    assert found.steps == 12
    assert found.delta.keys() == start.keys()
    still = {name for name, delta in found.delta.items() if not delta.any()}
    assert not {name for name in still if "embeddings" not in name and "key.bias" not in name}
    trainer.model.load({name: start[name] + found.delta[name] for name in start})
    after = trainer.task.score(trainer.model.network, rows, 16).metrics()
    assert after["loss"] < found.loss < 1.2
    assert after["loss"] < 1.0


def test_the_same_seed_gives_the_same_bits(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make()
    rows = encoded(trainer, tiny_rows(30))
    first = trained(trainer, rows)
    torch.rand(3)
    assert same(first.delta, trained(trainer, rows).delta)
    assert not same(first.delta, trained(trainer, rows, key="other").delta)
    again = make()
    assert same(first.delta, trained(again, encoded(again, tiny_rows(30))).delta)


def test_dropout_repeats_too(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(model={"adapter": {"rank": 2, "dropout": 0.5}})
    rows = encoded(trainer, tiny_rows(30))
    first = trained(trainer, rows)
    torch.manual_seed(99)
    assert same(first.delta, trained(trainer, rows).delta)
    without = make()
    assert not same(first.delta, trained(without, encoded(without, tiny_rows(30))).delta)


def test_rounds_start_afresh(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    """No optimizer state, nor anything else, is kept from round to round: a client that was killed is like any other."""
    trainer = make()
    rows = encoded(trainer, tiny_rows(30))
    trained(trainer, encoded(trainer, tiny_rows(30, seed=5)))
    used = trained(trainer, rows).delta
    fresh = make()
    assert same(used, trained(fresh, encoded(fresh, tiny_rows(30))).delta)


@pytest.mark.parametrize(
    ("local", "count", "sizes"),
    [
        ({"steps": 5, "batch_size": 8}, 20, [8, 8, 4, 8, 8]),
        ({"epochs": 1, "batch_size": 8}, 20, [8, 8, 4]),
        ({"epochs": 2, "batch_size": 8}, 16, [8, 8, 8, 8]),
        ({"epochs": 0.5, "batch_size": 8}, 16, [8]),
        ({"epochs": 0.01, "batch_size": 8}, 16, [8]),
        ({"steps": 3, "batch_size": 64}, 20, [20, 20, 20]),
    ],
)
def test_steps_and_epochs(make: Callable[..., Trainer], local: dict[str, Any], count: int, sizes: list[int]) -> None:
    trainer = make(local={"steps": None, **local})
    found = list(batches(trainer.plan.local, count, SeededSource("order")))
    assert [len(batch) for batch in found] == sizes
    whole = [row for batch in found for row in batch]
    for start in range(0, len(whole) - count + 1, count):  # each pass has every row once
        assert sorted(whole[start : start + count]) == list(range(count))
    assert whole[:count] != list(range(count))


def test_a_training_that_is_ended_early_is_the_beginning_of_the_whole(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(local={"partial": True, "steps": 4})
    rows, start = encoded(trainer, tiny_rows(40)), workbench(trainer.plan).start
    asked: list[int] = []

    def stop(done: int) -> bool:
        asked.append(done)
        return done == 3

    ended = trainer.train(start, rows, 1, SeededSource("order"), stop=stop)
    assert (ended.steps, asked) == (3, [0, 1, 2, 3])
    shorter = make(local={"partial": True, "steps": 3})
    assert same(ended.delta, trained(shorter, encoded(shorter, tiny_rows(40))).delta)


@pytest.mark.parametrize("part", [1, 3, 5])
def test_accumulation_is_one_big_batch(make: Callable[..., Trainer], tiny_rows: Rows, part: int) -> None:
    """With plain SGD, whose steps are as large as the gradients."""
    local = {"steps": 3, "batch_size": 10, "optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 0.5}
    whole = make(local={**local, "max_physical_batch_size": 32})
    expected = trained(whole, encoded(whole, tiny_rows(30)))
    parts = make(local={**local, "max_physical_batch_size": part})
    found = trained(parts, encoded(parts, tiny_rows(30)))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, delta in expected.delta.items():
        torch.testing.assert_close(found.delta[name], delta, atol=1e-6, rtol=1e-4)


def test_the_step_is_the_mean_over_the_batch(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(local={"steps": 1, "batch_size": 30, "optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 0.25})
    rows = encoded(trainer, tiny_rows(30))
    found = trained(trainer, rows)
    trainer.model.load(workbench(trainer.plan).start)
    loss = trainer.task.losses(trainer.model.network, trainer.task.collate(rows, range(30))).mean()
    gradients = torch.autograd.grad(loss, list(trainer.model.trainable.values()))
    for delta, gradient in zip(found.delta.values(), gradients, strict=True):
        torch.testing.assert_close(delta, -0.25 * gradient, atol=1e-6, rtol=1e-4)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_learning_rates_of_head_and_rounds(make: Callable[..., Trainer]) -> None:
    trainer = make(rounds=4, local={"learning_rate": 0.1, "head_learning_rate": 0.5, "learning_rate_decay": "linear", "weight_decay": 0.2})
    for round, factor in ((1, 1.0), (2, 0.75), (4, 0.25)):
        body, head = trainer._optimizer(round, trainer.model.trainable).param_groups
        assert (body["lr"], head["lr"]) == pytest.approx((0.1 * factor, 0.5 * factor))
        assert {id(p) for p in head["params"]} == {id(trainer.model.trainable[name]) for name in trainer.model.head}
        assert len(body["params"]) + len(head["params"]) == len(trainer.model.trainable)
        assert body["weight_decay"] == 0.2
    cosine = make(rounds=4, local={"learning_rate": 0.1, "learning_rate_decay": "cosine"})
    rates = [cosine._optimizer(round, cosine.model.trainable).param_groups[0]["lr"] for round in (1, 2, 3, 4)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_training_that_gives_no_number_is_refused(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(local={"learning_rate": 1e30, "optimizer": "sgd"})
    what = refused(Code.MODEL_NOT_TRAINED, lambda: trained(trainer, encoded(trainer, tiny_rows(30))))
    assert "not finite" in what


def test_training_that_moves_nothing_is_refused(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    """Hole 5: loss and ε look right, and the model is the one that was sent."""
    trainer = make(local={"learning_rate": 1e-30, "optimizer": "sgd"}, model={"adapter": {"rank": 2}, "head": {"init": "random"}})
    rows = encoded(trainer, tiny_rows(30))
    start = {name: tensor + 0.1 for name, tensor in workbench(trainer.plan).start.items()}
    assert "no weight" in refused(Code.MODEL_NOT_TRAINED, lambda: trainer.train(start, rows, 1, SeededSource("order")))


def test_a_head_that_learns_alone_is_refused(make: Callable[..., Trainer], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    rows = encoded(trainer, tiny_rows(30))
    original = Trainer._optimizer

    def head_only(self: Trainer, round: int, of: State) -> torch.optim.Optimizer:
        optimizer = original(self, round, of)
        del optimizer.param_groups[0]
        return optimizer

    monkeypatch.setattr(Trainer, "_optimizer", head_only)
    assert "the head alone" in refused(Code.MODEL_NOT_TRAINED, lambda: trained(trainer, rows))


def test_one_step_from_a_head_of_zeros_moves_the_head_alone_by_right(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(local={"steps": 1})
    delta = trained(trainer, encoded(trainer, tiny_rows(30))).delta
    assert {name for name, tensor in delta.items() if tensor.any()} == trainer.model.head


def test_tensors_that_do_not_fit(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make()
    rows = encoded(trainer, tiny_rows(6))
    refused(Code.STATE_MISMATCH, lambda: trainer.train({}, rows, 1, SeededSource("order")))
    refused(Code.INTERNAL, lambda: private(trainer, rows, Segment(1.0, 0.5, 1)))


# --- with privacy -------------------------------------------------------------------------------------------------------------------


def test_the_private_steps_are_those_of_the_segment(make: Callable[..., Trainer], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hole 4: Poisson draws, of units, in each of as many steps as were paid for."""
    trainer = make(privacy=PRIVATE)
    rows = encoded(trainer, tiny_rows(48))
    drawn: list[list[tuple[int, ...]]] = []
    original = PerUnitGradients.step

    def watch(self: PerUnitGradients, optimizer: Any, units: Any, collate: Any, lengths: Any) -> None:
        drawn.append([tuple(unit) for unit in units])
        assert optimizer.noise_multiplier == 3.0
        assert optimizer.max_grad_norm == 0.5
        assert optimizer.expected_batch_size == 0.25 * 48
        original(self, optimizer, [] if len(drawn) > 4 else units, collate, lengths)

    monkeypatch.setattr(PerUnitGradients, "step", watch)
    pairs = [[row, row + 1] for row in range(0, 48, 2)]
    found = private(trainer, rows, Segment(3.0, 0.25, 60), units=pairs)
    assert found.steps == len(drawn) == 60
    assert found.loss is None
    sizes = [len(step) for step in drawn]
    assert len(set(sizes)) > 3, "a fixed batch size would not be what is accounted"
    assert 0.15 < sum(sizes) / (60 * 24) < 0.35
    assert {unit for step in drawn for unit in step} <= {tuple(pair) for pair in pairs}


def test_the_denominator_is_the_declared_size(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    local = {"optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 1.0}
    trainer = make(privacy=PRIVATE, local=local)
    rows = encoded(trainer, tiny_rows(12))
    deltas = [private(trainer, rows, Segment(1e-5, 1.0, 1), size=size).delta for size in (12, 48)]
    for name in deltas[0]:
        torch.testing.assert_close(deltas[0][name], 4 * deltas[1][name], atol=1e-6, rtol=1e-4)
    # and the sum that it divides is bounded by the units' number times the clip
    norm = sum(float((delta**2).sum()) for delta in deltas[0].values()) ** 0.5
    assert 0 < norm <= 0.5 * (1 + 1e-3)


def test_private_training_learns_where_noise_is_small(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(privacy=PRIVATE, local={"learning_rate": 0.02})
    rows = encoded(trainer, tiny_rows(96))
    found = private(trainer, rows, Segment(0.05, 0.25, 60), size=96)
    assert all(delta.any() for delta in found.delta.values())
    start = workbench(trainer.plan).start
    trainer.model.load({name: start[name] + found.delta[name] for name in start})
    assert trainer.task.score(trainer.model.network, rows, 16).metrics()["accuracy"] > 0.6


def test_private_training_repeats_by_its_source_only(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(privacy=PRIVATE)
    rows = encoded(trainer, tiny_rows(24))
    segment = Segment(1.0, 0.25, 2)
    assert same(private(trainer, rows, segment).delta, private(trainer, rows, segment).delta)
    secret = [private(trainer, rows, segment, source=SecretSource()).delta for _ in range(2)]
    assert all(not torch.equal(secret[0][name], secret[1][name]) for name in secret[0])


def test_empty_draws_take_steps_of_noise(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    trainer = make(privacy=PRIVATE, local={"optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 1.0})
    rows = encoded(trainer, tiny_rows(12))
    found = private(trainer, rows, Segment(2.0, 1e-9, 1), size=12, source=SecretSource())
    noise = torch.cat([delta.flatten() for delta in found.delta.values()]) * 1e-9 * 12
    assert float(noise.std()) == pytest.approx(2.0 * 0.5, rel=0.2)
    nobody = private(trainer, rows, Segment(2.0, 0.5, 3), units=[], size=12)
    assert nobody.steps == 3
    assert all(delta.any() for delta in nobody.delta.values())


def test_memory_does_not_change_the_private_step(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    local = {"optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 1.0}
    found = []
    for most in (2, 64):
        trainer = make(privacy=PRIVATE, local={**local, "max_physical_batch_size": most})
        found.append(private(trainer, encoded(trainer, tiny_rows(24)), Segment(0.5, 0.5, 2), size=24).delta)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-4, rtol=1e-3)


def test_an_adversary_who_sees_single_steps_learns_no_low_bits(make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    """One step, no momentum: the reply is the noised sum itself, for a head that starts at zero to the last bit."""
    trainer = make(
        privacy=PRIVATE,
        model={"adapter": {"kind": "head"}},
        local={"steps": 1, "optimizer": "sgd", "betas": [0.0, 0.0], "learning_rate": 1.0},
    )
    rows = encoded(trainer, tiny_rows(16))
    delta = private(trainer, rows, Segment(2.0, 1.0, 1), size=16, source=SecretSource()).delta
    grid = 2.0**-15 * 1.0 / 16  # σ·C = 1, and the denominator is 16
    for tensor in delta.values():
        steps = tensor.double() / grid
        assert torch.equal(steps, steps.round())


def test_a_model_is_checked_before_it_trains(make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bool] = []
    monkeypatch.setattr(private_step, "self_check", lambda *_: checked.append(True))
    make(privacy=PRIVATE)
    assert checked
    make()
    assert len(checked) == 1


# --- what a round costs -------------------------------------------------------------------------------------------------------------


def plan(tiny_plan: dict[str, Any], **privacy: Any) -> Plan:
    return parse_plan({**tiny_plan, "privacy": {**PRIVATE, **privacy}})


def test_a_rounds_cost_follows_from_constants(tiny_plan: dict[str, Any]) -> None:
    given = planned_steps(plan(tiny_plan), 1000)
    assert (given.sample_rate, given.steps) == (0.25, 4)
    assert epsilon([given] * 2, 1e-5) <= 6.0 < epsilon([given._replace(noise_multiplier=given.noise_multiplier / 1.0011)] * 2, 1e-5)
    found = planned_steps(plan(tiny_plan, sample_rate=None), 64)
    assert found.sample_rate == 8 / 64
    assert planned_steps(plan(tiny_plan, sample_rate=None), 4).sample_rate == 1.0
    by_epochs = parse_plan({**tiny_plan, "privacy": PRIVATE, "local": {"epochs": 2}})
    assert planned_steps(by_epochs, 64).steps == 8


def test_delta_above_one_in_the_declared_size_is_refused(tiny_plan: dict[str, Any]) -> None:
    planned_steps(plan(tiny_plan), 100_000)
    assert "100001" in refused(Code.PLAN_UNSOUND, lambda: planned_steps(plan(tiny_plan), 100_001))


def test_an_evaluations_cost_fits_as_often_as_it_is_asked(tiny_plan: dict[str, Any]) -> None:
    found = planned_evaluation(parse_plan({**tiny_plan, "rounds": 6, "privacy": PRIVATE, "evaluation": {"federated_every": 2}}))
    assert (found.sample_rate, found.steps) == (1.0, 1)
    assert epsilon([found] * 3, 1e-5) <= 6.0 < epsilon([found] * 4, 1e-5)


def test_training_stops_before_epsilon_would_pass(make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path) -> None:
    """The ledger grants what fits, and exactly so many steps are taken."""
    from lichen.client.ledger import Ledger
    from lichen.client.ledger_book import Limit, Limits

    trainer = make(privacy=PRIVATE)
    rows = encoded(trainer, tiny_rows(24))
    planned = Segment(1.0, 0.25, 10)
    bound = epsilon([planned._replace(steps=7)], 1e-5)
    with Ledger(tmp_path) as ledger:
        reads, limits = set(ledger.assign("train", [1])), Limits("example", Limit(bound, 1e-5))
        granted = ledger.reserve("train", "r", "m", 1, planned, limits, reads, as_of=ledger.split_at).segment
        assert granted.steps == private(trainer, rows, granted).steps == 7
        refused(Code.PRIVACY_BUDGET, lambda: ledger.reserve("train", "r", "n", 2, planned, limits, reads, as_of=ledger.split_at))


@pytest.mark.parametrize("unit", ["example", "entity"])
def test_both_ways_to_clip_train_the_same_model(make: Callable[..., Trainer], tiny_rows: Rows, unit: str) -> None:
    deltas = []
    for gradients in ("single-backward", "hooks"):
        trainer = make(
            privacy={**PRIVATE, "gradients": gradients},
            model={"adapter": {"kind": "lora", "rank": 2, "dropout": 0.3}},
            local={"optimizer": "sgd", "max_physical_batch_size": 5},
        )
        rows = encoded(trainer, tiny_rows(24))
        units = [[row] for row in range(24)] if unit == "example" else [list(range(9)), [9, 10], [11], [12, 13, 14], list(range(15, 24))]
        deltas.append(private(trainer, rows, Segment(1e-3, 0.5, 4), units=units, size=12).delta)
    gap, size = (
        torch.cat([part.flatten() for part in parts]).norm()
        for parts in ([deltas[0][name] - deltas[1][name] for name in deltas[0]], list(deltas[1].values()))
    )
    assert float(gap) <= 1e-3 * float(size)


def test_shuffles_come_from_the_source_not_from_the_global_seed(make: Callable[..., Trainer]) -> None:
    trainer = make()
    orders = []
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        orders.append(list(batches(trainer.plan.local, 20, SeededSource("order"))))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_less_work_gives_the_same_weights(kind: str, pooling: str, packed: bool, make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    """Rows packed or by length, the last layer for the first token alone, and fused LoRA, against padded batches by PEFT's own passes."""
    moved = []
    monkey = pytest.MonkeyPatch()
    if not packed:
        monkey.setattr(batches_module, "run_lean", lambda model, pack: run_lean(model, pack=False))
    for compute in ("lean", "plain"):
        trainer = make(
            local={"compute": compute, "optimizer": "sgd", "learning_rate": 0.1, "max_physical_batch_size": 8},
            model={"adapter": {"kind": kind, "rank": 2}, "head": {"pooling": pooling, "init": "random"}},
        )
        monkey.setattr(trainer._batches, "_pass_cost", 2.0)  # the tiny model's own would not divide such batches
        moved.append(trained(trainer, encoded(trainer, tiny_rows(40))))
    monkey.undo()
    lean, plain = moved
    assert lean.steps == plain.steps
    assert lean.loss == pytest.approx(plain.loss, rel=1e-5)
    for name, delta in plain.delta.items():
        assert torch.allclose(lean.delta[name], delta, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_less_work_gives_the_same_private_steps(kind: str, pooling: str, make: Callable[..., Trainer], tiny_rows: Rows) -> None:
    moved = []
    for compute in ("lean", "plain"):
        trainer = make(
            privacy=PRIVATE,
            local={"compute": compute, "optimizer": "sgd", "learning_rate": 0.1, "max_physical_batch_size": 8},
            model={"adapter": {"kind": kind, "rank": 2}, "head": {"pooling": pooling, "init": "random"}},
        )
        moved.append(private(trainer, encoded(trainer, tiny_rows(48)), Segment(0.5, 0.25, 4)).delta)
    for name, delta in moved[1].items():
        assert torch.allclose(moved[0][name], delta, rtol=1e-3, atol=1e-6), name


def test_what_runs_lean_is_what_was_meant_to(make: Callable[..., Trainer], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the weights agree would hold too if nothing was ever left out."""
    shapes: list[tuple[int, ...]] = []
    trainer = make(
        model={"adapter": {"kind": "lora", "rank": 2}, "head": {"pooling": "pooler", "init": "random"}},
        local={"max_physical_batch_size": 8},
    )
    base: Any = trainer.model.network.get_base_model()  # type: ignore[operator]
    inner: list[tuple[int, ...]] = []
    base.bert.encoder.layer[0].register_forward_hook(lambda *found: inner.append(tuple(found[2].shape)))
    base.bert.encoder.layer[-1].output.register_forward_hook(lambda *found: shapes.append(tuple(found[2].shape)))
    nodes: list[str] = []
    query = base.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda *found: nodes.append(type(found[2].grad_fn).__name__))
    trained(trainer, encoded(trainer, tiny_rows(24)))
    assert shapes
    assert {shape[1] for shape in shapes} == {1}
    assert set(nodes) == {"LoraNodeBackward"}
    assert {len(shape) for shape in inner} == {3}
    assert {shape[0] for shape in inner} == {1}, "one row of all real tokens"
