"""Rounds in which clients are not equally fast, over the grid with virtual time: first come, deadlines, partial work, buffers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Message, RecordDict

from lichen.common import records
from lichen.common.errors import Code
from lichen.common.plan import Plan
from lichen.common.privacy.accounting import epsilon
from lichen.common.privacy.schedule import planned_steps
from lichen.common.result import Result, Round
from lichen.common.tasks import workbench
from lichen.coordinator import buffered
from lichen.simulations.engine import InProcessGrid
from scripted_clients import (
    DECLARED,
    PRIVATE,
    SIZES,
    STEPS,
    Federation,
    answer,
    close,
    expected,
    failing,
    honest,
    plan_from,
    report_of,
    update_of,
)


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    return lambda **changes: plan_from(tiny_plan, {"size": 3, "minimum": 1}, changes)


def uneven(*speeds: float) -> type[InProcessGrid]:
    """The grid in one process, where clients take so many steps a virtual second."""

    class Uneven(InProcessGrid):
        def __init__(self, app: Any, homes: Any, run_id: int) -> None:
            super().__init__(app, homes, run_id, speeds=speeds)

    return Uneven


SLOW = uneven(1.0, 1.0, 0.25)  # client-2 takes 16 s, the others 4


# --- first come ---


def test_a_round_ends_with_enough_updates_and_calls_the_others_off(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(rounds=2, cohort={"size": 2, "oversample": 1.3, "deadline_s": 100})
    federation = Federation(tmp_path, plan, {}, SLOW)
    result = federation.run()
    assert [(told.participants, told.failed, told.unneeded, told.errors) for told in result.rounds] == [(2, 0, 1, {})] * 2
    assert [told.called_off for told in result.rounds] == [["client-2"]] * 2
    assert federation.grid.clock() == 8.0, "nobody waited for the third"
    close(federation.model(), expected(plan, 2, ["client-0", "client-1"]))


def test_an_update_that_cannot_be_used_is_not_one_of_enough(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(cohort={"size": 2, "oversample": 1.5, "deadline_s": 100})
    federation = Federation(tmp_path, plan, {"client-0": failing(Code.DATA_LABEL)}, SLOW)
    (told,) = federation.run().rounds
    assert (told.participants, told.failed, told.unneeded) == (2, 1, 0)
    assert federation.grid.clock() == 16.0
    close(federation.model(), expected(plan, 1, ["client-1", "client-2"]))


def test_the_deadline_ends_a_round_with_the_minimum_and_without_it_fails_it(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    cohort = {"size": 3, "minimum": 2, "deadline_s": 10}
    federation = Federation(tmp_path / "two", plan_of(cohort=cohort), {}, SLOW)
    (told,) = federation.run().rounds
    assert (told.participants, told.errors, federation.grid.clock()) == (2, {"client-2": None}, 10.0)
    Federation(tmp_path / "three", plan_of(cohort=cohort | {"minimum": 3}), {}, SLOW).fails(Code.COHORT_TOO_SMALL)


def test_who_had_begun_is_busy_with_it_in_the_next_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    """A client that is always late is never half used: it answers a message whose round is over, and begins the next too late."""
    plan = plan_of(rounds=3, cohort={"size": 3, "minimum": 2, "deadline_s": 5})
    result = Federation(tmp_path, plan, {}, SLOW).run()
    assert [told.errors for told in result.rounds] == [{"client-2": None}] * 3


def test_a_poisson_cohort_is_asked_whole_however_large(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    privacy = {"unit": "client", "noise": "central", "epsilon": 8.0, "delta": 1e-3}
    plan = plan_of(rounds=8, privacy=privacy, cohort={"size": 1, "population": 3, "deadline_s": 100})
    drawn: list[int] = []

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        drawn.append(assignment.round)
        about = {"format": 1, "client": name, "round": assignment.round, "steps": STEPS}
        return answer(message, about, update_of(records.get_tensors(message.content, None), name, assignment.round))

    Federation(tmp_path, plan, dict.fromkeys(SIZES, act), SLOW).run()
    told = [Round.model_validate_json(line) for line in (tmp_path / "operator.jsonl").read_text().splitlines()]
    assert max(Counter(drawn).values()) > 1, "more than were expected"
    assert [round.participants for round in told] == [drawn.count(round) for round in range(1, 9)]


# --- partial work ---


def walking(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
    """Sends its usual update, scaled by the share of the steps that its time allows, and says so."""
    assert assignment.seconds is not None
    speed = {"client-2": 0.25}.get(name, 1.0)
    steps = min(STEPS, int(0.9 * assignment.seconds * speed))
    update = update_of(records.get_tensors(message.content, None), name, assignment.number)
    report = report_of(plan, assignment, name) | {"steps": steps}
    return answer(message, report, {key: tensor * (steps / STEPS) for key, tensor in update.items()})


def test_partial_work_is_used_and_weighs_by_its_steps(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(cohort={"minimum": 3, "deadline_s": 12}, local={"partial": True})
    federation = Federation(tmp_path, plan, dict.fromkeys(SIZES, walking), SLOW)
    (told,) = federation.run().rounds
    assert (told.participants, told.failed) == (3, 0)
    assert federation.grid.clock() == 8.0  # two of its four steps at a quarter of the speed
    start, total = workbench(plan)[2], sum(SIZES.values())
    effective = sum(size * steps for size, steps in zip(SIZES.values(), (4, 4, 2), strict=True)) / total
    model = {name: tensor.double() for name, tensor in start.items()}
    for client, size in SIZES.items():
        for name, tensor in update_of(start, client, 1).items():
            model[name] += effective * size / total * tensor.double() / STEPS  # Δ/τ is the same for all of a client's steps
    close(federation.model(), model)


@pytest.mark.parametrize("steps", [0, -1, STEPS + 1, 10**15])
def test_steps_that_no_client_can_have_done_are_refused(tmp_path: Path, plan_of: Callable[..., Plan], steps: int) -> None:
    plan = plan_of(local={"partial": True})

    def claiming(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        start = records.get_tensors(message.content, None)
        return answer(message, report_of(plan, assignment, name) | {"steps": steps}, update_of(start, name, assignment.number))

    (told,) = Federation(tmp_path, plan, {"client-0": claiming}, InProcessGrid).run().rounds
    assert told.errors == {"client-0": int(Code.FRAME_INVALID)}


def test_only_a_plan_with_partial_work_tells_of_time(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    seen: list[float | None] = []

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        seen.append(assignment.seconds)
        return honest(plan, assignment, message, name)

    for number, partial in enumerate((False, True)):
        plan = plan_of(local={"partial": partial}, cohort={"deadline_s": 7})
        Federation(tmp_path / str(number), plan, dict.fromkeys(SIZES, act), InProcessGrid).run()
    assert seen == [None] * 3 + [7.0] * 3


# --- buffers ---


def buffered_plan(plan_of: Callable[..., Plan], **changes: Any) -> Plan:
    cohort = {"size": 3, "minimum": 1, "mode": "buffered", "buffer": 2, "deadline_s": 1000} | changes.pop("cohort", {})
    return plan_of(cohort=cohort, **{"rounds": 6} | changes)


class Watching:
    """An honest client that notes what it was asked, and on which model."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []  # client, training, step of the server

    def __call__(self, plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        assert assignment.training is not None
        self.asked.append((name, assignment.training, assignment.round))
        start = records.get_tensors(message.content, None)
        return answer(message, report_of(plan, assignment, name), update_of(start, name, assignment.number))


def run_buffered(root: Path, plan: Plan, grid: type[InProcessGrid] = SLOW) -> tuple[Federation, Result, Watching]:
    watching = Watching()
    federation = Federation(root, plan, dict.fromkeys(SIZES, watching), grid)
    return federation, federation.run(), watching


def test_fast_clients_go_on_and_a_slow_ones_update_counts_less(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of)
    federation, result, watching = run_buffered(tmp_path, plan)
    # the fast ones answer together every 4 s, which is a step; the slow one's first update comes with their fourth
    assert [(told.participants, told.failed) for told in result.rounds] == [(2, 0)] * 6
    assert [told.staleness for told in result.rounds[:3]] == [0, 0, 0]
    assert sum((told.staleness or 0) for told in result.rounds[3:]) > 0
    assert federation.grid.clock() <= 24.0
    times = Counter(name for name, *_ in watching.asked)
    assert times["client-2"] <= 2 < 6 <= times["client-0"]
    for name in SIZES:
        assert [training for client, training, _ in watching.asked if client == name] == list(range(1, times[name] + 1))


def test_its_model_is_the_sum_of_scaled_updates(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=5)
    used: list[list[tuple[str, int, int]]] = []

    class Noting(buffered.BufferedStrategy):
        def _apply(self, round: int, counted: Any) -> None:
            used.append([(one.report.client, one.counts.staleness, one.report.round) for one in counted])
            super()._apply(round, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lichen.coordinator.app.BufferedStrategy", Noting)
        federation, result, watching = run_buffered(tmp_path, plan)
    assert [told.staleness for told in result.rounds] == [sum(one[1] for one in buffer) / len(buffer) for buffer in used]
    start = workbench(plan)[2]
    model = {name: tensor.double() for name, tensor in start.items()}
    trained = Counter[str]()
    for buffer in used:
        total = sum(SIZES[client] for client, *_ in buffer)
        for client, staleness, _ in buffer:
            trained[client] += 1
            for name, tensor in update_of(start, client, trained[client]).items():
                model[name] += SIZES[client] / total * tensor.double() / math.sqrt(1 + staleness)
    assert any(staleness for buffer in used for _, staleness, _ in buffer)
    close(federation.model(), model)
    assert {(client, round) for buffer in used for client, _, round in buffer} <= {(client, round) for client, _, round in watching.asked}


def test_it_is_the_same_every_time(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, cohort={"size": 2})
    (left, _, one), (right, _, other) = (run_buffered(tmp_path / name, plan) for name in "ab")
    assert one.asked == other.asked
    assert all(torch.equal(tensor, right.model()[name]) for name, tensor in left.model().items())


def test_alike_clients_and_a_whole_buffer_are_synchronous_rounds(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=3, cohort={"buffer": 3})
    federation, result, _ = run_buffered(tmp_path, plan, uneven(1.0))
    assert [told.staleness for told in result.rounds] == [0.0] * 3
    close(federation.model(), expected(plan, 3, SIZES))


def test_the_deadline_of_a_step_makes_do_with_the_minimum_and_without_it_fails(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    cohort = {"buffer": 3, "deadline_s": 7, "minimum": 2}
    _, result, _ = run_buffered(tmp_path / "two", buffered_plan(plan_of, rounds=2, cohort=cohort), uneven(1.0, 1.0, 0.1))
    assert result.rounds[0].participants == 2
    watching = dict.fromkeys(SIZES, Watching())
    slow = Federation(tmp_path / "three", buffered_plan(plan_of, cohort=cohort | {"deadline_s": 3}), watching, uneven(1.0))
    slow.fails(Code.COHORT_TOO_SMALL)


def test_who_fails_is_asked_again_with_the_next_step_only(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=4, cohort={"buffer": 2})
    federation = Federation(tmp_path, plan, {"client-0": failing(Code.AGENT_PAUSED)}, uneven(1.0))
    result = federation.run()
    assert [told.errors for told in result.rounds] == [{"client-0": int(Code.AGENT_PAUSED)}] * 4
    assert all(told.participants == 2 for told in result.rounds)
    every = Federation(tmp_path / "all", plan, dict.fromkeys(SIZES, failing(Code.AGENT_PAUSED)), uneven(1.0))
    every.fails(Code.COHORT_TOO_SMALL)
    assert len(every.asked) == 3


def test_what_is_too_stale_is_called_off(tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffered, "MOST_STALE", 2)
    plan = buffered_plan(plan_of, rounds=8)
    _, result, watching = run_buffered(tmp_path, plan, uneven(1.0, 1.0, 0.01))
    assert [told.round for told in result.rounds if told.errors == {"client-2": None}] == [4, 7]
    assert [round for client, _, round in watching.asked if client == "client-2"] == [1, 4, 7]


def test_an_update_of_twenty_steps_ago_is_waited_for_and_no_older_one(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    _, result, _ = run_buffered(tmp_path, buffered_plan(plan_of, rounds=23), uneven(1.0, 1.0, 0.001))
    assert [told.round for told in result.rounds if told.errors] == [22]


def test_under_privacy_nobody_trains_more_often_than_the_noise_is_for(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=3, privacy=PRIVATE, cohort={"buffer": 3})
    _, result, watching = run_buffered(tmp_path, plan, uneven(1.0, 1.0, 0.02))
    assert Counter(name for name, *_ in watching.asked) == {"client-0": 3, "client-1": 3, "client-2": 1}
    assert [told.participants for told in result.rounds] == [3, 3, 1]  # then only the slow one has trainings left
    spent = epsilon([planned_steps(plan, DECLARED)] * 3, plan.privacy.delta)
    assert result.privacy.max_epsilon == spent <= plan.privacy.epsilon
    assert result.privacy.clients["client-2"].epsilon < spent


def test_who_has_nothing_left_is_not_asked_again(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=4, privacy=PRIVATE)
    federation = Federation(tmp_path, plan, {"client-1": failing(Code.PRIVACY_BUDGET)}, uneven(1.0))
    result = federation.run()
    assert [name for *_, name in federation.asked].count("client-1") == 1
    assert result.status == "finished"


def test_updates_are_added_by_client_whoever_was_first(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[list[str]] = []

    class Noting(buffered.BufferedStrategy):
        def _apply(self, round: int, counted: Any) -> None:
            applied.append([one.report.client for one in counted])
            super()._apply(round, counted)

    monkeypatch.setattr("lichen.coordinator.app.BufferedStrategy", Noting)
    run_buffered(tmp_path, buffered_plan(plan_of, rounds=2, cohort={"buffer": 3}), uneven(0.9, 1.1, 1.0))
    assert applied == [sorted(SIZES)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan, assignment, name, update: (report_of(plan, assignment, name) | {"round": assignment.round + 1}, update),
        lambda plan, assignment, name, update: (report_of(plan, assignment, name), {key: value[:1] for key, value in update.items()}),
    ],
    ids=["a report of another step", "an update of another shape"],
)
def test_what_cannot_be_used_takes_no_place_in_the_buffer(tmp_path: Path, plan_of: Callable[..., Plan], wrong: Any) -> None:
    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        update = update_of(records.get_tensors(message.content, None), name, assignment.number)
        return answer(message, *wrong(plan, assignment, name, update))

    result = Federation(tmp_path, buffered_plan(plan_of, rounds=3), {"client-0": act}, uneven(1.0)).run()
    assert [told.participants for told in result.rounds] == [2] * 3
    assert all(told.errors.keys() == {"client-0"} and told.errors["client-0"] for told in result.rounds)


def leaving(here: Callable[[int], list[int]], *speeds: float) -> type[InProcessGrid]:
    """The grid, where the clients of these numbers are connected, by how often it was asked."""

    class Leaving(uneven(*speeds)):  # type: ignore[misc]
        looked = 0

        def get_node_ids(self) -> list[int]:
            self.looked += 1
            every: list[int] = super().get_node_ids()
            return [every[number] for number in here(self.looked)]

    return Leaving


def test_one_client_that_is_left_fills_the_buffer_alone(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    grid = leaving(lambda looked: [0, 1, 2] if looked < 3 else [1], 1.0)
    _, result, _ = run_buffered(tmp_path, buffered_plan(plan_of, rounds=3), grid)
    assert [told.participants for told in result.rounds] == [2] * 3


def test_under_privacy_who_is_away_for_a_moment_is_waited_for(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=2, privacy=PRIVATE, cohort={"buffer": 3, "minimum": 2})
    grid = leaving(lambda looked: [0] if 3 <= looked < 13 else [0, 1, 2], 1.0)
    _, result, _ = run_buffered(tmp_path, plan, grid)
    assert all((told.participants or 0) >= 2 for told in result.rounds)


def test_who_left_while_busy_takes_no_place(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = buffered_plan(plan_of, rounds=4, cohort={"size": 1, "buffer": 1})
    asked: list[str] = []

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        asked.append(name)
        return honest(plan, assignment, message, name)

    # whoever is asked first has left before it answers
    grid = leaving(lambda looked: [0, 1, 2] if not asked else [n for n in range(3) if f"client-{n}" != asked[0]], 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_seconds", lambda self, reply: 1e6 if len(asked) == 1 else 1.0)
        result = Federation(tmp_path, plan, dict.fromkeys(SIZES, act), grid).run()
    assert result.status == "finished"
    assert asked[0] not in asked[1:]
    assert len(asked) >= 5


def test_the_last_step_calls_off_what_is_under_way(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    class Noting(SLOW):  # type: ignore[misc, valid-type]
        def cancel(self, message_ids: Iterable[str]) -> list[str]:
            withdrawn: list[str] = super().cancel(message_ids)
            self.withdrawn = withdrawn
            return withdrawn

    federation, result, _ = run_buffered(tmp_path, buffered_plan(plan_of, rounds=2), Noting)
    assert result.status == "finished"
    assert len(federation.grid.withdrawn) == 1, "the slow client's"


class Outbox(InProcessGrid):
    """Keeps what was pushed and answered where a coordinator's death leaves it, as the channel does; replies come in another order then."""

    kept: ClassVar[dict[str, Message]] = {}
    answers: ClassVar[dict[str, Message]] = {}

    def __init__(self, app: Any, homes: Any, run_id: int) -> None:
        super().__init__(app, homes, run_id, speeds=(1.0, 1.0, 0.25))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = list(messages)
        for message in pushed:
            self.kept.setdefault(message.metadata.message_id, message)
        return super().push_messages([self.kept[message.metadata.message_id] for message in pushed])

    def replies(self, message_ids: Iterable[str], timeout: float | None = None) -> Iterator[Message]:
        ids = list(message_ids)
        for message_id in sorted(ids):
            if message_id in self.answers:
                yield self.answers[message_id]
        self._pushed |= {key: self.kept[key] for key in ids if key not in self.answers and key not in self._due}
        for reply in super().replies([key for key in ids if key not in self.answers], timeout):
            self.answers[reply.metadata.reply_to_message_id] = reply
            yield reply

    def let_go(self, message_ids: Iterable[str], keep: Iterable[str]) -> None:
        for message_id in message_ids:
            self.kept.pop(message_id, None)
            self.answers.pop(message_id, None)

    def unreleased(self) -> list[Message]:
        return list(self.kept.values())


def test_what_a_checkpoint_has_is_not_used_again_and_let_go_of(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the checkpoint and the outbox's tidying."""

    class Killed(Outbox):
        def let_go(self, message_ids: Iterable[str], keep: Iterable[str]) -> None:
            if message_ids:
                raise KeyboardInterrupt
            super().let_go(message_ids, keep)

    applied: list[str] = []

    class Noting(buffered.BufferedStrategy):
        def _apply(self, round: int, counted: Any) -> None:
            applied.extend(one.message.metadata.reply_to_message_id for one in counted)
            super()._apply(round, counted)

    monkeypatch.setattr("lichen.coordinator.app.BufferedStrategy", Noting)
    monkeypatch.setattr(Outbox, "kept", {})
    monkeypatch.setattr(Outbox, "answers", {})
    plan = buffered_plan(plan_of, privacy=PRIVATE, rounds=4)
    watching = Watching()
    with pytest.raises(KeyboardInterrupt):
        Federation(tmp_path, plan, dict.fromkeys(SIZES, watching), Killed).run()
    settled = set(Outbox.answers)
    assert settled >= set(applied) > set()
    federation = Federation(tmp_path, plan, dict.fromkeys(SIZES, watching), Outbox)
    # a message of another kind is not its own
    other = federation.grid.create_message(RecordDict(), records.EVALUATE, 2, "1")
    Outbox.kept[other.metadata.message_id] = other
    result = federation.run()
    assert [told.round for told in result.rounds] == [1, 2, 3, 4]
    assert len(set(applied)) == len(applied) == sum(told.participants or 0 for told in result.rounds)
    assert not settled & Outbox.kept.keys()
    assert other.metadata.message_id in Outbox.kept


@pytest.mark.parametrize("killed_at", range(2, 12))
def test_a_coordinator_that_was_killed_uses_each_training_once(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    monkeypatch.setattr(Outbox, "kept", {})
    monkeypatch.setattr(Outbox, "answers", {})
    plan = buffered_plan(plan_of, privacy=PRIVATE, rounds=6)
    watching, served = Watching(), 0
    mailboxes: dict[str, Message] = {}

    def act(plan: Plan, assignment: records.Assignment, message: Message, name: str) -> Message:
        nonlocal served
        served += 1
        if served == killed_at:
            raise KeyboardInterrupt
        if (key := message.metadata.message_id) not in mailboxes:
            mailboxes[key] = watching(plan, assignment, message, name)
        return mailboxes[key]

    with pytest.raises(KeyboardInterrupt):
        Federation(tmp_path, plan, dict.fromkeys(SIZES, act), Outbox).run()
    result = Federation(tmp_path, plan, dict.fromkeys(SIZES, act), Outbox).run()
    assert result.status == "finished"
    assert [told.round for told in result.rounds] == list(range(1, 7))
    assert max(Counter((name, training) for name, training, _ in watching.asked).values()) == 1
    times = Counter(name for name, *_ in watching.asked)
    steps = planned_steps(plan, DECLARED).steps
    used = sum(told.participants or 0 for told in result.rounds)
    assert used == 12 == sum(client.steps // steps for client in result.privacy.clients.values()), "each update that came, once"
    for name, client in result.privacy.clients.items():
        assert client.steps // steps <= times[name] <= plan.rounds
