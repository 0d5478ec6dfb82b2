"""The model's way down, both ends: what the coordinator adds and sends, and what a node makes of an older model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import save_file

from lichen.client.chain import bring_up, steps_from
from lichen.common import records
from lichen.common.codec.registry import CODECS
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.coordinator.downlink import LONGEST, Downlink
from lichen.coordinator.run_directory import RunDirectory, ServerState

COUNT = 5000 + 64 * 7
WHOLE = 4 * COUNT


def draw(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"b.weight": scale * torch.randn(64, 7, generator=generator), "a.bias": scale * torch.randn(5000, generator=generator)}


class Run:
    """A coordinator's side of some rounds."""

    def __init__(self, spool: Path, codec: str | None = "blockwise") -> None:
        spool.mkdir()
        self.spool = spool
        self.codec = CODECS[codec]() if codec else None
        self.downlink = Downlink(self.codec, spool)
        self.state = ServerState(0, draw(0), {}, {})
        self.messages = [self.message()]

    def message(self) -> Message:
        content = RecordDict({"payload": self.downlink.arrays(self.state)})
        records.put_chain(content, self.state.chain)
        return records.build_message(
            content, run_id=1, message_id="0" * 32, src_node_id=1, dst_node_id=2, message_type="train", group_id="1"
        )

    def round(self, *names: str) -> Message:
        """One round that moves all tensors, or those of these names."""
        self.state.round += 1
        step = draw(self.state.round, 0.01)
        self.state.model = self.downlink.add({name: step[name] for name in names or step}, self.state)
        self.messages.append(self.message())
        return self.messages[-1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "coordinator")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    spool = tmp_path / "node"
    spool.mkdir()
    return spool


def model_of(message: Message) -> str:
    return records.payload_refs(message)[0].digest


def give(run: Run, node: Path, *digests: str) -> None:
    for digest in digests:
        shutil.copyfile(run.spool / digest, node / digest)


@pytest.mark.parametrize("behind", [1, 2, 5, LONGEST])
def test_a_node_that_is_behind_makes_the_same_model_of_what_was_added(run: Run, node: Path, behind: int) -> None:
    give(run, node, model_of(run.messages[0]))
    for _ in range(behind):
        message = run.round()
    steps = steps_from(node, message)
    assert len(steps) == behind
    give(run, node, *(step.added.digest for step in steps))
    bring_up(node, message, run.codec)
    found = records.get_tensors(message.content, node)
    assert all(torch.equal(found[name], tensor) for name, tensor in run.state.model.items()), "to the bit"
    assert not list(node.glob("*.tmp"))
    assert steps_from(node, message) == []


@pytest.mark.parametrize("codec", ["blockwise", None])
def test_tensors_that_a_step_has_not_stay_the_same_to_the_bit_at_both_ends(tmp_path: Path, node: Path, codec: str | None) -> None:
    run = Run(tmp_path / "coordinator", codec)
    before = run.state.model
    message = run.round("a.bias")
    assert torch.equal(run.state.model["b.weight"], before["b.weight"])
    assert not torch.equal(run.state.model["a.bias"], before["a.bias"])
    give(run, node, model_of(run.messages[0]), *(link.added.digest for link in run.state.chain))
    if codec is None:
        give(run, node, model_of(message))
    bring_up(node, message, run.codec)
    found = records.get_tensors(message.content, node)
    assert all(torch.equal(found[name], tensor) for name, tensor in run.state.model.items())


def test_what_is_added_is_near_the_step_and_the_coordinator_adds_no_other(run: Run) -> None:
    before = run.state.model
    run.round()
    exact = draw(1, 0.01)
    moved = {name: run.state.model[name] - before[name] for name in exact}
    off = sum(float((moved[name] - exact[name]).square().sum()) for name in exact) / sum(float(t.square().sum()) for t in exact.values())
    assert 0 < off < 1e-4


def test_the_newest_model_that_is_there_is_where_it_begins(run: Run, node: Path) -> None:
    for _ in range(4):
        message = run.round()
    give(run, node, model_of(run.messages[0]), model_of(run.messages[3]))
    assert [step.before for step in steps_from(node, message)] == [model_of(run.messages[3])]


def test_one_that_is_too_far_behind_or_has_nothing_fetches_the_model_whole(run: Run, node: Path) -> None:
    message = run.round()
    assert steps_from(node, message) == []
    give(run, node, model_of(run.messages[0]))
    for _ in range(LONGEST):
        message = run.round()
    assert len(records.chain_of(message)) == LONGEST
    assert steps_from(node, message) == []


def test_bytes_are_those_that_a_node_fetches(run: Run) -> None:
    def told(client: str) -> int:
        return run.downlink.bytes_for(client, run.messages[-1].content, run.state)

    assert told("a") == records.payload_bytes(run.messages[0].content) > WHOLE
    run.downlink.arrived("a", run.state)
    assert told("a") == 0, "a second message about the same model"
    lengths = []
    for _ in range(3):
        message = run.round()
        lengths.append(records.chain_of(message)[-1].added.length)
        assert told("a") == sum(lengths)
    assert sum(lengths) < 3 * WHOLE / 3.7
    assert told("b") == records.payload_bytes(message.content)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _no_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [_flip, _empty, _no_header, Path.unlink])
@pytest.mark.parametrize("what", ["model", "step"])
def test_what_does_not_lead_to_the_coordinators_model_is_not_used(run: Run, node: Path, damage: Callable[[Path], None], what: str) -> None:
    message = run.round()
    step = records.chain_of(message)[0]
    give(run, node, step.before, step.added.digest)
    damage(node / (step.before if what == "model" else step.added.digest))
    if damage is Path.unlink and what == "model":
        bring_up(node, message, run.codec)  # nothing to make it of: it was to be fetched
    else:
        with pytest.raises(LichenError) as caught:
            bring_up(node, message, run.codec)
        assert caught.value.code is Code.MODEL_BEHIND
    assert not (node / model_of(message)).exists()
    assert not list(node.glob("*.tmp"))


def test_only_models_of_32_bit_floats_are_made(run: Run, node: Path) -> None:
    message = run.round()
    step = records.chain_of(message)[0]
    give(run, node, step.added.digest)
    save_file({"a": torch.zeros(3, dtype=torch.float16)}, node / step.before)
    with pytest.raises(LichenError) as caught:
        bring_up(node, message, run.codec)
    assert caught.value.code is Code.MODEL_BEHIND


def test_a_chain_in_a_plan_that_sends_models_whole_is_not_used(run: Run, node: Path) -> None:
    message = run.round()
    step = records.chain_of(message)[0]
    give(run, node, step.before, step.added.digest)
    with pytest.raises(LichenError) as caught:
        bring_up(node, message, None)
    assert caught.value.code is Code.MODEL_BEHIND


def test_where_models_travel_whole_there_is_no_chain(tmp_path: Path) -> None:
    run = Run(tmp_path / "whole", codec=None)
    message = run.round()
    assert records.chain_of(message) == []
    assert all(torch.equal(run.state.model[name], draw(0)[name] + draw(1, 0.01)[name]) for name in run.state.model)


def test_without_a_spool_the_model_is_the_same_and_travels_inside(run: Run) -> None:
    inside = Downlink(run.codec, None)
    state = ServerState(0, draw(0), {}, {})
    inside.arrays(state)
    state.model = inside.add(draw(1, 0.01), state)
    run.round()
    assert state.chain == []
    assert all(torch.equal(state.model[name], run.state.model[name]) for name in state.model)


def test_steps_that_are_no_longer_there_are_not_named(run: Run) -> None:
    for _ in range(4):
        message = run.round()
    (run.spool / records.chain_of(message)[1].added.digest).unlink()
    assert records.chain_of(run.message()) == records.chain_of(message)[2:]


def test_a_checkpoint_keeps_the_chain_and_who_holds_what(tmp_path: Path, run: Run, tiny_plan: dict[str, Any]) -> None:
    run.downlink.arrived("a", run.state)
    run.round()
    plan = parse_plan(tiny_plan)
    RunDirectory(tmp_path / "run", plan).save_state(run.state)
    found = RunDirectory(tmp_path / "run", plan).load_state()
    assert found is not None
    assert (found.chain, found.held) == (run.state.chain, run.state.held)
    assert len(found.chain) == len(found.held) == 1


def test_under_client_level_privacy_no_checkpoint_tells_who_took_part(tmp_path: Path, run: Run, tiny_plan: dict[str, Any]) -> None:
    run.downlink.arrived("a", run.state)
    plan: Plan = parse_plan(
        tiny_plan | {"cohort": {"size": 2, "population": 4}, "privacy": {"unit": "client", "noise": "central", "delta": 1e-3}}
    )
    RunDirectory(tmp_path / "run", plan).save_state(run.state)
    found = RunDirectory(tmp_path / "run", plan).load_state()
    assert found is not None
    assert found.held == {}


@pytest.mark.parametrize("before", ["../x", "0" * 63, "A" * 64])
def test_a_chain_that_lichen_does_not_make_is_refused(run: Run, node: Path, before: str) -> None:
    message = run.round()
    content = RecordDict({"payload": message.content.array_records["payload"]})
    records.put_chain(content, [records.ChainLink(before, records.chain_of(message)[0].added)])
    other = records.build_message(content, run_id=1, message_id="0" * 32, src_node_id=1, dst_node_id=2, message_type="train", group_id="1")
    with pytest.raises(LichenError) as caught:
        steps_from(node, other)
    assert caught.value.code is Code.FRAME_INVALID


def test_of_a_chain_with_gaps_what_follows_the_last_one_is_kept(run: Run) -> None:
    for _ in range(5):
        run.round()
    links = list(run.state.chain)
    for gap in (0, 2):
        (run.spool / links[gap].added.digest).unlink()
    run.downlink.arrays(run.state)
    assert run.state.chain == links[3:]


def test_a_model_that_is_no_longer_in_the_spool_is_put_there_again(run: Run) -> None:
    message = run.round()
    (run.spool / model_of(message)).unlink()
    assert model_of(run.message()) == model_of(message)
    assert (run.spool / model_of(message)).exists()


def test_what_later_messages_will_name_is_needed_until_the_run_is_over(run: Run) -> None:
    for _ in range(2):
        message = run.round()
    others = {model_of(earlier) for earlier in run.messages[:-1]}
    assert run.downlink.needed(run.state) == {path.name for path in run.spool.iterdir()} - others
    assert len(run.downlink.needed(run.state)) == 3, "two steps and a model"
    run.downlink.close(run.state)
    assert {path.name for path in run.spool.iterdir()} == others
    assert not (run.spool / model_of(message)).exists()


def test_where_there_is_room_no_second_model_is_made() -> None:
    """Of the step's own values, too, which the coordinator sums in that room; other room is left alone."""
    codec, step = CODECS["blockwise"](), draw(1, 0.01)
    state = ServerState(0, draw(0), {}, {})
    expected = Downlink(codec, None).add(step, state)
    room = torch.cat([step[name].reshape(-1) for name in sorted(step)])
    own = {name: room[start : start + step[name].numel()].view(step[name].shape) for name, start in (("a.bias", 0), ("b.weight", 5000))}
    other = torch.zeros(COUNT - 1)
    for place in (other, room):
        found = Downlink(codec, None).add(dict(own), state, place)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not other.any()
    assert found["a.bias"].data_ptr() == room.data_ptr()
