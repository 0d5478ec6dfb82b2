"""An online run of a deployed federation: files come to watched folders of real agents, and batches begin by themselves."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lichen.client.arrivals import Arrivals
from lichen.client.ledger import Ledger

Rows = Callable[..., list[dict[str, str]]]
LICHEN = (sys.executable, "-c", "from lichen.common.cli import main; main()")
NODES = ("north", "east", "south", "west")
POLICY = "format: 1\nunnoised_updates_to_coordinator: allow\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """A coordinator and four agents, each a process, in one folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, psutil.Popen] = {}
        self.lichen("coordinator", "init", "--host", "127.0.0.1", "--fleet-port", free_port(), "--enrol-port", free_port())
        self.start("coordinator", "coordinator", "serve")
        self.until(lambda: "ready" in self.log("coordinator"))

    def home(self, name: str) -> Path:
        return self.directory / name

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def lichen(self, kind: str, *words: object, home: str = "coordinator") -> str:
        command = [*LICHEN, kind, *map(str, words), "--home", str(self.home(home))]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.directory, env=self.environment).stdout

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"LICHEN_LEDGER": "."}

    def start(self, name: str, *words: str) -> None:
        with (self.directory / f"{name}.log").open("a") as log:
            command = [*LICHEN, *words, "--home", str(self.home(name))]
            self.processes[name] = psutil.Popen(command, stdout=log, stderr=log, cwd=self.directory, env=self.environment)

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def join(self, name: str) -> None:
        """An agent that watches a folder, in which there is nothing yet."""
        (self.directory / f"{name}-data").mkdir()
        self.lichen("client", "join", self.lichen("coordinator", "invite", name).split()[0], home=name)
        self.home(name).joinpath("policy.yaml").write_text(POLICY)
        fields = ("--field", "text=text", "--field", "label=label")
        self.lichen("client", "data", "add", f"{name}-data", "--watch", *fields, "--declared-size", 32, "--holdout", 0, home=name)
        self.start(name, "client", "run")

    def deliver(self, name: str, file: str, rows: list[dict[str, str]]) -> None:
        """Put a file there at once, as exports should be."""
        folder = self.directory / f"{name}-data"
        hidden = folder / f".{file}"
        hidden.write_text("".join(json.dumps(row) + "\n" for row in rows))
        hidden.rename(folder / file)

    def submit(self, plan: dict[str, Any]) -> str:
        file = self.directory / "plan.yaml"
        file.write_text(yaml.safe_dump(plan))
        return self.lichen("coordinator", "submit", file).split()[0]

    def rounds(self, run: str) -> list[dict[str, Any]]:
        file = self.home("coordinator") / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def result(self, run: str) -> dict[str, Any]:
        return json.loads((self.home("coordinator") / "runs" / run / "result.json").read_text())

    def until(self, condition: Callable[[], Any], seconds: float = 90.0) -> float:
        """Wait for it; seconds it took."""
        began = time.monotonic()
        while not condition():
            gone = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not gone, self.log(gone[0])
            assert time.monotonic() - began < seconds, "\n".join(f"{name}: {self.log(name)}" for name in ("coordinator", *NODES))
            time.sleep(0.02)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    found = Federation(tmp_path_factory.mktemp("online"))
    try:
        for name in NODES:
            found.join(name)
        yield found
    finally:
        for name in list(found.processes):
            found.end(name)


def online(plan: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = {"mode": "online", "online": {"clients": 3, "rows": 32}}
    return plan | {"rounds": 3, "cohort": {"size": 4, "minimum": 3, "deadline_s": 60}, "continual": settings} | changes


def test_a_batch_begins_when_enough_clients_have_enough_new_data(
    federation: Federation, tiny_rows: Rows, tiny_plan: dict[str, Any]
) -> None:
    run = federation.submit(online(tiny_plan))
    federation.until(lambda: "round 1 waits: 0 of 3 clients have 32 new rows" in federation.log("coordinator"))
    federation.until(lambda: all("preparing, round 1 of tiny: answered" in federation.log(name) for name in NODES))
    rows = {name: [tiny_rows(30, 10 * seed + batch) for batch in range(3)] for seed, name in enumerate(NODES)}

    for name in NODES[:2]:
        federation.deliver(name, "monday.jsonl", rows[name][0])
    federation.until(lambda: "round 1 waits: 2 of 3" in federation.log("coordinator"))
    federation.deliver("south", "monday.jsonl", rows["south"][0])
    took = federation.until(lambda: "training, round 1" in federation.log("south"))
    assert took < 5
    federation.until(lambda: len(federation.rounds(run)) == 1)
    assert federation.rounds(run)[0]["participants"] == 3
    assert federation.rounds(run)[0]["task"] == "batch-1"
    federation.until(lambda: "round 2 waits: 0 of 3" in federation.log("coordinator"))

    # renamed, exported again in another order and format, or copied: nothing is new
    folder = federation.directory / "north-data"
    (folder / "monday.jsonl").rename(folder / "renamed.jsonl")
    lines = [f'"{row["text"]}",{row["label"]}' for row in reversed(rows["east"][0])]
    (federation.directory / "east-data" / ".again.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (federation.directory / "east-data" / ".again.csv").rename(federation.directory / "east-data" / "again.csv")
    federation.deliver("south", "copy.jsonl", rows["south"][0])
    time.sleep(4)
    assert "round 2 waits: 1" not in federation.log("coordinator")

    # an agent and the coordinator that are killed while they wait know the same again
    federation.end("north")
    federation.end("coordinator")
    federation.start("coordinator", "coordinator", "serve")
    federation.start("north", "client", "run")
    for name in ("north", "east", "west"):
        federation.deliver(name, "tuesday.jsonl", rows[name][1])
    federation.until(lambda: len(federation.rounds(run)) == 2)
    assert federation.rounds(run)[1]["participants"] == 3
    assert federation.rounds(run)[1]["errors"] == {}
    run_id = federation.result(run)["run_id"]
    for name, batches in (("north", [30, 30]), ("east", [30, 30]), ("south", [30, 0]), ("west", [0, 30])):
        with Arrivals(federation.home(name)) as arrivals:
            known = [arrivals.batch(run_id, number) for number in range(2)]
            assert [len(batch.rows) if batch else 0 for batch in known] == batches

    versions = json.loads(federation.lichen("coordinator", "versions", run, "--json"))
    assert [version["task"] for version in versions] == ["start", "batch-1", "batch-2"]
    status = json.loads(federation.lichen("client", "status", "--json", home="north"))
    assert status["new_rows"] == 0
    assert "1-batch-1 is given out; training goes on" in federation.lichen("coordinator", "rollback", run, 1)
    federation.lichen("coordinator", "export", run, "--out", federation.directory / "model")
    assert (federation.home("coordinator") / "runs" / run / "versions" / "1-batch-1" / "model").is_dir()
    federation.lichen("coordinator", "stop", run)


@pytest.mark.long
def test_a_batch_that_tells_nothing_new_is_not_trained_on(federation: Federation, tiny_rows: Rows, tiny_plan: dict[str, Any]) -> None:
    for name in NODES:
        fields = ("--field", "text=text", "--field", "label=label")
        federation.lichen("client", "data", "add", f"{name}-data", "--watch", *fields, "--declared-size", 32, "--holdout", 0.3, home=name)
    changes = {"mode": "online", "online": {"clients": 4, "rows": 32, "drift": 0.2, "read_again": False}}
    learns = {"model": tiny_plan["model"] | {"adapter": {"kind": "full"}}, "local": tiny_plan["local"] | {"steps": 60}}
    run = federation.submit(online(tiny_plan, rounds=2, evaluation={"federated_every": 1}, continual=changes, **learns))
    swapped = {"crop": "metal", "metal": "money", "money": "crop"}

    def deliver(file: str, seed: int, other: dict[str, str]) -> None:
        for number, name in enumerate(NODES):
            rows = tiny_rows(60, seed + number)
            federation.deliver(name, file, [{**row, "label": other.get(row["label"], row["label"])} for row in rows])

    deliver("first.jsonl", 200, {})
    federation.until(lambda: len(federation.rounds(run)) == 1)
    deliver("alike.jsonl", 300, {})
    federation.until(lambda: "below continual.online.drift" in federation.log("coordinator"))
    assert len(federation.rounds(run)) == 1
    federation.end("coordinator")
    federation.start("coordinator", "coordinator", "serve")
    deliver("other.jsonl", 400, swapped)
    federation.until(lambda: len(federation.rounds(run)) == 2)
    first, second = federation.rounds(run)
    assert first["drift"] is None
    assert first["before_by_task"].keys() == {"batch-1"}
    assert second["drift"] >= 0.2
    assert second["federated_by_task"].keys() == {"batch-1", "batch-2"}
    federation.until(lambda: federation.result(run)["status"] == "finished")
    told = federation.result(run)["continual"]
    accuracy = second["before_by_task"]["batch-2"]["accuracy"]
    assert told["matrix"][0] == [first["federated_by_task"]["batch-1"]["accuracy"], accuracy]
    assert told["drift"][1] == pytest.approx(told["matrix"][0][0] - accuracy)
    with Arrivals(federation.home("north")) as arrivals:  # what was not trained on the first time is of the batch that was
        assert len(arrivals.batch(federation.result(run)["run_id"], 1).rows) > 100


def test_the_operator_is_told_why_a_client_has_nothing(federation: Federation, tiny_plan: dict[str, Any]) -> None:
    privacy = {"unit": "example", "epsilon": 8, "delta": 1e-3, "clip": 1.0, "sample_rate": 0.25}  # the default policy permits 1e-5
    run = federation.submit(online(tiny_plan, privacy=privacy))
    federation.until(lambda: all(f"{name} can't look for new data: error 54" in federation.log("coordinator") for name in NODES))
    federation.lichen("coordinator", "stop", run)


def test_under_privacy_a_batch_is_a_segment_of_its_own(federation: Federation, tiny_rows: Rows, tiny_plan: dict[str, Any]) -> None:
    privacy = {"unit": "example", "epsilon": 8, "delta": 1e-5, "clip": 1.0, "sample_rate": 0.25}
    run = federation.submit(online(tiny_plan, privacy=privacy, rounds=2))

    def waits(round: int) -> bool:  # of this run
        return f"round {round} waits: 0 of 3" in federation.log("coordinator").rpartition("begins or goes on")[2]

    for batch in range(2):
        federation.until(functools.partial(waits, batch + 1))
        for seed, name in enumerate(NODES[:3]):
            federation.deliver(name, f"private-{batch}.jsonl", tiny_rows(30, 100 + 10 * seed + batch))
        federation.until(lambda wanted=batch + 1: len(federation.rounds(run)) == wanted)
    federation.until(lambda: json.loads(federation.lichen("coordinator", "runs", "--json"))[-1]["status"] == "finished")

    result = federation.result(run)
    for name in NODES[:3]:
        told = result["privacy"]["clients"][name]
        assert told["segments"].keys() == {"train:batch-1", "train:batch-2"}
        assert told["epsilon"] == max(told["segments"].values()) <= 8
        assert told["epsilon_sum"] == sum(told["segments"].values())
        with Ledger(federation.home(name)) as ledger:
            charged = [entry.charged for entry in ledger.entries()]
            assert len(charged) == 2
            assert not charged[0] & charged[1]
            assert len(ledger.segments()) == 2
            assert sum(segment.records for segment in ledger.segments()) > 30  # of 60, less those held out
