"""The limit: federated averaging of LoRA as a plain PyTorch loop, without any federation. Run by `lichen bench simulate`.

python plain_loop.py WORK.json START.safetensors FINAL.safetensors PROCESSES THREADS PADDING DEVICE
"""

import json
import sys
import time
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lichen.simulations.benchmarks.work import Work

final, processes, threads, padding, device = sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6], sys.argv[7]
start = load_file(sys.argv[2], device)
work = Work(sys.argv[1], threads, device)


def train(state: dict[str, torch.Tensor], client: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """One client's epoch: what it moved, and its rows."""
    set_peft_model_state_dict(work.model, state)
    ids, mask, targets = work.encode(client["rows"])
    optimizer, lengths = work.optimizer(), mask.sum(1).tolist()
    for batch in client["steps"]:
        length = work.length if padding == "fixed" else max(lengths[row] for row in batch)
        logits = work.model(input_ids=ids[batch, :length], attention_mask=mask[batch, :length]).logits
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(logits, targets[batch]))
        optimizer.step()
    return {name: tensor.detach() - state[name] for name, tensor in get_peft_model_state_dict(work.model).items()}, len(client["rows"])


pool = torch.multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (threads,)) if processes > 1 else None
state, seconds, first = start, [], time.time()
for clients in work.rounds:
    began = time.perf_counter()
    tasks = [(state, client) for client in clients]
    found = pool.starmap(train, tasks, chunksize=1) if pool else [train(*task) for task in tasks]
    total = sum(count for _, count in found)
    state = {name: tensor + sum(delta[name] * (count / total) for delta, count in found) for name, tensor in state.items()}
    if device != "cpu":
        torch.accelerator.synchronize()
    seconds.append(time.perf_counter() - began)
save_file(state, final)
print(json.dumps({"seconds": seconds, "first": first}))
