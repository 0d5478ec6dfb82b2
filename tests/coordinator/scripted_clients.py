"""Three clients that do as a test says, each a real ClientApp on the real grid in one process, and the model that their updates give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.schedule import planned_evaluation, planned_steps
from lichen.common.result import Result, read_result
from lichen.common.tasks import workbench
from lichen.coordinator.app import app as server_app
from lichen.simulations.engine import InProcessGrid

PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.25}
SIZES = {"client-0": 10, "client-1": 30, "client-2": 60}
DECLARED = 32
STEPS = 4
"""Of each training without privacy, as the clients report them."""
CLASSES = 3

Answer = Callable[[Plan, records.Assignment, Message, str], Message]
"""How one client answers: plan, assignment, message, its name."""


def update_of(start: State, name: str, number: int) -> State:
    """An update that follows from the client's name and its training's number, small so that the model stays sane."""
    generator = torch.Generator().manual_seed(1000 * number + sum(name.encode()))
    return {key: 0.01 * torch.randn(tensor.shape, generator=generator) for key, tensor in sorted(start.items())}


def report_of(plan: Plan, assignment: records.Assignment, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {"format": 1, "client": name, "round": assignment.round}
    if not plan.private:
        return about | {"steps": STEPS, "examples": SIZES[name], "train_loss": 0.5}
    noise, rate, steps = planned_steps(plan, DECLARED)
    return about | {"steps": steps, "declared_size": DECLARED, "noise_multiplier": noise, "sample_rate": rate}


def answer(message: Message, report: dict[str, Any], update: State | None) -> Message:
    content = RecordDict({"report": ConfigRecord(report)})
    if update is not None:
        records.put_tensors(content, update, None)
    return records.reply(message, content)


def honest(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
    if message.metadata.message_type == records.PREPARE:
        return records.reply(message, RecordDict())
    if message.metadata.message_type == records.EVALUATE:
        about: dict[str, Any] = {"format": 1, "client": name, "round": assignment.round, "counts": [4.0, 1.0, 0.0] * CLASSES}
        about |= {"noise_multiplier": planned_evaluation(plan).noise_multiplier} if plan.private else {"loss_sum": 9.0}
        return answer(message, about, None)
    start = records.get_tensors(message.content, None)
    return answer(message, report_of(plan, assignment, name), update_of(start, name, assignment.number))


def failing(code: int, reason: str = "") -> Answer:
    return lambda plan, assignment, message, name: records.error_reply(message, int(code), reason)


class Federation:
    """Three clients, of which some may act otherwise than honestly."""

    def __init__(self, root: Path, plan: Plan, actors: dict[str, Answer] | None = None, grid: type[InProcessGrid] = InProcessGrid) -> None:
        self.out = root
        self.plan = plan
        self.actors = actors or {}
        self.asked: list[tuple[str, int, str]] = []
        app = ClientApp()

        def act(message: Message, context: Context) -> Message:
            name = str(context.node_config["name"])
            assignment = records.from_config(records.Assignment, message.content.config_records["assignment"])
            self.asked.append((message.metadata.message_type, assignment.round, name))
            return self.actors.get(name, honest)(self.plan, assignment, message, name)

        app.train()(act)
        app.evaluate()(act)
        app.query("prepare")(act)
        self.grid = grid(app, [root / "simulation" / name for name in SIZES], 7)

    def run(self) -> Result:
        config = {"plan": self.plan.canonical_json(), "directory": str(self.out), "engine": "inprocess"}
        server_app(self.grid, Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=config))
        return read_result(self.out)

    def fails(self, code: Code) -> Result:
        with pytest.raises(LichenError) as caught:
            self.run()
        assert caught.value.code is code, str(caught.value)
        return read_result(self.out)

    def model(self) -> State:
        return dict(load_file(self.out / "model" / "adapter_model.safetensors"))

    def texts(self) -> str:
        """All that the run tells in text."""
        files = [path for path in self.out.rglob("*") if path.suffix in {".json", ".jsonl", ".html", ".md", ".yaml"}]
        return "\n".join(path.read_text(encoding="utf-8") for path in files)


class Broken(InProcessGrid):
    """Raises when the second round is asked for."""

    error: BaseException

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = list(messages)
        if asked[0].metadata.group_id == "2":
            raise self.error
        return list(super().send_and_receive(asked))


def plan_from(document: dict[str, Any], cohort: dict[str, Any], changes: dict[str, Any]) -> Plan:
    """A plan of one round, whose tensors travel as they are; changes go into its sections."""
    as_they_are = {"uplink": {"codec": "none"}, "downlink": {"codec": "none"}}
    document = document | {"cohort": cohort, "rounds": 1, "transfer": as_they_are}
    for key, value in changes.items():
        old = document.get(key)
        document[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return parse_plan(document)


def expected(plan: Plan, rounds: int, clients: Iterable[str]) -> State:
    """The model after rounds of weighted means of what those clients send, in 64-bit floats."""
    start = workbench(plan)[2]
    model = {name: tensor.to(torch.float64) for name, tensor in start.items()}
    names = sorted(clients)
    weights = {name: 1.0 if plan.private else float(SIZES[name]) for name in names}
    for round in range(1, rounds + 1):
        for client in names:
            share = weights[client] / sum(weights.values())
            for name, tensor in update_of(start, client, round).items():
                model[name] += share * tensor.to(torch.float64)
    return model


def close(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name].to(torch.float64), right[name].to(torch.float64), rtol=1e-5, atol=1e-6)
