"""The plain loop's work on Apple's pfl-research. Run by `lichen bench simulate`, once for each of its processes.

python peer_pfl.py WORK.json START.safetensors FINAL.safetensors THREADS

pfl shares a cohort out among processes that it finds by PFL_WORKER_ADDRESSES and PFL_WORKER_RANK, as its guide to fast simulations has it.
Tuned: one process a core, of one thread, as many as the cohort's size can be divided by; no metrics of clients, which would be two more
passes over their rows in the first round; no weights by which it would balance clients of unequal size, since these are equal.
"""

import json
import os
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lichen.simulations.benchmarks.work import Work

work = Work(sys.argv[1], int(sys.argv[4]))
set_peft_model_state_dict(work.model, load_file(sys.argv[2]))
work.model.loss = lambda ids, mask, classes: functional.cross_entropy(work.model(input_ids=ids, attention_mask=mask).logits, classes)
work.model.metrics = lambda ids, mask, classes: {"rows": Weighted.from_unweighted(len(ids))}
users = [client for clients in work.rounds for client in clients]
times: list[float] = []


def user_data(user: int) -> Dataset:
    """A client's rows, in the order of its batches."""
    times.append(time.time())
    rows = [users[user]["rows"][place] for step in users[user]["steps"] for place in step]
    return Dataset(work.encode(rows), user_id=str(user))


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """When the first round began, and when each ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, **_: Any) -> Metrics:
        """The first round begins."""
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """A round is over."""
        self.marks.append(time.perf_counter())
        return False, Metrics()


clock = Clock()
# cohort after cohort, in the order in which pfl takes them
data = FederatedDataset(user_data, MinimizeReuseUserSampler(range(len(users))))
FederatedAveraging().run(
    NNAlgorithmParams(len(work.rounds), evaluation_frequency=len(work.rounds), train_cohort_size=len(work.rounds[0]), val_cohort_size=0),
    SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
    PyTorchModel(work.model, lambda *_, **__: work.optimizer(), torch.optim.SGD(work.weights, lr=1.0)),
    NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=work.rate),
    callbacks=[clock],
    send_metrics_to_platform=False,
)
if os.environ.get("PFL_WORKER_RANK", "0") == "0":
    save_file(get_peft_model_state_dict(work.model), sys.argv[3])
    seconds = [after - before for before, after in pairwise(clock.marks)]
    print(json.dumps({"seconds": seconds, "first": times[0]}))
