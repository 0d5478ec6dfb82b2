"""Server optimizers: closed forms, and Flower's own as the oracles of ours over several rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import FedYogi as FlowerFedYogi
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common import records
from lichen.common.codec.layout import Layout
from lichen.common.codec.plain import Tensors
from lichen.common.model.adapter import State
from lichen.common.plan import Aggregation
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.coordinator.optimizers import server_step

SHAPES = {"a": (3, 2), "b": (4,)}


def draw(generator: np.random.Generator, scale: float = 1.0) -> State:
    return {name: torch.from_numpy((generator.standard_normal(shape) * scale).astype(np.float32)) for name, shape in SHAPES.items()}


def test_fedavg_adds_the_update_and_keeps_no_velocity() -> None:
    update = draw(np.random.default_rng(0))
    step, velocity, squares = server_step(update, {}, {}, Aggregation())
    assert (velocity, squares) == ({}, {})
    assert all(torch.equal(step[name], update[name]) for name in update)


def test_the_servers_learning_rate_scales_the_step() -> None:
    step = server_step({"a": torch.tensor([2.0, -4.0])}, {}, {}, Aggregation(learning_rate=0.5)).step
    assert step["a"].tolist() == [1.0, -2.0]


ALL = [Aggregation(), Aggregation(optimizer="fedavgm", momentum=0.9), Aggregation(optimizer="fedadam"), Aggregation(optimizer="fedyogi")]


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.optimizer)
def test_the_state_that_goes_in_is_not_changed(settings: Aggregation) -> None:
    generator = np.random.default_rng(1)
    states = [draw(generator), draw(generator), {name: tensor.square() for name, tensor in draw(generator).items()}]
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    server_step(*states, settings)
    for state, copy in zip(states, copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in state)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.optimizer)
def test_of_tensors_that_the_update_has_not_what_is_kept_stays(settings: Aggregation) -> None:
    generator = np.random.default_rng(2)
    velocity, squares = draw(generator), {name: tensor.square() for name, tensor in draw(generator).items()}
    stepped = server_step({"a": torch.ones(SHAPES["a"])}, velocity, squares, settings)
    assert stepped.step.keys() == {"a"}
    assert stepped.step["a"].all()
    assert torch.equal(stepped.velocity["b"], velocity["b"])
    assert torch.equal(stepped.squares["b"], squares["b"])


def test_momentum_accumulates() -> None:
    settings = Aggregation(optimizer="fedavgm", momentum=0.5)
    moved, velocity = 0.0, State()
    for _ in range(3):  # v = 1, 1.5, 1.75
        step, velocity, _ = server_step({"a": torch.ones(1)}, velocity, {}, settings)
        moved += step["a"].item()
    assert (velocity["a"].item(), moved) == (1.75, 4.25)


def adam_rate(rate: float, number: int) -> float:
    """Flower's FedAdam corrects for the moments' start at zero (and counts the rounds from 2), which the paper's does not."""
    return float(rate * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1)))


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rounds=st.integers(1, 5),
    clients=st.integers(1, 4),
    momentum=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
    rate=st.sampled_from([0.1, 1.0, 1.5]),
)
def test_they_agree_with_flowers_own(optimizer: str, seed: int, rounds: int, clients: int, momentum: float, rate: float) -> None:
    generator = np.random.default_rng(seed)
    model, velocity, squares = draw(generator), State(), State()
    theirs: Any = {
        "fedavgm": lambda: FlowerFedAvgM(server_learning_rate=rate, server_momentum=momentum),
        "fedadam": lambda: FlowerFedAdam(eta=rate, beta_1=0.9, beta_2=0.99, tau=1e-3),
        "fedyogi": lambda: FlowerFedYogi(eta=rate, beta_1=0.9, beta_2=0.99, tau=1e-3),
    }[optimizer]()
    current = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in model.items()})
    for number in range(1, rounds + 1):
        total, replies = FedAvg(), []
        # what a round's configuration would do
        theirs.current_arrays = current if optimizer == "fedavgm" else {name: array.numpy() for name, array in current.items()}
        start = {name: torch.from_numpy(array.numpy().astype(np.float32)) for name, array in current.items()}
        for client in range(clients):
            update, weight = draw(generator, 0.1), int(generator.integers(1, 1000))
            total.add(Tensors(update), weight)
            asked = records.build_message(
                RecordDict(),
                run_id=1,
                message_id=f"{client:032x}",
                src_node_id=1,
                dst_node_id=client + 2,
                message_type="train",
                group_id="1",
            )
            trained = ArrayRecord({name: Array((start[name] + update[name]).numpy()) for name in update})
            replies.append(records.reply(asked, RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": weight})})))
        own = adam_rate(rate, number) if optimizer == "fedadam" else rate
        settings = Aggregation(optimizer=optimizer, momentum=momentum if optimizer == "fedavgm" else 0.0, learning_rate=own)
        step, velocity, squares = server_step(Layout.of(model).split(total.mean()), velocity, squares, settings)
        model = {name: tensor + step[name] for name, tensor in model.items()}
        current, _ = theirs.aggregate_train(number, replies)
        for name in model:
            np.testing.assert_allclose(model[name].numpy(), current[name].numpy(), rtol=1e-4, atol=5e-5)


def test_adaptive_optimizers_have_a_small_learning_rate_of_their_own() -> None:
    assert [settings.learning_rate for settings in ALL] == [1.0, 1.0, 0.01, 0.01]
    assert Aggregation(optimizer="fedadam", learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(("optimizer", "momentum"), [("fedavg", 0.5), ("fedavgm", 0.0), ("fedadam", 0.5)])
def test_a_plan_can_not_name_momentum_and_leave_it_unused(optimizer: str, momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum above 0 goes with"):
        Aggregation(optimizer=optimizer, momentum=momentum)
