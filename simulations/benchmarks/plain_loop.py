"""The limit: federated averaging of LoRA as a plain PyTorch loop, without any federation. Run by `lichen bench simulate`.

python plain_loop.py WORK.json START.safetensors FINAL.safetensors PROCESSES THREADS PADDING
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

work = json.loads(Path(sys.argv[1]).read_text())
start, final, processes, threads, padding = load_file(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(work["base"])
zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
base = AutoModelForSequenceClassification.from_pretrained(work["base"], num_labels=work["labels"], **zero)
lora = LoraConfig(task_type="SEQ_CLS", r=work["rank"], lora_alpha=work["alpha"], layers_to_transform=work["layers"])
model = get_peft_model(base, lora).train()
weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
classes = torch.tensor(work["classes"])


def train(state: dict[str, torch.Tensor], rows: list[int], steps: list[list[int]]) -> tuple[dict[str, torch.Tensor], int]:
    """One client's epoch: what it moved, and its rows."""
    set_peft_model_state_dict(model, state)
    texts, targets = [work["texts"][row] for row in rows], classes[rows]
    tokens = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=work["length"])["input_ids"]]
    optimizer = torch.optim.AdamW(weights, lr=work["rate"], weight_decay=0.0)
    for batch in steps:
        length = work["length"] if padding == "fixed" else max(len(tokens[row]) for row in batch)
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        for place, row in enumerate(batch):
            ids[place, : len(tokens[row])] = tokens[row]
        mask = (torch.arange(length) < torch.tensor([len(tokens[row]) for row in batch]).unsqueeze(1)).long()
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, targets[batch]))
        optimizer.step()
    return {name: tensor.detach() - state[name] for name, tensor in get_peft_model_state_dict(model).items()}, len(rows)


pool = torch.multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (threads,)) if processes > 1 else None
state, seconds = start, []
for clients in work["rounds"]:
    began = time.perf_counter()
    tasks = [(state, client["rows"], client["steps"]) for client in clients]
    found = pool.starmap(train, tasks, chunksize=1) if pool else [train(*task) for task in tasks]
    total = sum(count for _, count in found)
    state = {name: tensor + sum(delta[name] * (count / total) for delta, count in found) for name, tensor in state.items()}
    seconds.append(time.perf_counter() - began)
save_file(state, final)
print(json.dumps({"seconds": seconds}))
