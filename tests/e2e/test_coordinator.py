"""The coordinator as a real process, driven by its commands, with agents over mutual TLS: runs, failures, SIGKILL and what follows."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from lichen.client.app import app as client_app
from lichen.client.connection import Connection, Credentials, Status
from lichen.client.data import add_source
from lichen.client.enrolment import Identity, join
from lichen.client.fetch import fetch_model
from lichen.client.ledger import Ledger
from lichen.client.mailbox import Mailbox
from lichen.common.channel.refusal import explain
from lichen.common.channel.spool import Spool
from lichen.common.cli import main
from lichen.common.errors import Code, LichenError
from lichen.common.records import PREPARE
from lichen.common.result import read_result
from lichen.coordinator.admin import make_request
from lichen.coordinator.home import Home
from lichen.coordinator.operations import Operations
from lichen.coordinator.operators import METHOD, ask_remote
from lichen.coordinator.store import Store

LICHEN = (sys.executable, "-c", "from lichen.common.cli import main; main()")
TRAINING = threading.Lock()  # the client app keeps one model a process, and here two agents share one
Rows = Callable[..., list[dict[str, str]]]


def lichen(*arguments: object, code: int = 0) -> str:
    """A `lichen coordinator` command, in this process because a new one takes a second; returns what it printed."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["lichen", "coordinator", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == code, (arguments, left.value.code, out.getvalue(), error.getvalue())
    return out.getvalue() if code == 0 else out.getvalue() + error.getvalue()


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)
    return found


def key(message: Message) -> tuple[int, str, str]:
    return message.metadata.run_id, message.metadata.group_id, message.metadata.message_type


class Agent:
    """A small agent in a thread of this process: the real connection, mailbox and client app."""

    def __init__(self, home: Path, invite: str, rows: list[dict[str, str]]) -> None:
        self.home = home
        self.identity: Identity = join(invite, home)
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        add_source(home, home / "rows.jsonl", fields={"text": "text", "label": "label"})
        (home / "policy.yaml").write_text("format: 1\nunnoised_updates_to_coordinator: allow\n", encoding="utf-8")
        self.trained: Counter[tuple[int, str, str]] = Counter()  # by run, round and kind of message
        self.hold = threading.Event()
        self.hold_round: str | None = None
        self.held = threading.Event()
        self.error: LichenError | None = None
        self.statuses: list[Status] = []
        self.refused: list[str] = []  # groups of the answers that came too late
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._started.wait(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.spool = Spool(self.home / "spool")
        credentials = Credentials(self.identity.ca_pem, self.identity.key_pem, self.identity.certificate_pem)
        mailbox = Mailbox(self.home / "agent.sqlite")
        self.connection = Connection(
            self.identity.coordinator,
            lambda: credentials,
            mailbox,
            self.spool,
            on_status=self.statuses.append,
            on_refused=lambda message: self.refused.append(message.metadata.group_id),
        )
        self._started.set()
        try:
            await self.connection.run(lambda message: asyncio.to_thread(self._handle, message))
        except LichenError as error:
            self.error = error
        mailbox.close()

    def _handle(self, message: Message) -> Message:
        works = message.metadata.message_type != PREPARE
        while works and (self.hold.is_set() or message.metadata.group_id == self.hold_round):
            self.held.set()
            time.sleep(0.01)
        config: dict[str, Any] = {"home": str(self.home), "name": self.identity.name, "spool": str(self.spool.directory)}
        context = Context(message.metadata.run_id, message.metadata.dst_node_id, config, RecordDict(), {})
        if works:
            self.trained[key(message)] += 1
        with TRAINING:
            return client_app(message, context)

    def connected(self) -> bool:
        return bool(self.statuses) and self.statuses[-1].state == "connected"

    def stop(self) -> None:
        self.hold.clear()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.connection.stop)
            self._thread.join(20)


class Service:
    """`lichen coordinator serve`, that can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.log = (self.home.parent / "stderr.txt").open("a")
        self.process = subprocess.Popen(
            [*LICHEN, "coordinator", "serve", "--home", str(self.home)], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: fleet 127.0.0.1:"), (line, (self.home.parent / "stderr.txt").read_text())

    def end(self, number: int) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.process.stdout.close()
        self.log.close()
        return status

    def run(self, run: str) -> dict[str, Any]:
        home = Home(self.home)  # as the command does, without a process for each look
        with closing(home.open_store()) as store:
            return Operations(home, store, None).run(run)

    def until(self, run: str, status: str) -> dict[str, Any]:
        return wait_for(lambda: found if (found := self.run(run))["status"] == status else None)

    def join(self, name: str, rows: list[dict[str, str]]) -> Agent:
        agent = Agent(self.home.parent / name, lichen("invite", name, "--home", self.home), rows)
        wait_for(agent.connected)
        return agent

    def submit(self, plan: dict[str, Any], *more: object) -> str:
        file = self.home.parent / f"plan-{time.monotonic_ns()}.yaml"
        file.write_text(yaml.safe_dump(plan), encoding="utf-8")
        return lichen("submit", file, "--home", self.home, *more).split()[0]

    def rounds(self, run: str) -> int:
        file = self.home / "runs" / run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def model(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.home / "runs" / run / "model" / "adapter_model.safetensors")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def coordinator(directory: Path) -> Iterator[Service]:
    """A served home at ports that stay the same when it is started again."""
    home = directory / "coordinator"
    lichen("init", "--home", home, "--host", "127.0.0.1", "--fleet-port", free_port(), "--enrol-port", free_port())
    service = Service(home)
    service.start()
    try:
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with coordinator(tmp_path_factory.mktemp("service")) as found:
        yield found


@pytest.fixture(scope="module")
def agents(service: Service, tiny_rows: Rows) -> Iterator[dict[str, Agent]]:
    found = {name: service.join(name, tiny_rows(40, seed)) for seed, name in enumerate(("clinic-a", "clinic-b"), 1)}
    yield found
    for agent in found.values():
        agent.stop()


@pytest.fixture
def validation(tmp_path: Path, tiny_rows: Rows) -> Path:
    file = tmp_path / "dev.csv"
    file.write_text("body,topic\n" + "".join(f"{row['text']},{row['label']}\n" for row in tiny_rows(30, 9)), encoding="utf-8")
    return file


def test_a_run_from_submission_to_the_fetched_model(
    service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any], validation: Path, tmp_path: Path
) -> None:
    fields = ("--validation", validation, "--test", validation, "--field", "text=body", "--field", "label=topic")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_plan), encoding="utf-8")
    shown = lichen("submit", file, "--home", service.home, *fields, "--set", "seed=3", "--wait").splitlines()
    run = shown[0]
    assert [line.split(",")[0] for line in shown[1:3]] == ["round 1/2", "round 2/2"]
    assert "macro-F1" in shown[1]
    assert shown[3].startswith("finished: test accuracy 0.")
    directory = service.home / "runs" / run
    result = read_result(directory)
    assert (result.status, result.engine, len(result.rounds), result.seed) == ("finished", "deployed", 2, 3)
    assert result.rounds[0].participants == 2
    assert service.run(run)["status"] == "finished"
    assert lichen("watch", run[:6], "--home", service.home).splitlines()[:2] == shown[1:3]

    # what the run's messages held was let go of, and nothing here is for other users
    with closing(Store(service.home / "store.sqlite")) as store:
        assert store.unreleased(int(run)) == []
    assert len(list((service.home / "spool").iterdir())) <= 1  # the final model, which nobody was sent
    assert {path.name for path in service.home.rglob("*.sqlite*") if path.stat().st_mode & 0o077} == set()

    lichen("export", "latest", "--home", service.home, "--out", tmp_path / "peft")
    lichen("export", run, "--home", service.home, "--out", tmp_path / "merged", "--format", "merged")
    lichen("export", run, "--home", service.home, "--out", tmp_path / "merged", code=Code.OUTPUT_EXISTS)
    same_scores(tmp_path / "peft", tmp_path / "merged")
    assert "AutoModelForTokenClassification" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")

    identity = agents["clinic-a"].identity
    models = tmp_path / "models"
    seen: list[tuple[int, int]] = []
    fetched = fetch_model(identity, models, progress=lambda here, all: seen.append((here, all)))
    assert fetched.run_id == int(run)
    assert (fetched.model / "adapter_model.safetensors").read_bytes() == (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    assert seen[-1][0] == seen[-1][1]
    seen.clear()
    assert fetch_model(identity, models, int(run), progress=lambda here, all: seen.append((here, all))) == fetched
    assert not seen  # it was there

    # a broken transfer goes on where it ended
    archive = (directory / "model.tar").read_bytes()
    part = tmp_path / "again" / f"{(fetched.directory / 'digest').read_text()}.part"
    part.parent.mkdir()
    part.write_bytes(archive[:5000])
    fetch_model(identity, part.parent, progress=lambda here, all: seen.append((here, all)))
    assert seen[0][0] > 5000
    assert sorted(path.name for path in part.parent.iterdir()) == [run]
    with pytest.raises(LichenError) as caught:
        fetch_model(identity, models, 12345)
    assert caught.value.code is Code.RUN_UNKNOWN


def same_scores(adapter: Path, merged: Path) -> None:
    from peft import AutoPeftModelForTokenClassification
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    batch = tokenizer(["wheat and corn today", "the bank said"], padding=True, return_tensors="pt")
    plain = AutoModelForTokenClassification.from_pretrained(merged).eval()
    tuned = AutoPeftModelForTokenClassification.from_pretrained(adapter, num_labels=3).eval()
    assert plain.config.id2label == {0: "crop", 1: "metal", 2: "money"}
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, tuned(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_run_is_stopped_and_the_next_one_begins(service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any]) -> None:
    long = service.submit(tiny_plan | {"rounds": 500})
    queued = service.submit(tiny_plan | {"rounds": 1})
    waiting = service.submit(tiny_plan | {"rounds": 1})
    wait_for(lambda: service.rounds(long) > 0)
    agents["clinic-b"].hold.set()
    agents["clinic-b"].held.clear()
    wait_for(agents["clinic-b"].held.is_set)  # the coordinator waits for this one now
    lichen("stop", waiting, "--home", service.home)
    began = time.monotonic()
    assert json.loads(lichen("stop", long, "--home", service.home, "--json"))["status"] == "stopped"
    assert time.monotonic() - began < 8
    agents["clinic-b"].hold.clear()
    assert read_result(service.home / "runs" / long).status == "stopped"
    assert list((service.home / "runs" / long / "checkpoints").glob("round-*.safetensors"))
    service.until(queued, "finished")
    assert service.run(waiting)["status"] == "stopped"
    assert service.rounds(waiting) == 0
    lichen("export", long, "--home", service.home, "--out", service.home.parent / "none", code=Code.NO_MODEL)


def test_a_cohort_that_cannot_be_had_fails_the_run_and_not_the_service(
    service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_plan | {"cohort": {"size": 3, "minimum": 3, "deadline_s": 0.5}}), encoding="utf-8")
    shown = lichen("submit", file, "--home", service.home, "--wait", code=Code.COHORT_TOO_SMALL)
    assert "2 nodes are connected, cohort.minimum is 3" in shown
    failed = json.loads(lichen("runs", "--home", service.home, "--json"))[-1]
    assert (failed["status"], "cohort-too-small" in failed["error"]) == ("failed", True)
    assert lichen("nodes", "--home", service.home).splitlines()[1].startswith("clinic-a\tconnected\t2")


def test_refusals(service: Service, tiny_plan: dict[str, Any], validation: Path, tmp_path: Path) -> None:
    home = ("--home", service.home)
    before = lichen("runs", *home, "--json"), sorted((service.home / "runs").iterdir())
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(tiny_plan), encoding="utf-8")
    bad.write_text(yaml.safe_dump(tiny_plan | {"round": 3}), encoding="utf-8")
    lichen("submit", bad, *home, code=Code.PLAN_INVALID)
    lichen("submit", tmp_path / "none.yaml", *home, code=Code.PLAN_UNREADABLE)
    lichen("submit", good, *home, "--set", "model.base=/no/such/model", code=Code.MODEL_NOT_FOUND)
    assert "there are body, topic" in lichen("submit", good, *home, "--validation", validation, code=Code.DATA_FIELD)
    swapped = ("--field", "text=topic", "--field", "label=body")
    lichen("submit", good, *home, "--test", validation, *swapped, code=Code.DATA_LABEL)
    lichen("submit", good, *home, "--test", tmp_path / "none.csv", code=Code.DATA_NOT_FOUND)
    lichen("watch", "99999", *home, code=Code.RUN_UNKNOWN)
    lichen("stop", "99999", *home, code=Code.RUN_UNKNOWN)
    lichen("revoke", "nobody", *home, code=Code.NODE_UNKNOWN)
    second = subprocess.run([*LICHEN, "coordinator", "serve", *map(str, home)], capture_output=True, text=True, timeout=60, check=False)
    assert (second.returncode, second.stdout) == (Code.HOME_IN_USE, "")
    lichen("init", *home, code=Code.OUTPUT_EXISTS)
    lichen("nodes", "--home", tmp_path / "nowhere", code=Code.HOME_MISSING)
    assert (lichen("runs", *home, "--json"), sorted((service.home / "runs").iterdir())) == before


def test_a_revoked_node_is_cut_off_at_once(service: Service, agents: dict[str, Agent], tiny_rows: Rows) -> None:
    agent = service.join("clinic-c", tiny_rows(10, 5))
    lichen("invite", "clinic-c", "--home", service.home, code=Code.NAME_TAKEN)
    lichen("revoke", "clinic-c", "--home", service.home)
    wait_for(lambda: agent.error, 5)
    assert agent.error is not None
    assert agent.error.code is Code.CERTIFICATE_REVOKED
    node = next(node for node in json.loads(lichen("nodes", "--home", service.home, "--json")) if node["name"] == "clinic-c")
    assert (node["active"], node["connected"]) == (False, False)
    with pytest.raises(LichenError) as caught:
        fetch_model(agent.identity, agent.home / "models")
    assert caught.value.code is Code.CERTIFICATE_REVOKED


def test_an_operator_on_another_machine(service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any], tmp_path: Path) -> None:
    ann, here = ("--operator", tmp_path / "ann"), ("--home", service.home)
    lichen("nodes", *ann, code=Code.CERTIFICATE_MISSING)
    (tmp_path / "ann.csr").write_text(lichen("operator", "request", "ann", "--dir", ann[1]))
    (tmp_path / "ann.json").write_text(lichen("operator", "add", tmp_path / "ann.csr", *here))
    lichen("operator", "request", "bob", "--dir", tmp_path / "bob")
    lichen("operator", "accept", tmp_path / "ann.json", "--dir", tmp_path / "bob", code=Code.CERTIFICATE_INVALID)  # not to bob's key
    lichen("operator", "add", tmp_path / "ann.json", *here, code=Code.CERTIFICATE_INVALID)
    lichen("operator", "accept", tmp_path / "ann.json", "--dir", ann[1])
    assert {stat.S_IMODE(file.stat().st_mode) for file in ann[1].iterdir()} == {0o600}

    assert lichen("nodes", *ann).splitlines()[1].startswith("clinic-a\tconnected\t")
    assert lichen("invite", "clinic-d", *ann).startswith("lichen1.")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_plan | {"rounds": 100}), encoding="utf-8")
    run = lichen("submit", file, *ann).strip()
    service.until(run, "running")
    assert f"{run}\ttiny\trunning\t" in lichen("runs", *ann)
    assert json.loads(lichen("stop", run, *ann, "--json"))["status"] == "stopped"
    lichen("stop", "99999", *ann, code=Code.RUN_UNKNOWN)

    # nothing that reads or writes a file of the coordinator's machine, or makes operators
    lichen("submit", file, *ann, "--validation", file, code=2)
    for call, arguments, code in (
        ("submit", {"plan": tiny_plan, "validation": "/etc/passwd"}, Code.INTERNAL),
        ("backup", {"file": "/tmp/none"}, Code.FRAME_INVALID),
        ("add_operator", {"request": (tmp_path / "ann.csr").read_text()}, Code.FRAME_INVALID),
        ("revoke_operator", {"name": "ann"}, Code.FRAME_INVALID),
    ):
        with pytest.raises(LichenError) as caught:
            ask_remote(ann[1], call, arguments)
        assert caught.value.code is code

    # a node is no operator, nor an operator a node
    node = agents["clinic-a"].identity
    operator = replace(node, key_pem=(key := (ann[1] / "identity.pem").read_bytes()), certificate_pem=key[key.index(b"-----BEGIN CERT") :])
    with grpc.secure_channel(node.coordinator, node.credentials()) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(METHOD)(make_request("status", {}), timeout=10)
    assert explain(refused.value, "").code is Code.CERTIFICATE_INVALID
    with pytest.raises(LichenError) as caught:
        fetch_model(operator, tmp_path / "models")
    assert caught.value.code is Code.CERTIFICATE_INVALID

    assert "ann\tactive" in lichen("operator", "list", *here)
    lichen("operator", "revoke", "ann", *here)
    lichen("operator", "revoke", "ann", *here, code=Code.NODE_UNKNOWN)
    lichen("nodes", *ann, code=Code.CERTIFICATE_REVOKED)
    assert "ann\trevoked" in lichen("operator", "list", *here)


def test_under_client_level_privacy_the_noise_is_secret_and_each_node_pays_once(
    service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any]
) -> None:
    """Of nodes that opted in: the count of who took part is the operator's alone."""
    central = {"unit": "client", "noise": "central", "epsilon": 6.0, "delta": 1e-5, "clip": 0.5, "adaptive_clip": {}}
    policies = [agent.home / "policy.yaml" for agent in agents.values()]
    before = [policy.read_text() for policy in policies]
    for policy, text in zip(policies, before, strict=True):
        policy.write_text(text + "privacy: {require: [client]}\n")
    run = service.submit(tiny_plan | {"cohort": {"size": 2, "population": 2, "deadline_s": 60}, "privacy": central})  # both in each round
    service.until(run, "finished")
    for policy, text in zip(policies, before, strict=True):
        policy.write_text(text)
    result = read_result(service.home / "runs" / run)
    assert (result.engine, result.privacy.noise) == ("deployed", "secret")
    assert result.privacy.central is not None
    assert result.privacy.central.releases == 2
    assert 5.9 < result.privacy.central.epsilon <= 6.0
    assert [told.participants for told in result.rounds] == [None, None]
    lines = (service.home / "runs" / run / "operator.jsonl").read_text().splitlines()
    assert [json.loads(line)["participants"] for line in lines] == [2, 2]
    for agent in agents.values():
        with Ledger(agent.home) as ledger:
            assert [(entry.unit, entry.segment.steps) for entry in ledger.entries()] == [("client", 2)]
        told = subprocess.run([*LICHEN, "client", "ledger", "--home", str(agent.home)], capture_output=True, text=True, check=True)
        assert "promised by the coordinator" in told.stdout


def test_a_killed_coordinator_finishes_the_same_round(tmp_path: Path, tiny_rows: Rows, tiny_plan: dict[str, Any]) -> None:
    """One agent's reply is in the store and the other still trains when the coordinator is killed; twice."""
    with coordinator(tmp_path) as service:
        a, b = (service.join(name, tiny_rows(40, seed)) for seed, name in enumerate(("clinic-a", "clinic-b"), 1))
        plan = tiny_plan | {"rounds": 3, "evaluation": {"federated_every": 1}}
        undisturbed = service.submit(plan)
        service.until(undisturbed, "finished")

        b.hold_round = "2"
        run = service.submit(plan)
        under_way = (int(run), "2", "train")
        wait_for(lambda: b.held.is_set() and a.trained[under_way] and a.connection.mailbox.counts() == (0, 0))  # a has its receipt
        assert b.trained[under_way] == 0
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        service.start()
        wait_for(lambda: a.connected() and b.connected())
        time.sleep(0.5)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL  # while it starts the run again
        b.hold_round = None
        service.start()
        service.until(run, "finished")

        asked = {(int(item), str(n), kind): 1 for item in (undisturbed, run) for n in (1, 2, 3) for kind in ("train", "evaluate")}
        assert dict(a.trained) == dict(b.trained) == asked
        before, after = service.model(undisturbed), service.model(run)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        result = read_result(service.home / "runs" / run)
        assert [round.round for round in result.rounds] == [1, 2, 3]
        assert [round.federated for round in result.rounds] == [
            round.federated for round in read_result(service.home / "runs" / undisturbed).rounds
        ]
        assert result.status == "finished"
        for agent in (a, b):
            agent.stop()


def test_an_answer_that_comes_too_late_is_refused_and_its_owner_told(
    service: Service, agents: dict[str, Agent], tiny_plan: dict[str, Any]
) -> None:
    """Two are asked for one update: who is first ends the round, and who has begun by then goes on for nothing."""
    late, first = agents["clinic-b"], agents["clinic-a"]
    late.hold_round = "1"
    late.held.clear()
    late.refused.clear()  # of the runs before
    run = service.submit(tiny_plan | {"rounds": 2, "cohort": {"size": 1, "oversample": 2, "deadline_s": 100}})
    wait_for(late.held.is_set)
    service.until(run, "finished")
    assert first.trained[int(run), "1", "train"] == first.trained[int(run), "2", "train"] == 1
    late.hold_round = None
    wait_for(lambda: late.refused == ["1"])
    assert late.trained[int(run), "2", "train"] == 0, "what was not begun is dropped"
    result = read_result(service.home / "runs" / run)
    assert [(told.participants, told.failed, told.unneeded) for told in result.rounds] == [(1, 0, 1)] * 2
    assert "node clinic-b answered" in (service.home.parent / "stderr.txt").read_text()
    wait_for(lambda: late.connection.mailbox.unreceipted() == [])


def test_a_killed_coordinator_goes_on_with_a_buffered_run(tmp_path: Path, tiny_rows: Rows, tiny_plan: dict[str, Any]) -> None:
    """One agent trains on an old model while the other goes on; the coordinator is killed twice meanwhile."""
    with coordinator(tmp_path) as service:
        a, b = (service.join(name, tiny_rows(40, seed)) for seed, name in enumerate(("clinic-a", "clinic-b"), 1))
        b.hold_round = "1"
        a.hold_round = "4"
        cohort = {"size": 2, "minimum": 1, "mode": "buffered", "buffer": 1, "deadline_s": 120}
        privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
        for agent in (a, b):
            add_source(agent.home, agent.home / "rows.jsonl", fields={"text": "text", "label": "label"}, declared_size=40)
            (agent.home / "policy.yaml").write_text("format: 1\nprivacy: {max_epsilon: 100, max_delta: 1.0e-3}\n", encoding="utf-8")
        run = service.submit(tiny_plan | {"rounds": 8, "cohort": cohort, "privacy": privacy})
        wait_for(lambda: service.rounds(run) >= 2 and a.held.is_set() and b.held.is_set())
        service.end(signal.SIGKILL)
        service.start()
        wait_for(lambda: a.connected() and b.connected())
        a.held.clear()
        a.hold_round = "7"
        wait_for(a.held.is_set)
        service.end(signal.SIGKILL)
        b.hold_round = None
        service.start()
        service.until(run, "finished")
        a.hold_round = None
        wait_for(lambda: a.refused == ["7"])
        assert set(a.trained.values()) | set(b.trained.values()) == {1}, "each training once"
        result = read_result(service.home / "runs" / run)
        assert [(told.round, told.participants) for told in result.rounds] == [(n, 1) for n in range(1, 9)]
        assert [told.staleness for told in result.rounds] == [0] * 6 + [6, 0], "of the one that was held up"
        used = sum(client.steps for client in result.privacy.clients.values())
        assert used == 8 * tiny_plan["local"]["steps"]
        assert result.privacy.max_epsilon is not None
        assert result.privacy.max_epsilon <= 8.0
        with closing(Store(service.home / "store.sqlite")) as store:
            assert store.unreleased(int(run)) == []
        for agent in (a, b):
            agent.stop()


def test_a_run_outlives_a_full_disk_a_shutdown_and_its_machine(tmp_path: Path, tiny_rows: Rows, tiny_plan: dict[str, Any]) -> None:
    with coordinator(tmp_path) as service:
        agent = service.join("clinic-a", tiny_rows(40, 1))
        agent.hold.set()
        run = service.submit(tiny_plan | {"cohort": {"size": 1, "minimum": 1, "deadline_s": 60}})
        wait_for(agent.held.is_set)
        full = service.home / "runs" / run / "metrics.jsonl.tmp"
        full.symlink_to("/dev/full")
        agent.hold.clear()
        wait_for(lambda: service.run(run)["error"])
        paused = service.run(run)
        assert paused["status"] == "running"
        assert "Free some space" in paused["error"]
        assert "clinic-a\tconnected" in lichen("nodes", "--home", service.home)
        full.unlink()
        assert service.end(signal.SIGTERM) == 0
        lichen("submit", next(tmp_path.glob("plan-*.yaml")), "--home", service.home, code=Code.SERVICE_UNREACHABLE)
        lichen("stop", run, "--home", service.home, code=Code.SERVICE_UNREACHABLE)

        agent.hold.set()
        agent.held.clear()
        service.start()
        wait_for(agent.held.is_set)  # round 1 is done with the reply that was there; the agent has round 2
        copied = tmp_path / "backup.tar"
        made = json.loads(lichen("backup", copied, "--home", service.home, "--json"))
        assert (made["bytes"], stat.S_IMODE(copied.stat().st_mode)) == (copied.stat().st_size, 0o600)
        lichen("backup", copied, "--home", service.home, code=Code.OUTPUT_EXISTS)
        began = time.monotonic()
        assert service.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 8
        assert service.run(run)["status"] == read_result(service.home / "runs" / run).status == "running"
        agent.hold.clear()
        service.start()
        service.until(run, "finished")
        assert service.end(signal.SIGTERM) == 0

        # a new home goes on from the middle of the run, and the agent sends it the same bytes
        moved = Service(tmp_path / "moved")
        lichen("restore", copied, "--home", moved.home)
        assert not list(tmp_path.glob(".moved-*"))
        moved.start()
        moved.until(run, "finished")
        moved.end(signal.SIGTERM)
        assert moved.model(run).keys() == service.model(run).keys()
        assert all(torch.equal(tensor, service.model(run)[name]) for name, tensor in moved.model(run).items())
        assert agent.trained == {(int(run), "1", "train"): 1, (int(run), "2", "train"): 1}
        agent.stop()
