"""Client-level privacy as processes over the channel: secret noise, nodes that opted in, and what each side is told."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from lichen.client.ledger import Ledger
from lichen.common.plan import parse_plan
from lichen.simulations.demo import federate

CENTRAL = {"unit": "client", "noise": "central", "epsilon": 6.0, "delta": 1e-5, "clip": 0.5, "adaptive_clip": {}}


def test_a_deployed_run_draws_secret_noise_and_each_node_pays_once(tiny_plan, tiny_rows, tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(tiny_rows(60))
    source = {"path": str(tmp_path / "train.csv"), "fields": {"text": "text", "label": "label"}}
    simulation = {"clients": 2, "partition": "iid", "data": source}
    cohort = {"size": 2, "population": 2, "deadline_s": 60}  # both in each round
    plan = parse_plan(tiny_plan | {"cohort": cohort, "privacy": CENTRAL, "simulation": simulation})
    out = tmp_path / "deployed"
    result = federate(plan, out, Console(quiet=True))

    assert (result.status, result.engine, result.privacy.noise) == ("finished", "deployed", "secret")
    assert result.privacy.central is not None
    assert result.privacy.central.releases == 2
    assert 5.9 < result.privacy.central.epsilon <= 6.0
    assert [told.participants for told in result.rounds] == [None, None]
    assert [json.loads(line)["participants"] for line in (out / "operator.jsonl").read_text().splitlines()] == [2, 2]
    for home in (out / "nodes" / "client-0", out / "nodes" / "client-1"):
        with Ledger(home) as ledger:
            assert [(entry.unit, entry.segment.steps) for entry in ledger.entries()] == [("client", 2)]
        told = _lichen("client", "ledger", "--home", home)
        assert "promised by the coordinator" in told


def _lichen(*arguments: str | Path) -> str:
    lichen = Path(sys.executable).parent / "lichen"
    return subprocess.run([str(lichen), *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120).stdout
