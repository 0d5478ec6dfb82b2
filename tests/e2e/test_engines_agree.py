"""One plan, two ways to run it: simulated in one process, and deployed as processes over the channel."""

import csv

import torch
from rich.console import Console
from safetensors.torch import load_file

from lichen.common.plan import parse_plan
from lichen.simulations.demo import federate
from lichen.simulations.simulate import run

STREAM = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]


def test_a_deployed_federation_gives_the_simulated_model(tiny_plan, tiny_rows, tmp_path):
    """Of two tasks, each of which begins with a round that gathers sums."""
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(tiny_rows(120))
    source = {"path": str(tmp_path / "train.csv"), "fields": {"text": "text", "label": "label"}}
    local = tiny_plan["local"] | {"compute": "plain"}  # one after another: clients of so small a model pass together in a simulation
    tasks = {"rounds": 4, "continual": {"method": "adapters", "stream": STREAM, "tolerance": 1.0}}
    plan = parse_plan(tiny_plan | tasks | {"local": local, "simulation": {"clients": 2, "partition": "iid", "data": source}})

    simulated = run(plan, tmp_path / "simulated", "inprocess")
    deployed = federate(plan, tmp_path / "deployed", Console(quiet=True))

    assert (simulated.status, deployed.status) == ("finished", "finished")
    assert deployed.engine == "deployed"
    assert [told.participants for told in deployed.rounds] == [2, 2, 2, 2]
    for version in ("versions/1-fields/state", "versions/2-banks/state", "model/banks/adapter_model", "model/router"):
        left, right = (load_file(tmp_path / name / f"{version}.safetensors") for name in ("simulated", "deployed"))
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)
    assert deployed.final == simulated.final
    assert deployed.continual == simulated.continual
