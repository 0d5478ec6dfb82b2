"""Real agent processes against a real fleet over mutual TLS: what they do, refuse, tell, and survive."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Message, RecordDict

from lichen.client.data import add_source
from lichen.client.enrolment import AUTHORITY_FILE, IDENTITY_FILE, NODE_FILE
from lichen.client.ledger import Ledger
from lichen.client.policy import weights_sha256
from lichen.client.status import read_status
from lichen.common import records
from lichen.common.channel.spool import Spool
from lichen.common.cli import main
from lichen.common.codec.layout import Layout
from lichen.common.codec.registry import downlink_codec, uplink_codec
from lichen.common.errors import Code
from lichen.common.model.export import save_model
from lichen.common.pki import Authority, fingerprint, make_csr, make_key
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.statement import Statement
from lichen.common.private_files import write_private
from lichen.common.tasks import workbench
from lichen.coordinator.downlink import Downlink
from lichen.coordinator.enrolment import EnrolmentService, make_invite
from lichen.coordinator.fleet import FleetServer
from lichen.coordinator.grid import GrpcGrid
from lichen.coordinator.models import ModelService
from lichen.coordinator.run_directory import ServerState
from lichen.coordinator.store import Store

LICHEN = str(Path(sys.executable).with_name("lichen"))
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.2}
GENEROUS = "privacy: {max_epsilon: 100, max_delta: 1.0e-4}\n"  # so that many tests can spend on one node
ALLOW = "unnoised_updates_to_coordinator: allow\n"
RUN = 77
IDLE_MB = 90


@dataclass
class Federation:
    """A coordinator's listeners on a loop of their own, and the homes of its nodes."""

    directory: Path
    authority: Authority
    store: Store
    fleet: FleetServer
    loop: asyncio.AbstractEventLoop
    address: str = ""
    enrolment: str = ""
    runs: int = 0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def grid(self) -> GrpcGrid:
        self.runs += 1
        return self.fleet.grid(self.runs)

    def node(self, name: str, rows: list[dict[str, str]], *, now: float | None = None) -> Path:
        """An enrolled home with data, as `join` and `data add` leave it; ``now`` is when its certificate was made."""
        home = self.directory / name
        key = make_key()
        certificate = self.authority.sign_csr(make_csr(key, name), name, "node", now=now)
        self.store.add_node(name, fingerprint(certificate))
        write_private(home / AUTHORITY_FILE, self.authority.ca_pem)
        write_private(home / IDENTITY_FILE, key + certificate)
        (home / NODE_FILE).write_text(f"format: 1\nname: {name}\ncoordinator: {self.address}\nenrolment: {self.enrolment}\n")
        add_source(home, write_rows(self.directory / f"{name}.jsonl", rows), fields={"text": "text", "label": "label"}, declared_size=32)
        return home


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("federation")
    authority = Authority.create(directory / "coordinator" / "pki")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    store = Store(directory / "coordinator" / "store.sqlite")
    fleet = FleetServer(store, Spool(directory / "coordinator" / "spool"))
    service = EnrolmentService(store, authority)
    models = ModelService(store, directory / "coordinator" / "runs")
    key, certificate = authority.issue_server(["127.0.0.1"])
    found = Federation(directory, authority, store, fleet, loop)

    async def start() -> None:
        found.enrolment = f"127.0.0.1:{await service.start('127.0.0.1:0', key, certificate)}"
        handlers = (service.renewal_handler(), models.handler())
        found.address = f"127.0.0.1:{await fleet.start('127.0.0.1:0', key, certificate, authority.ca_pem, *handlers)}"

    async def stop() -> None:
        await service.stop()
        await fleet.stop(0)

    found.do(start())
    yield found
    found.do(stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    store.close()


def lichen(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """A `lichen client` command, in this process because a new one takes a second."""
    out, error = io.StringIO(), io.StringIO()
    command = ["lichen", "client", *map(str, arguments), "--home", str(home)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            main()
    return subprocess.CompletedProcess(command, int(left.value.code or 0), out.getvalue(), error.getvalue())


def start(home: Path) -> psutil.Popen:
    return psutil.Popen([LICHEN, "client", "run", "--home", str(home)])


def end(process: psutil.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """Wait for it; seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def connected(federation: Federation, name: str) -> bool:
    return any(node.name == name for node in federation.fleet.connected())


@pytest.fixture(scope="module")
def clinic(federation: Federation, tiny_rows: Callable[..., list[dict[str, str]]]) -> Iterator[tuple[Path, psutil.Popen]]:
    """An agent that most tests share."""
    home = federation.node("clinic", tiny_rows(40))
    (home / "policy.yaml").write_text(GENEROUS)
    process = start(home)
    try:
        until(lambda: connected(federation, "clinic"))
        yield home, process
    finally:
        end(process)


@pytest.fixture
def private_plan(tiny_plan: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_plan, "privacy": PRIVATE}


@pytest.fixture
def endless_plan(private_plan: dict[str, Any]) -> dict[str, Any]:
    """Some seconds of steps."""
    return {
        **private_plan,
        "cohort": {"size": 2, "deadline_s": 200},
        "privacy": {**PRIVATE, "sample_rate": 0.01},
        "local": {**private_plan["local"], "steps": 1000},
    }


def assign(federation: Federation, grid: GrpcGrid, name: str, plan: Plan, round: int = 1) -> str:
    """Send one node a round's work; the message's id."""
    node = federation.store.node_by_name(name)
    assert node is not None
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, workbench(plan)[1].state(), federation.fleet.spool.directory)
    return grid.push_messages([grid.create_message(content, records.TRAIN, node.node_id, str(round))])[0]


def answer(grid: GrpcGrid, message_id: str, seconds: float = 60.0) -> Message:
    replies = list(grid.replies([message_id], timeout=seconds))
    assert len(replies) == 1, "no answer in time"
    return replies[0]


def ask(federation: Federation, name: str, plan: Plan) -> Message:
    """One node's answer to the first round of a run of its own."""
    grid = federation.grid()
    return answer(grid, assign(federation, grid, name, plan))


def children(process: psutil.Popen) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children())


def test_policy_refuses_before_anything_is_loaded(
    federation: Federation, clinic: tuple[Path, psutil.Popen], tiny_plan: dict[str, Any]
) -> None:
    home, process = clinic
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert not any(library in maps for library in ("libtorch", "libarrow", "site-packages/scipy"))
    memory = process.memory_info().rss / 1e6
    print(f"idle agent: {memory:.1f} MB")
    assert memory <= IDLE_MB
    grid = federation.grid()
    reply = answer(grid, assign(federation, grid, "clinic", parse_plan(tiny_plan)))
    assert reply.error.code == Code.POLICY_REFUSED
    assert "unnoised_updates_to_coordinator" in (reply.error.reason or "")
    assert children(process) == []
    assert read_status(home).worker_pid is None
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_private_refusal_is_a_number_only(
    federation: Federation, clinic: tuple[Path, psutil.Popen], private_plan: dict[str, Any]
) -> None:
    home, process = clinic
    grid = federation.grid()
    asks_too_much = parse_plan({**private_plan, "privacy": {**PRIVATE, "epsilon": 101.0}})
    reply = answer(grid, assign(federation, grid, "clinic", asks_too_much))
    assert reply.error.code == Code.POLICY_REFUSED
    assert not reply.error.reason
    assert "epsilon" in (read_status(home).last_error or "")
    assert children(process) == []


def test_base_models_by_their_weights(federation: Federation, clinic: tuple[Path, psutil.Popen], private_plan: dict[str, Any]) -> None:
    home, _ = clinic
    plan = parse_plan(private_plan)
    (home / "policy.yaml").write_text(GENEROUS + f"models: ['sha256:{'0' * 64}']\n")
    try:
        grid = federation.grid()
        assert answer(grid, assign(federation, grid, "clinic", plan)).error.code == Code.POLICY_REFUSED
        (home / "policy.yaml").write_text(GENEROUS + f"models: ['sha256:{weights_sha256(plan.model.base)}']\n")
        assert not answer(grid, assign(federation, grid, "clinic", plan, 2)).has_error()
    finally:
        (home / "policy.yaml").write_text(GENEROUS)


def test_a_paused_node_stays_connected_and_takes_no_work(
    federation: Federation, clinic: tuple[Path, psutil.Popen], private_plan: dict[str, Any]
) -> None:
    home, _ = clinic
    grid = federation.grid()
    plan = parse_plan(private_plan)
    assert lichen("pause", home=home).returncode == 0
    assert read_status(home).state == "paused"
    reply = answer(grid, assign(federation, grid, "clinic", plan))
    assert reply.error.code == Code.AGENT_PAUSED
    assert not reply.error.reason
    assert connected(federation, "clinic")
    assert lichen("pause", "--resume", home=home).returncode == 0
    assert not answer(grid, assign(federation, grid, "clinic", plan, 2)).has_error()


def test_a_plan_waits_for_a_person(federation: Federation, clinic: tuple[Path, psutil.Popen], private_plan: dict[str, Any]) -> None:
    home, _ = clinic
    (home / "policy.yaml").write_text(GENEROUS + "approval: ask\n")
    try:
        grid = federation.grid()
        plan = parse_plan({**private_plan, "name": "waits"})
        first = assign(federation, grid, "clinic", plan)
        until(lambda: read_status(home).state == "waiting")
        told = json.loads(lichen("pending", "--json", home=home).stdout)
        assert [(item["name"], item["sha256"]) for item in told] == [("waits", plan.sha256())]
        assert grid.pull_messages([first]) == []
        assert lichen("approve", plan.sha256()[:12], home=home).returncode == 0
        assert not answer(grid, first).has_error()
        rejected = parse_plan({**private_plan, "name": "rejected"})
        second = assign(federation, grid, "clinic", rejected, 2)
        until(lambda: read_status(home).state == "waiting")
        assert lichen("reject", rejected.sha256(), home=home).returncode == 0
        assert answer(grid, second).error.code == Code.POLICY_REFUSED
        hasty = parse_plan({**private_plan, "name": "hasty", "rounds": 3, "cohort": {"deadline_s": 1.0}})
        reply = answer(grid, assign(federation, grid, "clinic", hasty, 3))
        assert reply.error.code == Code.POLICY_APPROVAL
        assert not reply.error.reason
    finally:
        (home / "policy.yaml").write_text(GENEROUS)


def test_the_text_of_an_error_does_not_leave_under_privacy(
    federation: Federation, clinic: tuple[Path, psutil.Popen], tiny_plan: dict[str, Any], private_plan: dict[str, Any]
) -> None:
    home, _ = clinic
    task = {"labels": ["crop", "metal", "money"], "max_length": 32, "label_field": "money"}  # which no source has
    (home / "policy.yaml").write_text(GENEROUS + ALLOW)
    try:
        grid = federation.grid()
        plain = answer(grid, assign(federation, grid, "clinic", parse_plan({**tiny_plan, "task": task})))
        private = answer(grid, assign(federation, grid, "clinic", parse_plan({**private_plan, "task": task}), 2))
    finally:
        (home / "policy.yaml").write_text(GENEROUS)
    assert plain.error.code == private.error.code == Code.DATA_FIELD
    assert "money" in (plain.error.reason or "")
    assert not private.error.reason
    assert b"money" not in (federation.store.reply(private.metadata.reply_to_message_id) or b"money")


def test_a_model_is_fetched_whole_once_and_then_what_was_added(
    federation: Federation, clinic: tuple[Path, psutil.Popen], private_plan: dict[str, Any]
) -> None:
    home, _ = clinic
    plan = parse_plan({**private_plan, "rounds": 6})
    grid, spool = federation.grid(), federation.fleet.spool.directory
    downlink = Downlink(downlink_codec(plan.transfer.downlink), spool)
    start = {name: tensor + 0.001 for name, tensor in workbench(plan).start.items()}  # which this node has not had yet
    state = ServerState(0, start, {}, {})
    sent: list[int] = []
    foretold: list[int] = []

    def round(number: int) -> str:
        before = federation.fleet.traffic()[0]
        assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=number)
        content = RecordDict({"assignment": records.to_config(assignment), "payload": downlink.arrays(state)})
        records.put_chain(content, state.chain)
        foretold.append(downlink.bytes_for("clinic", content, state))
        node = federation.store.node_by_name("clinic")
        assert node is not None
        reply = answer(grid, grid.push_messages([grid.create_message(content, records.TRAIN, node.node_id, str(number))])[0])
        assert not reply.has_error(), reply.error
        downlink.arrived("clinic", state)
        update = records.get_update(reply.content, spool, uplink_codec(plan.transfer.uplink), state.model).decoded(Layout.of(state.model))
        state.model = downlink.add(update, state)
        sent.append(federation.fleet.traffic()[0] - before)
        return records.payload_refs(reply)[0].digest

    for number in (1, 2, 3):
        round(number)
    envelope = sent[0] - foretold[0]
    assert foretold[1] < foretold[0] / 2, "of so small a model names and padding are much"
    for number in (1, 2):
        assert foretold[number] <= sent[number] - envelope <= foretold[number] + 2000, "the bytes that are told are those that are sent"
    models = [ref for ref in (home / "spool").iterdir() if ref.stat().st_size == foretold[0]]
    for model in models:
        model.write_bytes(bytes(foretold[0]))
    round(4)
    assert sent[3] - envelope >= foretold[0] + foretold[3], "what was here led nowhere: the model was fetched whole"
    for file in (home / "spool").iterdir():
        file.unlink()
    round(5)
    assert foretold[0] <= sent[4] - envelope < foretold[0] + 2000, "a node that lost what it had fetches the model whole at once"
    round(6)
    assert sent[5] - envelope < foretold[5] + 2000


def test_the_deadline_ends_the_worker_and_not_the_agent(
    federation: Federation, clinic: tuple[Path, psutil.Popen], endless_plan: dict[str, Any], private_plan: dict[str, Any]
) -> None:
    home, process = clinic
    grid = federation.grid()
    hasty = parse_plan({**endless_plan, "cohort": {"deadline_s": 1.0}})
    assert answer(grid, assign(federation, grid, "clinic", hasty)).error.code == Code.WORKER_DEADLINE
    assert children(process) == []
    assert connected(federation, "clinic")
    assert read_status(home).state == "idle"


def test_an_agent_that_will_not_be_done_in_time_sends_what_it_has(
    federation: Federation, clinic: tuple[Path, psutil.Popen], tiny_plan: dict[str, Any]
) -> None:
    home, process = clinic
    (home / "policy.yaml").write_text(GENEROUS + ALLOW)
    try:
        local = {**tiny_plan["local"], "steps": 10**6, "partial": True}
        plan = parse_plan({**tiny_plan, "local": local, "cohort": {"size": 1, "deadline_s": 20.0}})
        grid, node = federation.grid(), federation.store.node_by_name("clinic")
        assert node is not None
        steps = []
        for round, seconds in enumerate((14.0, 5.0), 1):
            assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round, seconds=seconds)
            content = RecordDict({"assignment": records.to_config(assignment)})
            records.put_tensors(content, workbench(plan)[1].state(), federation.fleet.spool.directory)
            (message_id,) = grid.push_messages([grid.create_message(content, records.TRAIN, node.node_id, str(round))])
            began = time.monotonic()
            reply = answer(grid, message_id)
            assert not reply.has_error(), reply.error
            steps.append(records.from_config(records.TrainReport, reply.content.config_records["report"]).steps)
            assert time.monotonic() - began < seconds + 1, "but for what a busy machine takes to look"
    finally:
        (home / "policy.yaml").write_text(GENEROUS)
    assert all(1 <= done < 10**6 for done in steps)
    assert len(children(process)) == 1, "the worker, and with it the model, is kept"


def test_one_agent_a_home_and_one_home_for_the_same_data(federation: Federation, clinic: tuple[Path, psutil.Popen]) -> None:
    home, _ = clinic
    again = lichen("run", home=home)
    assert again.returncode == Code.AGENT_IN_USE, again.stderr
    assert lichen("leave", "--yes", home=home).returncode == Code.AGENT_IN_USE
    other = federation.node("twin", [{"text": f"a{number}", "label": "crop"} for number in range(20)])
    # a folder that holds the first one's file
    add_source(other, federation.directory / "clinic.jsonl", fields={"text": "text", "label": "label"})
    assert lichen("run", home=other).returncode == Code.AGENT_IN_USE
    assert connected(federation, "clinic")


def test_it_renews_its_certificate_by_itself(federation: Federation, tiny_rows: Callable[..., list[dict[str, str]]]) -> None:
    home = federation.node("old", tiny_rows(20), now=time.time() - 80 * 86400)
    before = (home / IDENTITY_FILE).read_bytes()
    process = start(home)
    try:
        until(lambda: (home / IDENTITY_FILE).read_bytes() != before)
        until(lambda: connected(federation, "old"))
    finally:
        end(process)


def test_killed_in_mid_round_it_rejoins_and_trains_once(
    federation: Federation, tiny_rows: Callable[..., list[dict[str, str]]], endless_plan: dict[str, Any]
) -> None:
    home = federation.node("mortal", tiny_rows(40))
    grid = federation.grid()
    process = start(home)
    try:
        until(lambda: connected(federation, "mortal"))
        message_id = assign(federation, grid, "mortal", parse_plan(endless_plan))
        until(lambda: reservations(home))
        (worker,) = children(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not worker.is_running(), 5.0)
        assert read_status(home).state == "stopped"
        until(lambda: not connected(federation, "mortal"))
        assert grid.pull_messages([message_id]) == []
        process = start(home)
        seconds = until(lambda: connected(federation, "mortal"))
        print(f"rejoined after {seconds:.2f} s")
        assert seconds < 5.0
        assert not answer(grid, message_id, 120).has_error()
        assert reservations(home) == [message_id]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        end(process)


def test_a_ledger_that_was_restored_or_deleted_refuses_until_it_is_written_off(
    federation: Federation, tiny_rows: Callable[..., list[dict[str, str]]], tiny_plan: dict[str, Any], private_plan: dict[str, Any]
) -> None:
    home = federation.node("forgetful", tiny_rows(40))
    (home / "policy.yaml").write_text(GENEROUS)
    plan = parse_plan({**private_plan, "local": {**private_plan["local"], "steps": 1}})
    node = federation.store.node_by_name("forgetful")
    assert node is not None
    process = start(home)
    try:
        until(lambda: connected(federation, "forgetful"))
        assert federation.store.ledger_of(node.node_id) is None
        assert not ask(federation, "forgetful", plan).has_error()
        kept = federation.store.ledger_of(node.node_id)
        with Ledger(home) as ledger:
            head = ledger._book.head
        assert kept is not None
        assert kept[0] == 1
        assert kept[1] != head  # salted: the coordinator can't tell what is in the ledger
        assert ask(federation, "forgetful", parse_plan(tiny_plan)).error.code == Code.POLICY_REFUSED
        assert federation.store.ledger_of(node.node_id) == kept, "a plan without privacy makes no ledger longer"
        older = (home / "ledger.sqlite").read_bytes()
        assert not ask(federation, "forgetful", plan).has_error()
        for replaced in (older, None):
            end(process)
            for path in home.glob("ledger.sqlite*"):
                path.unlink()
            if replaced:
                (home / "ledger.sqlite").write_bytes(replaced)
            process = start(home)
            until(lambda: connected(federation, "forgetful"))
            reply = ask(federation, "forgetful", plan)
            assert (reply.error.code, reply.error.reason or "") == (Code.LEDGER_BEHIND, "")
        assert "ledger-behind" in (read_status(home).last_error or "")
        assert "written off" in lichen("ledger", "--write-off", "--yes", home=home).stdout
        reply = ask(federation, "forgetful", plan)
        assert reply.error.code == Code.PRIVACY_BUDGET  # these records are spent
        write_rows(federation.directory / "forgetful.jsonl", [*tiny_rows(40), *tiny_rows(40, seed=9)])
        assert not ask(federation, "forgetful", plan).has_error()
        newest = federation.store.ledger_of(node.node_id)
        assert newest is not None
        assert newest[0] > kept[0]
    finally:
        end(process)


def reservations(home: Path) -> list[str]:
    if not (home / "ledger.sqlite").exists():
        return []
    with Ledger(home) as ledger:
        return [entry.message_id for entry in ledger.entries()]


def finished_run(federation: Federation, plan: Plan) -> None:
    """A run directory as the coordinator leaves it, of a model that always says the second label."""
    directory = federation.directory / "coordinator" / "runs" / str(RUN)
    task, model, start = workbench(plan)
    bias = next(name for name in model.head if name.endswith("bias"))
    model.load({**start, bias: torch.tensor([0.0, 9.0, 0.0])})
    save_model(directory / "model", plan, model, task.tokenizer, Statement(private=False, summary=""))
    (directory / "plan.yaml").write_text(plan.to_yaml())
    federation.store.add_run(RUN, plan.canonical_json(), str(RUN))
    federation.store.set_run_status(RUN, "finished")


def test_a_node_from_its_invite_to_its_leave(
    federation: Federation, tmp_path: Path, tiny_rows: Callable[..., list[dict[str, str]]], private_plan: dict[str, Any]
) -> None:
    home = tmp_path / "ward"
    # Which rows are held out is the node's secret: with so many, neither the size nor the scores below hang on the draw.
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows(90))
    invite = make_invite(federation.store, federation.authority, "ward", federation.address, federation.enrolment)
    assert lichen("run", home=home).returncode == Code.AGENT_HOME_MISSING
    assert "ward" in lichen("join", invite, home=home).stdout
    fields = ("--field", "text=text", "--field", "label=label", "--holdout", "0.3")
    told = lichen("data", "add", rows, *fields, home=home)
    assert "--declared-size 64" in told.stdout, told.stderr
    assert lichen("data", "add", rows, *fields, "--declared-size", "64", home=home).returncode == 0
    process = start(home)
    try:
        until(lambda: connected(federation, "ward"))
        grid = federation.grid()
        plan = parse_plan(private_plan)
        reply = answer(grid, assign(federation, grid, "ward", plan))
        report = records.from_config(records.TrainReport, reply.content.config_records["report"])
        assert (report.client, report.declared_size, report.train_loss, report.examples) == ("ward", 64, None, None)
        until(lambda: read_status(home).state == "idle")
        status = json.loads(lichen("status", "--json", home=home).stdout)
        assert (status["connected"], status["round"], status["name"]) == (True, 1, "ward")
        assert status["worker_pid"] == children(process)[0].pid
        book = json.loads(lichen("ledger", "--json", home=home).stdout)
        assert book["runs"][0]["steps"] == report.steps
        assert book["splits"][0]["left"] == pytest.approx(8.0 - book["splits"][0]["epsilon"])
        assert 0 < book["splits"][0]["epsilon"] < 8
        finished_run(federation, plan)
        fetched = json.loads(lichen("model", "--json", home=home).stdout)
        assert [item["model"] for item in fetched["scores"]] == [f"run {RUN}", "start"]
        assert fetched["scores"][0]["metrics"]["loss"] > fetched["scores"][1]["metrics"]["loss"]
        assert (Path(fetched["model"]) / "adapter_model.safetensors").exists()
        process.send_signal(signal.SIGTERM)
        worker = children(process)[0]
        assert process.wait(10) == 0
        assert not worker.is_running()
    finally:
        end(process)
    assert lichen("leave", "--yes", home=home).returncode == 0
    assert lichen("run", home=home).returncode == Code.AGENT_HOME_MISSING
    assert (home / "ledger.sqlite").exists()
    assert (home / "data.yaml").exists()
    assert sorted(os.listdir(home / "pki")) == ["ledger.key", "ledger.state"]
