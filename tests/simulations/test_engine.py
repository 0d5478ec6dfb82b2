"""The grid in one process: Flower's Grid contract, ids that repeat, clients that fail, and what progress is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.simulations.engine import InProcessGrid, Progress
from lichen.simulations.workers import Workers, layout

NAMES = ("client-0", "client-1", "client-2")


def echo() -> ClientApp:
    """Answers with its name, and how often it was asked: state that Flower keeps in the context."""
    app = ClientApp()

    def serve(message: Message, context: Context) -> Message:
        times = int(context.state.config_records.get("seen", {"times": 0})["times"]) + 1  # type: ignore[arg-type]
        context.state["seen"] = ConfigRecord({"times": times})
        told = {"name": str(context.node_config["name"]), "home": str(context.node_config["home"]), "times": times}
        return records.reply(message, RecordDict({"told": ConfigRecord(told)}))

    app.train()(serve)
    app.evaluate()(serve)
    return app


def grid_of(app: ClientApp | None = None, run_id: int = 7, progress: Progress | None = None) -> InProcessGrid:
    return InProcessGrid(app or echo(), [Path("/homes") / name for name in NAMES], run_id, progress)


def messages(grid: InProcessGrid, kind: str = records.TRAIN, group: str = "1") -> list[Message]:
    return [grid.create_message(RecordDict(), kind, node, group) for node in grid.get_node_ids()]


def told(reply: Message) -> dict[str, object]:
    return dict(reply.content.config_records["told"])


def test_it_is_flowers_grid_and_each_client_gets_its_own_context() -> None:
    grid = grid_of()
    assert isinstance(grid, Grid)
    assert [grid.name_of(node) for node in grid.get_node_ids()] == list(NAMES)
    replies = grid.send_and_receive(messages(grid), timeout=0.001)
    assert [told(reply)["name"] for reply in replies] == list(NAMES)
    assert [told(reply)["home"] for reply in replies] == [f"/homes/{name}" for name in NAMES]
    assert [grid.name_of(reply.metadata.src_node_id) for reply in replies] == list(NAMES)


def test_a_reply_belongs_to_its_message_and_run() -> None:
    grid = grid_of(run_id=2**62 + 3)
    asked = messages(grid)
    for message, reply in zip(asked, grid.send_and_receive(asked), strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (message.metadata.dst_node_id, message.metadata.src_node_id)
        assert (reply.metadata.run_id, reply.metadata.group_id) == (2**62 + 3, "1")


def test_a_clients_state_lasts_from_round_to_round() -> None:
    grid = grid_of()
    for round in (1, 2, 3):
        replies = grid.send_and_receive(messages(grid, group=str(round)))
        assert {told(reply)["times"] for reply in replies} == {round}


def test_a_home_is_opened_once_when_its_client_is_first_served() -> None:
    opened: list[int] = []
    grid = InProcessGrid(echo(), [Path("/homes") / name for name in NAMES], 7, open_home=opened.append)
    asked = messages(grid)
    assert opened == []
    grid.send_and_receive(asked[1:2])
    assert opened == [1]
    grid.send_and_receive(messages(grid, group="2")[1:])
    assert opened == [1, 2]


def test_ids_follow_from_run_kind_round_and_node_alone() -> None:
    def ids(grid: InProcessGrid, kind: str = records.TRAIN, group: str = "1") -> list[str]:
        return [message.metadata.message_id for message in messages(grid, kind, group)]

    first = ids(grid_of())
    assert first == ids(grid_of())
    others = [ids(grid_of(run_id=8)), ids(grid_of(), records.EVALUATE), ids(grid_of(), group="2")]
    assert len({*first, *(identity for other in others for identity in other)}) == 4 * len(NAMES)
    grid = grid_of()
    grid.set_run(type("Run", (), {"run_id": 8}))
    assert ids(grid) == others[0]


def test_push_then_pull_runs_only_what_is_pulled() -> None:
    grid = grid_of()
    first, second, third = grid.push_messages(messages(grid))
    assert [told(reply)["name"] for reply in grid.pull_messages([third, first])] == ["client-2", "client-0"]
    assert [told(reply)["name"] for reply in grid.pull_messages([second])] == ["client-1"]


def test_progress_is_told_of_each_client_that_is_done() -> None:
    heard: list[tuple[str, int, int]] = []
    grid = grid_of(progress=lambda *what: heard.append(what))
    grid.send_and_receive(messages(grid))
    grid.send_and_receive(messages(grid, records.EVALUATE)[:2])
    assert heard == [("train", 1, 3), ("train", 2, 3), ("train", 3, 3), ("evaluate", 1, 2), ("evaluate", 2, 2)]


def test_there_is_no_flower_run_record() -> None:
    with pytest.raises(LichenError) as caught:
        _ = grid_of().run
    assert caught.value.code is Code.INTERNAL


def test_payloads_lie_in_the_spool_until_the_next_are_sent(tmp_path: Path) -> None:
    app, kept = ClientApp(), tmp_path / "spool"

    @app.train()  # type: ignore[untyped-decorator]
    def serve(message: Message, context: Context) -> Message:
        found = records.get_tensors(message.content, Path(str(context.node_config["spool"])))
        content = RecordDict()
        update = {"weight": found["weight"] + int(context.node_id)}
        records.put_tensors(content, update, Path(str(context.node_config["spool"])), durable=False)
        return records.reply(message, content)

    kept.mkdir()
    for grid in (
        InProcessGrid(app, [Path("/homes") / name for name in NAMES], 7, spool=kept),
        InProcessGrid(app, [Path("/homes") / name for name in NAMES], 7, fork=lambda work: Workers(2, 1, work), spool=kept),
    ):
        for round in (1, 2):
            content = RecordDict()
            records.put_tensors(content, {"weight": torch.full((1000,), float(round))}, kept)
            asked = [grid.create_message(content, records.TRAIN, node, str(round)) for node in grid.get_node_ids()]
            replies = grid.send_and_receive(asked)
            assert all(records.payload_refs(reply) for reply in replies)
            assert [float(records.get_tensors(reply.content, kept)["weight"][0]) for reply in replies] == [round + 2, round + 3, round + 4]
            needed = {ref.digest for message in [*asked, *replies] for ref in records.payload_refs(message)}
            assert {path.name for path in kept.iterdir()} == needed
        grid.close()


# --- worker processes ------------------------------------------------------------------------------------------------------------


def forked(app: ClientApp, count: int = 2) -> Iterator[InProcessGrid]:
    grid = InProcessGrid(app, [Path("/homes") / name for name in NAMES], 7, fork=lambda work: Workers(count, 1, work))
    try:
        yield grid
    finally:
        grid.close()


def with_payload(grid: InProcessGrid, data: bytes, group: str = "1") -> list[Message]:
    payload = ArrayRecord({"payload": Array(dtype="uint8", shape=(len(data),), stype="test", data=data)})
    return [grid.create_message(RecordDict({"payload": payload}), records.TRAIN, node, group) for node in grid.get_node_ids()]


def test_workers_answer_in_the_order_asked_each_with_its_own_payload_and_round() -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def serve(message: Message, context: Context) -> Message:
        data = message.content.array_records["payload"]["payload"].data
        told = {"name": str(context.node_config["name"]), "data": data, "process": os.getpid()}
        return records.reply(message, RecordDict({"told": ConfigRecord(told)}))

    for grid in forked(app):
        processes = set()
        for number in range(5):  # later payloads may lie where earlier ones did
            replies = grid.send_and_receive(with_payload(grid, bytes([number]) * 100_000, str(number)))
            assert [told(reply)["name"] for reply in replies] == list(NAMES)
            assert {told(reply)["data"] for reply in replies} == {bytes([number]) * 100_000}
            processes |= {told(reply)["process"] for reply in replies}
        assert os.getpid() not in processes
        assert 1 <= len(processes) <= 2


def test_a_worker_that_is_killed_ends_the_run_with_a_reason() -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def serve(message: Message, context: Context) -> Message:
        os.kill(os.getpid(), signal.SIGKILL)
        return message

    for grid in forked(app):
        with pytest.raises(LichenError, match="exit code -9") as caught:
            grid.send_and_receive(with_payload(grid, b"x"))
        assert caught.value.code is Code.INTERNAL


def test_what_opening_a_home_raises_in_a_worker_is_raised_here_by_its_number() -> None:
    def full(number: int) -> None:
        raise LichenError(Code.OUTPUT_UNUSABLE, "cannot write: no space", where=f"client {number}")

    homes = [Path("/homes") / name for name in NAMES]
    grid = InProcessGrid(echo(), homes, 7, fork=lambda work: Workers(2, 1, work), open_home=full)
    try:
        with pytest.raises(LichenError, match=r"client \d: cannot write: no space") as caught:
            grid.send_and_receive(with_payload(grid, b"x"))
    finally:
        grid.close()
    assert caught.value.code is Code.OUTPUT_UNUSABLE


def test_the_layout_is_a_process_a_core_and_no_more_than_there_are_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert layout(100) == (8, 1)
    assert layout(3) == (3, 2)
    assert layout(100, 2) == (2, 4)
    assert layout(100, 1) == (1, 8)
