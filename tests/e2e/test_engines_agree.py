"""One plan, two ways to run it: simulated in one process, and deployed as processes over the channel."""

import csv

import torch
from rich.console import Console
from safetensors.torch import load_file

from lichen.common.plan import parse_plan
from lichen.simulations.demo import federate
from lichen.simulations.simulate import run


def test_a_deployed_federation_gives_the_simulated_model(tiny_plan, tiny_rows, tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(tiny_rows(120))
    source = {"path": str(tmp_path / "train.csv"), "fields": {"text": "text", "label": "label"}}
    local = tiny_plan["local"] | {"compute": "plain"}  # one after another: clients of so small a model pass together in a simulation
    plan = parse_plan(tiny_plan | {"local": local, "simulation": {"clients": 2, "partition": "iid", "data": source}})

    simulated = run(plan, tmp_path / "simulated", "inprocess")
    deployed = federate(plan, tmp_path / "deployed", Console(quiet=True))

    assert (simulated.status, deployed.status) == ("finished", "finished")
    assert deployed.engine == "deployed"
    assert [told.participants for told in deployed.rounds] == [2, 2]
    left, right = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("simulated", "deployed"))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-7)
    assert deployed.final == simulated.final
