"""A real coordinator and a real agent: the profile arrives and changes what is asked, and a worker without memory goes on with less."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lichen.client.hardware import Hardware
from lichen.client.ledger import Ledger
from lichen.client.worker import Limits
from lichen.common.fitting import SHARE
from lichen.common.hardware import work_of
from lichen.common.model.memory import Shape, peak_mb
from lichen.common.plan import parse_plan
from lichen.common.result import Result, read_result
from lichen.common.tasks import make_task

LICHEN = (sys.executable, "-c", "from lichen.common.cli import main; main()")
Rows = Callable[..., list[dict[str, str]]]
MEMORY_MB, TOO_LITTLE_MB = 900, 1400
DEADLINE, SLOW = 120.0, 32
"""Seconds of a round, and tokens a second: a dozen steps, where the plans ask for more than any machine does in that time."""


@dataclass
class World:
    """A served coordinator and one node, each with its log."""

    folder: Path
    processes: dict[str, subprocess.Popen[str]]

    def lichen(self, *arguments: object) -> str:
        done = subprocess.run([*LICHEN, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def start(self, name: str, *arguments: object) -> None:
        log = (self.folder / f"{name}.log").open("a")
        self.processes[name] = subprocess.Popen([*LICHEN, *map(str, arguments)], stdout=log, stderr=log, text=True)
        log.close()

    def stop(self, name: str) -> None:
        self.processes[name].terminate()
        self.processes.pop(name).wait(30)

    def log(self, name: str) -> str:
        """What a process has said, as one line: the console breaks them."""
        return " ".join((self.folder / f"{name}.log").read_text().split())

    def run_agent(self, *arguments: object) -> None:
        self.start("node", "client", "run", "--home", self.folder / "node", *arguments)
        wait_for(lambda: self.node()["connected"])

    def node(self) -> dict[str, Any]:
        (found,) = json.loads(self.lichen("coordinator", "nodes", "--json", "--home", self.folder / "coordinator"))
        return dict(found)

    def run(self, plan: dict[str, Any]) -> Result:
        """Submit a plan and wait for its end."""
        file = self.folder / f"{time.monotonic_ns()}.yaml"
        file.write_text(yaml.safe_dump(plan))
        home = self.folder / "coordinator"
        run = self.lichen("coordinator", "submit", file, "--home", home).split()[0]
        directory = home / "runs" / run
        wait_for(lambda: (directory / "result.json").exists() and read_result(directory).status != "running")
        result = read_result(directory)
        assert result.status == "finished", (result.error, self.log("node"), self.log("coordinator"))
        return result


def wait_for(condition: Callable[[], Any], seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Rows) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("profile"), {})
    home, node = found.folder / "coordinator", found.folder / "node"
    found.lichen("coordinator", "init", "--home", home, "--host", "127.0.0.1", "--fleet-port", 0, "--enrol-port", 0)
    found.start("coordinator", "coordinator", "serve", "--home", home)
    try:
        wait_for(lambda: "ready: fleet" in found.log("coordinator"))
        found.lichen("client", "join", found.lichen("coordinator", "invite", "node", "--home", home).split()[0], "--home", node)
        rows = found.folder / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({**row, "text": row["text"] * 20}) for row in tiny_rows(300)))
        fields = ("--field", "text=text", "--field", "label=label")
        found.lichen("client", "data", "add", rows, *fields, "--declared-size", 256, "--home", node)
        (node / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\nprivacy: {max_epsilon: 1000, max_delta: 1.0e-3}\n")
        yield found
    finally:
        for process in found.processes.values():
            process.kill()
            process.wait()


def test_the_profile_arrives_and_a_slow_node_is_asked_for_the_steps_that_it_has_time_for(world: World, tiny_plan: dict[str, Any]) -> None:
    """How slow it is is said by what it keeps of a probe, so that how busy this machine is decides nothing."""
    world.run_agent("--threads", 1, "--memory", f"{MEMORY_MB}M")
    first = world.node()["profile"]
    assert (first["device"], first["threads"], first["memory_mb"], first["tokens_per_s"]) == ("cpu", 1, MEMORY_MB, None)
    alone = {"size": 1, "minimum": 1, "deadline_s": DEADLINE, "assign": ["steps"]}
    plan = {**tiny_plan, "rounds": 1, "cohort": alone}
    world.run(plan)
    told = world.node()["profile"]
    assert told["tokens_per_s"] > 0
    assert json.loads(world.lichen("client", "status", "--json", "--home", world.folder / "node"))["profile"] == told
    assert json.loads(world.lichen("client", "profile", "--json", "--home", world.folder / "node"))["tokens_per_s"] is None, "other threads"

    hours = {**plan, "rounds": 2, "local": {**plan["local"], "steps": 10**7}}
    other = {**hours, "rounds": 1, "local": {**hours["local"], "batch_size": 4}}
    world.stop("node")
    kept = Hardware(world.folder / "node", Limits(threads=1))
    for document in (hours, other):
        kept.keep_speed(work_of(parse_plan(document)), SLOW)
    world.run_agent("--threads", 1, "--memory", f"{MEMORY_MB}M")
    assert world.node()["profile"]["tokens_per_s"] == SLOW
    assert [told.participants for told in world.run(hours).rounds] == [1, 1]
    tokens = plan["local"]["batch_size"] * plan["task"]["max_length"]
    assert f"node is asked {{'steps': {int(SHARE * DEADLINE * SLOW / tokens)}}}" in world.log("coordinator")

    # another training: its speed is told while the node gets ready, before its steps are chosen
    assert world.run(other).rounds[0].participants == 1
    tokens = 4 * plan["task"]["max_length"]
    assert f"node is asked {{'steps': {int(SHARE * DEADLINE * SLOW / tokens)}}}" in world.log("coordinator")
    assert world.log("node").count("probing") == 1, "once for a training whose speed was not known"

    policy = world.folder / "node" / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before + "profile: false\n")
    world.run(plan)
    assert world.node()["profile"] is None
    policy.write_text(before)
    world.stop("node")


def test_a_worker_that_has_too_little_memory_goes_on_with_fewer_rows_under_the_same_reservation(
    world: World, tiny_plan: dict[str, Any], tmp_path: Path
) -> None:
    """Of a model so wide that 256 rows at once do not fit, and 128 do; by a limit of the kernel's, in a real worker."""
    private = {"unit": "example", "sample_rate": 1.0, "epsilon": 8.0, "delta": 1e-4}
    plan = {
        **tiny_plan,
        "rounds": 1,
        "task": {**tiny_plan["task"], "max_length": 64},
        "model": {"base": str(wide_model(Path(tiny_plan["model"]["base"]), tmp_path)), "adapter": {"kind": "lora", "rank": 2}},
        "cohort": {"size": 1, "minimum": 1, "deadline_s": 250.0, "assign": []},  # the coordinator's own prediction would avoid it
        "local": {"steps": 1, "batch_size": 256, "max_physical_batch_size": 256, "learning_rate": 1e-3},
        "privacy": private,
    }
    read = parse_plan(plan)
    shape = Shape.of(make_task(read).outline())
    assert peak_mb(read, shape, rows=128) < TOO_LITTLE_MB < peak_mb(read, shape) / 1.25
    policy = world.folder / "node" / "policy.yaml"
    policy.write_text(policy.read_text() + "profile: false\n")  # the probe would run out of memory before anything is charged
    world.run_agent("--threads", 1, "--memory", f"{TOO_LITTLE_MB}M")
    result = world.run(plan)
    assert result.rounds[0].participants == 1
    assert "it is done again with 128 rows at once, not 256" in world.log("node")
    status = json.loads(world.lichen("client", "status", "--json", "--home", world.folder / "node"))
    assert status["rows"] <= 128
    with Ledger(world.folder / "node") as ledger:
        entries = [*ledger.entries()]
    assert len(entries) == 1, "nothing of the first attempt left, so it was not charged twice"
    assert entries[0].segment.steps == 1
    world.stop("node")


def wide_model(tiny: Path, folder: Path) -> Path:
    """A BERT whose activations are large and soon computed, beside the tiny one's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    shutil.copytree(tiny, folder / "wide")
    (folder / "wide" / "model.safetensors").unlink()
    words = len((folder / "wide" / "vocab.txt").read_text().split())
    config = BertConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4096,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder / "wide")
    return folder / "wide"
