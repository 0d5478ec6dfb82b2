"""The plain loop's work on Flower's own simulation runtime (Ray), and with Opacus at the clients. Run by `lichen bench simulate`.

python peer_flower.py WORK.json START.safetensors FINAL.safetensors THREADS [private]

Tuned: one process a core, of one thread; an actor keeps model and tokenizer from client to client, and Opacus' engine wraps the model that
it finds; no evaluation by clients; the adapter alone travels.
"""

import json
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import autograd
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lichen.simulations.benchmarks.work import Work, work_of

PATH, START, FINAL, THREADS, PRIVATE = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
WORK = json.loads(Path(PATH).read_text())
client_app, server_app = ClientApp(), ServerApp()


def train(work: Work, client: dict[str, Any]) -> dict[str, float]:
    """An epoch without privacy."""
    ids, mask, classes = work.encode(client["rows"])
    optimizer = work.optimizer()
    for batch in client["steps"]:
        optimizer.zero_grad()
        logits = work.model(input_ids=ids[batch], attention_mask=mask[batch]).logits
        autograd.backward(functional.cross_entropy(logits, classes[batch]))
        optimizer.step()
    return {"steps": len(client["steps"])}


def train_private(work: Work, client: dict[str, Any]) -> dict[str, float]:
    """An epoch of DP-SGD by Opacus: Poisson sampling, hooks."""
    model, optimizer, loader = PrivacyEngine().make_private(
        module=work.model,
        optimizer=work.optimizer(),
        data_loader=DataLoader(TensorDataset(*work.encode(client["rows"])), batch_size=work.batch),
        noise_multiplier=work.private["noise_multiplier"],
        max_grad_norm=work.private["clip"],
    )
    for ids, mask, classes in loader:
        optimizer.zero_grad()
        autograd.backward(functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, classes))
        optimizer.step()
    model.to_standard_module()
    return {"steps": len(loader), "sample-rate": loader.sample_rate}


@client_app.train()  # type: ignore[untyped-decorator]
def serve(message: Message, _: Context) -> Message:
    """A client of a round."""
    work = work_of(PATH, THREADS)
    first = time.time()
    config = message.content["config"]
    client = work.rounds[config["server-round"] - 1][config["client"]]
    set_peft_model_state_dict(work.model, message.content["arrays"].to_torch_state_dict())
    told = (train_private if PRIVATE else train)(work, client)
    metrics = MetricRecord({"num-examples": len(client["rows"]), "first": first, **told})
    return Message(RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(work.model)), "metrics": metrics}), reply_to=message)


class Cohorts(FedAvg):  # type: ignore[misc]
    """FedAvg that says which client of the round a node plays, since Flower's node ids are others in each run."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The round's messages."""
        for number, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            told = ConfigRecord({"server-round": server_round, "client": number})
            message.content = RecordDict({"arrays": arrays, "config": told})
            yield message


def least(replies: list[RecordDict], _: str) -> MetricRecord:
    """When the round's first client began; of all else clients say the same."""
    metrics = [reply["metrics"] for reply in replies]
    return MetricRecord({name: min(metric[name] for metric in metrics) for name in metrics[0]})


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, _: Context) -> None:
    """The rounds, and what they took."""
    size = len(WORK["rounds"][0])
    strategy = Cohorts(size / WORK["clients"], 0.0, min_train_nodes=size, min_available_nodes=size, train_metrics_aggr_fn=least)
    marks: list[float] = []
    found = strategy.start(
        grid, ArrayRecord(load_file(START)), len(WORK["rounds"]), evaluate_fn=lambda *_: marks.append(time.perf_counter())
    )
    save_file(found.arrays.to_torch_state_dict(), FINAL)
    seconds = [after - before for before, after in pairwise(marks)]
    print(json.dumps({"seconds": seconds, **found.train_metrics_clientapp[1]}), flush=True)


run_simulation(server_app, client_app, WORK["clients"], backend_config={"client_resources": {"num_cpus": THREADS, "num_gpus": 0.0}})
