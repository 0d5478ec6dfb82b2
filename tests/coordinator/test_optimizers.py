"""Server optimizers: closed forms, and Flower's own FedAvgM as the oracle of ours over several rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
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
    step, velocity = server_step(update, {}, Aggregation())
    assert velocity == {}
    assert all(torch.equal(step[name], update[name]) for name in update)


def test_the_servers_learning_rate_scales_the_step() -> None:
    step, _ = server_step({"a": torch.tensor([2.0, -4.0])}, {}, Aggregation(learning_rate=0.5))
    assert step["a"].tolist() == [1.0, -2.0]


def test_the_state_that_goes_in_is_not_changed() -> None:
    generator = np.random.default_rng(1)
    update, velocity = draw(generator), draw(generator)
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (update, velocity)]
    server_step(update, velocity, Aggregation(optimizer="fedavgm", momentum=0.9))
    for state, copy in zip((update, velocity), copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in state)


def test_momentum_accumulates() -> None:
    settings = Aggregation(optimizer="fedavgm", momentum=0.5)
    moved, velocity = 0.0, State()
    for _ in range(3):  # v = 1, 1.5, 1.75
        step, velocity = server_step({"a": torch.ones(1)}, velocity, settings)
        moved += step["a"].item()
    assert (velocity["a"].item(), moved) == (1.75, 4.25)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rounds=st.integers(1, 5),
    clients=st.integers(1, 4),
    momentum=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
    rate=st.sampled_from([0.1, 1.0, 1.5]),
)
def test_fedavgm_agrees_with_flowers_own(seed: int, rounds: int, clients: int, momentum: float, rate: float) -> None:
    generator = np.random.default_rng(seed)
    model, velocity = draw(generator), State()
    theirs = FlowerFedAvgM(server_learning_rate=rate, server_momentum=momentum)
    theirs.current_arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in model.items()})
    for number in range(1, rounds + 1):
        total, replies = FedAvg(), []
        assert theirs.current_arrays is not None
        start = {name: torch.from_numpy(array.numpy().astype(np.float32)) for name, array in theirs.current_arrays.items()}
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
        mean = Layout.of(model).split(total.mean())
        step, velocity = server_step(mean, velocity, Aggregation(optimizer="fedavgm", momentum=momentum, learning_rate=rate))
        model = {name: tensor + step[name] for name, tensor in model.items()}
        arrays, _ = theirs.aggregate_train(number, replies)
        assert arrays is not None
        for name in model:
            np.testing.assert_allclose(model[name].numpy(), arrays[name].numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("optimizer", "momentum"), [("fedavg", 0.5), ("fedavgm", 0.0)])
def test_a_plan_can_not_name_momentum_and_leave_it_unused(optimizer: str, momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum above 0 goes with"):
        Aggregation(optimizer=optimizer, momentum=momentum)
